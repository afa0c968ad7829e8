"""The loopback server itself: what it lets through, what it leaves behind, and its processes.

That verbs give there what they give here is tests/test_remote.py's subject.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import httpx
import nnsight
import pytest
import torch
import websocket
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError

import loopback
import saefeat as sf
from helpers import RAGGED, D, batch_of, build, eventually, make_sae, unit, wrapped
from saefeat.remote import Server

NEW = 3


# Slow: each test starts processes, and what is tested is no part of the library.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("silent")]


@pytest.fixture(scope="module")
def model():
    return wrapped(build("llama"))


@pytest.fixture(scope="module")
def apart(model):
    # with a skeleton: what blocks of a user's own can do once NDIF's sandbox has one again
    with loopback.serve(model, sandbox=True, fresh=False, skeleton=True) as server:
        whereabouts(model, remote=server.url)  # the first job starts the worker
        yield server


@pytest.fixture(scope="module")
def fresh(model):
    with loopback.serve(model, sandbox=True) as server:
        yield server


def latents() -> sf.Latents:
    return make_sae("jumprelu", "resid_post.1").latents([3, 40, 17])


def layer(model, number: int):
    return model.model.layers[number]


# ---------------------------------------------------------------- a block in its own process


def whereabouts(model, **how):
    with model.session(**how):
        import builtins
        import os

        model.tokenizer  # noqa: B018  (a session finds its model in the block)
        found = nnsight.save([os.getpid(), os.getppid(), hasattr(builtins, "left_behind")])
        builtins.left_behind = True
    return found


def test_each_block_has_a_fresh_process(model, fresh):
    first, second = (whereabouts(model, remote=fresh.url) for _ in range(2))
    worker = fresh.worker._process.pid
    assert len({first[0], second[0], worker, os.getpid()}) == 4
    assert first[1] == second[1] == worker
    assert not first[2] and not second[2]


def test_one_process_serves_all_where_that_is_asked_for(model, apart):
    first, second = (whereabouts(model, remote=apart.url) for _ in range(2))
    assert first[:2] == second[:2] and second[2]


def test_the_block_has_no_weights(model, apart):
    with model.session(remote=apart.url):
        kinds = nnsight.save([p.device.type for p in model._module.parameters()])
    assert set(kinds) == {"meta"}


def test_an_edit_in_place_reaches_the_model(model, apart):
    """What a block was given goes back when it moves on."""

    def zeroed(**how):
        with torch.no_grad(), model.trace(batch_of(), **how):
            x = layer(model, 0).output
            x[:, 1:] = 0.0
            after = nnsight.save(layer(model, 1).input.clone())
            logits = nnsight.save(model.output.logits)
        return after, logits

    for here, there in zip(zeroed(), zeroed(remote=apart.url), strict=True):
        assert torch.allclose(here, there, atol=1e-5)
        assert (there[:, 1:] == 0).all() == (here[:, 1:] == 0).all()


def test_what_crosses_is_counted(model, apart):
    """Parks as preflight foresees them; bytes at least those of the values, there and back."""
    intervention, batch = sf.Clamp(latents(), 3.0).bind(model), batch_of()
    with model.trace(batch, remote=apart.url):
        nnsight.save(intervention(model))
    crossed = apart.crossings[-1]
    assert crossed.parks == sf.remote.preflight(model, RAGGED, intervention).parks == 3
    assert crossed.trips == 3 + 2 + 1  # what is asked for; what was read, sent back; the end
    value = batch["input_ids"].numel() * D * 4
    assert crossed.to_block > value
    assert crossed.to_model > 2 * value  # as read, then as edited
    with model.trace(batch, remote=apart.url):
        nnsight.save(model.model.layers[0].output.shape)
    assert apart.crossings[-1][:2] == (1, 3)
    assert crossed.to_model - apart.crossings[-1].to_model > value


def test_an_invoke_reads_its_rows_and_all_of_them_cross(model, apart):
    """``torch.save``, the sandbox's wire, writes the storage that a view looks into."""
    with model.trace(remote=apart.url) as tracer:
        with tracer.invoke(RAGGED[0]):
            own = nnsight.save(model.output.logits.shape)
        with tracer.invoke(RAGGED[1]):
            pass
    one = apart.crossings[-1].to_block
    with model.trace(remote=apart.url) as tracer:
        with tracer.invoke(RAGGED[0]):
            pass
        with tracer.invoke(RAGGED[1]):
            pass
        with tracer.invoke():
            both = nnsight.save(model.output.logits.shape)
    assert (own[0], both[0]) == (1, 2)
    assert abs(apart.crossings[-1].to_block - one) < 0.1 * both.numel() * 4


