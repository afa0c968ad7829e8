"""What breaks on the way, on the released server: a job is taken up again, and nothing is lost.

Each test breaks one thing while a job with a file, or a run with a checkpoint, is under way. The
same call again must then give the result of a run here, asking again only for what had not
arrived; every error in between must be a RemoteError that says what to do.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from cells import inline, latents, same
from served import client
from tools.ndif.relay import Relay
from websocket import WebSocketException

import saefeat as sf
from helpers import eventually
from saefeat.remote import Server

pytestmark = pytest.mark.ndif
NEW = 12
WORDS = [f"w{n} w{n + 1} w{n + 2}" for n in range(5, 65, 10)]
CHATS = [[{"role": "user", "content": text}] for text in WORDS]


def slow(x):
    """A score that takes its time: a job of some seconds, in the middle of which things break."""
    import time

    time.sleep(0.2)
    return x[..., 0]


def edits() -> sf.verbs.base.Intervention:
    when = sf.When(slow, site="resid_post.0", above=-1e9)
    return sf.Clamp(latents(), 3.0, when=when) | sf.Probe(latents(2), reduce="max")


@pytest.fixture(scope="module")
def model(served_models):
    return client(served_models["trusted", "float32"])


@pytest.fixture(scope="module")
def here(model):
    return sf.run(model, CHATS, edits(), max_new_tokens=NEW, batch_size=2)


@pytest.fixture
def job(model, server, tmp_path):
    """The same call each time: three batches of two prompts, one after another."""

    def submitted(on: Server | None = None) -> sf.remote.Job:
        on = on or Server(server.url, requests=1)
        options = {"max_new_tokens": NEW, "batch_size": 2, "file": tmp_path / "job.json"}
        return sf.remote.submit(model, CHATS, edits(), on=on, **options)

    submitted.file = tmp_path / "job.json"
    return submitted


def parts(file: Path) -> list[dict]:
    return json.loads(file.read_text())["batches"]


def in_the_middle(job: sf.remote.Job) -> None:
    """Until the first batch has arrived and the second is running."""

    def reached() -> bool:
        job.poll()
        return job.statuses[0] == "COMPLETED" and job.statuses[1] == "RUNNING"

    assert eventually(reached), job.statuses


def finished(call: Callable[[], sf.results.Run], most: int = 8) -> sf.results.Run:
    """The same call until it gives a result; each error must say what to do."""
    errors: list[sf.errors.RemoteError] = []
    while len(errors) < most:
        try:
            return call()
        except sf.errors.RemoteError as error:
            assert "Try: " in str(error)
            errors.append(error)
            time.sleep(2)
    raise ExceptionGroup("the same call failed again and again", errors)


def resumed(job, here, first: dict) -> None:
    """The job ends well, and its first batch was not asked for again."""
    same(here, finished(lambda: job().wait(timeout=60)), 1e-4)
    assert parts(job.file)[0] == first


def test_the_model_actor_is_killed(stack, job, here):
    under_way = job()
    in_the_middle(under_way)
    first = parts(job.file)[0]
    for pid in stack.processes("ray::Beside"):
        os.kill(pid, signal.SIGKILL)
    resumed(job, here, first)


def test_a_run_with_a_checkpoint_goes_on_after_the_actor_is_killed(stack, model, server, tmp_path):
    options = {"max_new_tokens": NEW, "batch_size": 2, "checkpoint": tmp_path / "run"}
    mine = sf.run(model, CHATS, edits(), max_new_tokens=NEW, batch_size=2)
    with pytest.raises(sf.errors.RemoteError, match="Try: "):
        one_by_one = Server(server.url, requests=1)
        for _ in sf.run(model, CHATS, edits(), on=one_by_one, stream=True, **options):
            for pid in stack.processes("ray::Beside"):
                os.kill(pid, signal.SIGKILL)
    theirs = finished(lambda: sf.run(model, CHATS, edits(), on=server, **options))
    same(mine, theirs, 1e-4)


def test_ray_stops(stack, job, here, served_models):
    under_way = job()
    in_the_middle(under_way)
    first = parts(job.file)[0]
    stack.stop_ray()
    stack.start_ray()
    assert eventually(stack.connected, 240)
    stack.deploy(served_models.values())
    resumed(job, here, first)


def test_a_deployment_is_evicted(stack, job, here, served_models):
    under_way = job()
    in_the_middle(under_way)
    first = parts(job.file)[0]
    stack.run("evict", ["ndif", "evict", "--all"])
    stack.deploy(served_models.values())
    resumed(job, here, first)


@pytest.mark.parametrize("left", ["nothing", "half"])
def test_a_result_that_is_lost_at_the_store(left, stack, job, here):
    in_the_middle(job())
    first, second = parts(job.file)[:2]
    assert eventually(lambda: stored(stack, second["id"]) is not None)
    if left == "nothing":
        at_store(stack, second["id"], "DELETE")
    else:
        whole = stored(stack, second["id"])
        at_store(stack, second["id"], "PUT", whole[: len(whole) // 2])
    resumed(job, here, first)


SIGNED = (  # moto wants a signature, and does not look at it
    "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request,"
    " SignedHeaders=host, Signature=none"
)


def stored(stack, request: str) -> bytes | None:
    """A result as it lies in the object store, or None."""
    try:
        return at_store(stack, request, "GET")
    except urllib.error.HTTPError:
        return None


def at_store(stack, request: str, method: str, data: bytes | None = None) -> bytes:
    address = f"{stack.environment['NDIF_OBJECT_STORE_URL']}/ndif-results/{request}.pt"
    asked = urllib.request.Request(address, data, {"Authorization": SIGNED}, method=method)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return answer.read()


@pytest.mark.parametrize("fault", ["dropped", "cut short"])
def test_answers_that_break_off(fault, stack, job, here):
    """Between two answers, or in the middle of one."""
    broken = iter([False, True, False, True, True])

    def breaks(data: bytes) -> bytes | None:
        if not next(broken, False):
            return data
        return None if fault == "dropped" else data[: len(data) // 2]

    with Relay(fault=breaks) as relay:
        relay.start(stack.published[0])
        on = Server(relay.url, requests=1)
        same(here, finished(lambda: job(on).wait(timeout=60)), 1e-4)


@pytest.mark.parametrize("fault", ["dropped", "cut in a frame"])
@pytest.mark.parametrize("how", ["trace", "Attribute"])
def test_a_websocket_that_is_dropped(how, fault, stack, model):
    """A call that waits at a websocket must end with an error, and the same call again works."""
    seen: list[bytes] = []

    def breaks(data: bytes) -> bytes | None:
        running = any(b"RUNNING" in piece for piece in seen)
        seen.append(data)
        if not running and b"RUNNING" not in data:
            return data
        return None if running or fault == "dropped" else data[: len(data) // 2]

    def call(url: str) -> object:
        if how == "trace":
            return inline(model, sf.Ablate(latents()), Server(url))
        attribute = sf.Attribute(latents(), sf.logit_diff(5, 6), method=sf.attribution.AtP())
        return attribute(model, CHATS, on=Server(url))

    with Relay(fault=breaks) as relay:
        relay.start(stack.published[0])
        ours = sf.errors.RemoteError if how == "Attribute" else WebSocketException
        with pytest.raises(ours, match=r"(?i)connection|closed|websocket"):
            call(relay.url)
    assert any(b"RUNNING" in piece for piece in seen)
    call(stack.url)


def test_the_queue_is_full(model, server):
    """More requests than the server runs at once wait their turn, and come back in order."""
    prompts = [[{"role": "user", "content": f"w{n} w{n + 1}"}] for n in range(5, 45)]
    probe = sf.Probe(latents())
    theirs = sf.run(model, prompts, probe, batch_size=1, on=Server(server.url, requests=40))
    same(sf.run(model, prompts, probe, batch_size=1), theirs, 1e-4)


@pytest.mark.slow
def test_a_sweep_of_200_jobs_outlives_a_restart_of_the_api(stack, model, server, tmp_path):
    """Throttled to 8 at once; the API dies in the middle, and no setting is run twice."""
    chat, probe = CHATS[:1], sf.Probe(latents(2), reduce="max")
    settings = {n / 100: sf.Clamp(latents(), n / 100) | probe for n in range(200)}
    there = Server(server.url, requests=8)

    def arrived() -> int:
        return len(list(tmp_path.glob("*.0.safetensors")))

    def restart() -> None:
        assert eventually(lambda: arrived() > 40, 300)
        stack.stop_api()
        time.sleep(3)
        stack.start_api()

    breaker = threading.Thread(target=restart)
    breaker.start()
    found = finished(lambda: sf.sweep(model, chat, settings, on=there, folder=tmp_path))
    breaker.join()
    for value in (0.0, 0.5, 1.99):
        same(sf.run(model, chat, settings[value]), found[value], 1e-4)
    assert len(found) == 200