def nothing_crosses(model, apart):
    with model.trace(batch_of(), remote=apart.url):
        x = layer(model, 1).output
        loss = model.output.logits.sum()
        with loss.backward():
            nnsight.save(x.grad)


def test_no_gradient_crosses(model, apart):
    with pytest.raises(RemoteError, match="does not require grad"):
        nothing_crosses(model, apart)


def test_an_attribution_there_says_what_to_do(model, apart):
    attribute = sf.Attribute(latents(), sf.logit_diff(3, 5), method=sf.attribution.AtP())
    with pytest.raises(sf.errors.GradientError, match=r"Exact\(\) or FiniteDifference\(\)"):
        attribute(model, RAGGED, on=Server(apart.url))


def lens(model, **how):
    with torch.no_grad(), model.trace(batch_of(), **how):
        early = model.lm_head(model.model.norm(layer(model, 0).output))
        early = nnsight.save(early)
    return early


def cached(model, **how):
    with torch.no_grad(), model.trace(batch_of(), **how) as tracer:
        cache = tracer.cache(modules=[layer(model, 1), layer(model, 2)])
        nnsight.save(layer(model, 0).output)
    return torch.stack([cache[f"model.model.layers.{n}"].output for n in (1, 2)])


def opened(model, **how):
    with torch.no_grad(), model.trace(batch_of(), **how):
        inner = nnsight.save(layer(model, 1).mlp.source.self_act_fn_0.output.clone())
    return inner


def met(model, **how):
    """Two blocks that wait for each other: the second is moved on by the first."""
    batch = batch_of(RAGGED[:1])
    with torch.no_grad(), model.trace(**how) as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(batch):
            hidden = layer(model, 0).output
            barrier()
        with tracer.invoke(batch):
            barrier()
            layer(model, 0).output = hidden * 2
            logits = nnsight.save(model.output.logits)
    return logits


def stopped(model, **how):
    with torch.no_grad(), model.trace(batch_of(), **how) as tracer:
        x = nnsight.save(layer(model, 1).output.clone())
        tracer.stop()
    return x


def stepped(model, **how):
    """The third token's pass alone, then the one after it, without being asked for by number."""
    batch = batch_of()
    with model.generate(max_new_tokens=5, do_sample=False, **how) as tracer:
        with tracer.invoke(batch):
            for _ in tracer.iter[2:4]:
                layer(model, 0).output = layer(model, 0).output * -3
                late = layer(model, 1).output.clone()
                late = nnsight.save(late)
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return torch.cat([late[:, 0], tokens], 1)


def skipped(model, **how):
    with torch.no_grad(), model.trace(batch_of(), **how):
        x = layer(model, 0).output
        layer(model, 1).skip(x)
        logits = nnsight.save(model.output.logits)
    return logits


def direct(model, **how):
    """A call without a block inside a session: its result comes back."""
    batch = batch_of()
    with model.session(**how):
        tokens = model.generate(batch, max_new_tokens=2, do_sample=False)
        tokens = nnsight.save(tokens)
    return tokens


BARE = pytest.mark.xfail(strict=True, reason="ndif 0.1.2 takes no call without a block there")
DIRECT = pytest.param(direct, marks=BARE)


@pytest.mark.parametrize("do", [lens, cached, opened, met, stopped, stepped, skipped, DIRECT])
def test_what_nnsight_can_do_it_can_do_apart(do, model, apart):
    here, there = do(model), do(model, remote=apart.url)
    assert torch.allclose(here.double(), there.double(), atol=1e-5)


def test_errors_in_a_block_point_at_its_line(model, apart):
    with pytest.raises(RemoteError, match=r"(?s)missing_name.*NameError"):  # noqa: SIM117
        with model.trace(batch_of(), remote=apart.url):
            nnsight.save(missing_name)
    with pytest.raises(RemoteError, match="already ran past it"):  # noqa: SIM117
        with model.trace(batch_of(), remote=apart.url):
            nnsight.save(layer(model, 2).output)
            nnsight.save(layer(model, 0).output)


def test_errors_of_the_model_reach_the_client(model, apart):
    with pytest.raises(RemoteError, match=r"size|shape"):  # noqa: SIM117
        with model.trace(batch_of(), remote=apart.url):
            layer(model, 0).output = torch.zeros(3, 2, D + 1)
    assert torch.isfinite(sf.run(model, RAGGED, on=Server(apart.url)).logits).all()


def test_a_block_that_dies_takes_nobody_along(model, apart):
    worker = apart.worker._process.pid
    with pytest.raises(RemoteError, match="connection closed before message complete"):  # noqa: SIM117
        with model.trace(batch_of(), remote=apart.url):
            layer(model, 0).output  # noqa: B018
            os._exit(7)
    there = sf.run(model, RAGGED, sf.Ablate(latents()), on=Server(apart.url))
    here = sf.run(model, RAGGED, sf.Ablate(latents()))
    assert torch.allclose(there.logits, here.logits, atol=1e-5)
    assert apart.worker._process.pid == worker


def test_a_deployment_that_dies_is_replaced(model, apart):
    apart.faults.append("die")
    with pytest.raises(sf.errors.RemoteError, match="Error submitting request to model"):
        sf.run(model, RAGGED, on=Server(apart.url))
    assert "exit code 9" in apart.worker.last_words
    assert torch.isfinite(sf.run(model, RAGGED, on=Server(apart.url)).logits).all()


@pytest.mark.parametrize("sandbox", [True, False])
def test_what_a_block_says_reaches_the_client(sandbox, model, apart, request):
    """In LOG statuses, as it says it: prints, and warnings."""
    server = apart if sandbox else request.getfixturevalue("server")
    said, backend = [], RemoteBackend(model.to_model_key(), host=server.url)
    backend.display.update = lambda response: said.append((response.status, response.description))
    with model.trace(batch_of(), backend=backend):
        import warnings

        print("here", tuple(layer(model, 1).output.shape))
        warnings.warn("beware", stacklevel=1)
    logs = [text for status, text in said if status == "LOG"]
    assert logs[0] == f"here {(*batch_of()['input_ids'].shape, D)}"
    assert any("beware" in text for text in logs)
    states = [status for status, _ in said if status != "LOG"]
    assert states == ["RECEIVED", "QUEUED", "DISPATCHED", "RUNNING", "COMPLETED"]
    assert backend.meta["runtime"] > 0


def test_a_large_result_comes_from_the_store_and_a_small_one_does_not(model, server):
    for count, kind in ((1 << 20, bytes), (3 << 20, str)):
        seen, backend = [], RemoteBackend(model.to_model_key(), host=server.url)
        backend.display.update = lambda response, seen=seen: seen.append(response.data)
        with model.trace(batch_of(), backend=backend):
            shape = layer(model, 1).output.shape
            kept = nnsight.save(torch.rand(count) * shape[0])
        assert type(seen[-1]) is kind and kept.shape == (count,)


def test_ones_own_classes_and_functions_come_back(model, server, apart):
    for there in (server, apart):
        with model.trace(batch_of(), remote=there.url):

            class Pair:
                left = 3

            shape = layer(model, 1).output.shape
            kept = nnsight.save([Pair(), lambda x: x + 1, shape])
        assert kept[0].left == 3 and kept[1](2) == 3


@pytest.mark.parametrize("new", [0, 3])
def test_verbs_need_no_skeleton(new, model, apart, fresh):
    """NDIF's code with nnsight 0.8.1 under transformers 5.23 has none: a block finds no module."""
    here = sf.run(model, RAGGED, sf.Ablate(latents()), max_new_tokens=new)
    for server in (apart, fresh):
        there = sf.run(
            model, RAGGED, sf.Ablate(latents()), max_new_tokens=new, on=Server(server.url)
        )
        assert torch.allclose(there.logits, here.logits, atol=1e-5)
        assert there.completions == here.completions


# ---------------------------------------------------------------- the cache beside a block's input


def site(name: str) -> sf.Intervention:
    return sf.Clamp(sf.Direction(unit(), site=name), add=3.0) | sf.Probe(
        sf.Direction(unit(1), site=name)
    )


@pytest.fixture(scope="module")
def gpt2():
    nn = wrapped(build("gpt2"))
    with loopback.serve(nn, sandbox=True, fresh=False) as server:
        yield nn, server


BETWEEN = ["resid_pre.1", "resid_pre.2", "resid_mid.1", "resid_mid.2"]


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_stream_between_blocks_is_edited_where_no_cache_is(name, family, model, apart, request):
    """In a generation a copied cache would make every later token wrong, and say nothing."""
    nn, server = (model, apart) if family == "llama" else request.getfixturevalue("gpt2")
    both = site(name) | sf.Clamp(latents(), 2.0)
    there = sf.run(nn, RAGGED, both, max_new_tokens=NEW, on=Server(server.url))
    here = sf.run(nn, RAGGED, both, max_new_tokens=NEW)
    assert here.completions == there.completions
    for a, b in zip(here.readings, there.readings, strict=True):
        assert torch.allclose(a.values[a.mask], b.values[b.mask], atol=1e-4)


@pytest.mark.parametrize("name", ["resid_pre.0", "model.layers.1.self_attn.input"])
def test_an_input_beside_the_cache_is_refused_in_a_generation(name, model, apart):
    here = sf.run(model, RAGGED, site(name))
    there = sf.run(model, RAGGED, site(name), on=Server(apart.url))
    assert torch.allclose(here.logits, there.logits, atol=1e-4)
    with pytest.raises(sf.errors.RemoteError, match="copy of the key-value cache"):
        sf.run(model, RAGGED, site(name), max_new_tokens=NEW, on=Server(apart.url))


# ---------------------------------------------------------------- the server's door


def test_only_those_who_know_the_secret_are_answered(apart):
    root = apart.url.rpartition("/")[0]
    assert len(apart.url.rpartition("/")[2]) > 20
    sent = len(apart.payloads)
    for secret in ("", "/wrong", "/" + "x" * 22):
        assert httpx.get(f"{root}{secret}/env").status_code == 404
        assert httpx.post(f"{root}{secret}/request", content=b"x").status_code == 404
        with pytest.raises(websocket.WebSocketBadStatusException):
            websocket.create_connection(f"ws{root.removeprefix('http')}{secret}/subscribe")
    assert httpx.get(f"{apart.url}/env").status_code == 200
    assert httpx.get(f"{apart.url}/ping").json() == "pong"
    assert len(apart.payloads) == sent


@pytest.mark.parametrize(
    "how",
    [
        {"data": {"data": "{}"}},
        {"content": b"\xff" * 99},
        {"files": {"data": (None, "[1]"), "blob": b""}},
        {"files": {"data": (None, "{"), "blob": b""}},
        {"content": iter([b"in chunks"])},
    ],
)
def test_what_is_no_request_is_refused(how, apart, capfd):
    sent = len(apart.payloads)
    answer = httpx.post(f"{apart.url}/request", **how)
    assert answer.status_code == 422 and answer.json()["detail"]
    assert len(apart.payloads) == sent
    assert capfd.readouterr().err == ""


def test_an_old_client_is_refused_where_a_version_is_asked_for(model):
    with loopback.serve(model, version="0.9.0") as server:
        for old in ("0.8.1", "", "?"):
            answer = httpx.post(f"{server.url}/request", headers={"nnsight-version": old})
            assert answer.status_code == 400 and answer.json()["detail"]
        assert server.payloads == []


def test_a_client_that_hangs_up_is_no_news(apart, capfd):
    import socket

    where = ("127.0.0.1", int(apart.url.rpartition("/")[0].rpartition(":")[2]))
    with socket.create_connection(where) as caller:
        caller.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n")
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    waiting = websocket.create_connection(f"ws{apart.url.removeprefix('http')}/subscribe")
    name = json.loads(waiting.recv())["session_id"]
    waiting.sock.close()
    assert eventually(lambda: name not in apart.sessions.queues)
    assert httpx.get(f"{apart.url}/ping").status_code == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "make, options, error, match",
    [
        (lambda: build("llama"), {}, sf.errors.ModelError, "was not wrapped"),
        (lambda: 3, {}, sf.errors.ModelError, "a int"),
        (lambda: wrapped(build("llama")), {"timeout": 0}, sf.errors.RemoteError, "more than 0"),
        (
            lambda: wrapped(build("llama")),
            {"timeout": float("nan")},
            sf.errors.RemoteError,
            "timeout",
        ),
        (lambda: wrapped(build("llama")), {"faults": ["explode"]}, sf.errors.RemoteError, "vanish"),
    ],
)
def test_what_cannot_be_served_is_refused(make, options, error, match):
    with pytest.raises(error, match=match), loopback.serve(make(), **options):
        pass


def test_a_skeleton_cannot_be_served(model, tmp_path):
    model._module.save_pretrained(tmp_path)
    bare = nnsight.TransformersModel(
        str(tmp_path), tokenizer=model.tokenizer, task="text-generation"
    )
    with pytest.raises(sf.errors.ModelError, match="without weights"), loopback.serve(bare):
        pass


def test_a_folder_that_is_no_model_fails_the_job(model, tmp_path):
    with (
        loopback.serve(tmp_path) as server,
        pytest.raises(sf.errors.RemoteError, match="exit code 1"),
    ):
        sf.run(model, RAGGED, on=Server(server.url))


# ---------------------------------------------------------------- hung, killed, left behind


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(pids: list[int]) -> bool:
    return eventually(lambda: not any(map(alive, pids)))


def running(server) -> bool:
    """Whether the job runs in its process."""
    return any(job.status == "RUNNING" for job in server.jobs.values())


def endless(model, url):
    with model.trace(batch_of(), remote=url):
        layer(model, 0).output  # noqa: B018
        while True:
            pass


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.parametrize("sandbox", [True, False])
def test_a_block_that_never_ends_is_ended(sandbox, model):
    """Not only waited for no longer: gone, and the next job has a worker."""
    with loopback.serve(model, sandbox=sandbox, fresh=False, timeout=20.0) as server:
        pids = whereabouts(model, remote=server.url)[:1]
        with pytest.raises(RemoteError, match=r"exceeded the execution timeout of 20\.0s"):
            endless(model, server.url)
        assert ended(pids)
        assert torch.isfinite(sf.run(model, RAGGED, on=Server(server.url)).logits).all()


@linux
def test_nothing_is_left_behind(model, tmp_path, monkeypatch):
    """Closed in the midst of a job, with a client that waits: no thread, process or file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # not that of tests side by side
    before = set(threading.enumerate())
    failed = []

    def client():
        try:
            endless(model, server.url)
        except Exception as error:
            failed.append(error)

    with loopback.serve(model, sandbox=True, fresh=False) as server:
        pids = [whereabouts(model, remote=server.url)[0], server.worker._process.pid]
        sockets = [path for path in Path("/tmp").glob("sbx-*.sock") if socket_of(path, pids[0])]
        assert len(sockets) == 1
        waiting = threading.Thread(target=client)
        waiting.start()
        assert eventually(lambda: running(server))
    waiting.join(timeout=120)
    assert failed and not waiting.is_alive()
    assert ended(pids)
    # A thread that answered a caller ends with the connection, by itself.
    assert eventually(lambda: set(threading.enumerate()) <= before)
    assert eventually(lambda: not sockets[0].exists())
    assert not list(tmp_path.glob("saefeat-*"))


def socket_of(path: Path, pid: int) -> bool:
    """Whether the process was started to listen there."""
    return str(path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()


SERVE = """
import json, os, sys, threading, time
sys.path.insert(0, {tests!r})
import loopback, nnsight, saefeat as sf
from helpers import RAGGED, build, wrapped
from test_loopback import endless, eventually, running, whereabouts
nnsight.CONFIG.APP.REMOTE_LOGGING = False
model = wrapped(build("llama"))
with loopback.serve(model, sandbox=True, fresh=False) as server:
    pids = whereabouts(model, remote=server.url)[:2]
    threading.Thread(target=endless, args=(model, server.url), daemon=True).start()
    assert eventually(lambda: running(server))
    print(json.dumps(pids), flush=True)
    time.sleep(600)
"""


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_who_serves_takes_the_others_along(how):
    """Killed without a chance to clean up, or by Ctrl-C, with a block that never ends."""
    code = SERVE.format(tests=str(Path(__file__).parent))
    serving = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with serving:
        pids = json.loads(serving.stdout.readline())
        children = [pid for pid in pids if alive(pid)]
        assert children == pids
        serving.send_signal(how)
        assert ended(pids)
        serving.wait(timeout=120)
