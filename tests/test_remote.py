"""Remotely: the same verbs and results on a server that has nothing of ours installed.

The server's jobs run on NDIF's released code, in an interpreter that cannot import saefeat,
sae_lens, transformer_lens, jaxtyping or beartype, so whatever travels by reference fails here as it
would there.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import json
import pickle
import pickletools

import nnsight
import pytest
import torch
from nnsight import CONFIG
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteError
from nnsight.intervention.interleaver import Mediator
from transformers import Gemma2Config

import loopback
import saefeat as sf
from helpers import BOS, RAGGED, D, batch_of, build, make_sae, tokenizer, unit, wrapped
from saefeat.kernel.program import whole_run
from saefeat.kernel.state import Log, View
from saefeat.remote import Server
from saefeat.remote.batch import embedding
from saefeat.remote.preflight import Capture, parks, tensors
from saefeat.shipping.narrow import narrowed
from saefeat.verbs.lower import lower

NEW = 3
# What holds where a block runs apart from the model holds beside it: the weaker checks are slow.
LOCAL = pytest.param("local", marks=pytest.mark.slow)
BESIDE = pytest.param("server", marks=pytest.mark.slow)


pytestmark = pytest.mark.usefixtures("silent")


@pytest.fixture(scope="module")
def model():
    return wrapped(build("gemma2"))


@pytest.fixture(scope="module")
def boundary(model):
    with loopback.serve(model, sandbox=True, fresh=False) as server:
        yield server


def jumprelu(layer: int = 1) -> sf.Latents:
    return make_sae("jumprelu", f"resid_post.{layer}", layer).latents([3, 40, 17])


def direction(layer: int = 1) -> sf.Direction:
    return sf.Direction(unit(), site=f"resid_post.{layer}")


def values() -> torch.Tensor:
    return torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 4.0], [9.0, 9.0, 9.0]])


VERBS = {
    "ablate": lambda: sf.Ablate(jumprelu()),
    "clamp": lambda: sf.Clamp(jumprelu(), 3.0),
    "chain": lambda: sf.Clamp(jumprelu(0), 3.0) | sf.Probe(jumprelu(1)) | sf.Ablate(jumprelu(2)),
    "probe": lambda: sf.Probe(jumprelu(), where=sf.Tokens.last(2) | sf.Tokens.generated()),
    "largest": lambda: sf.Probe(jumprelu(), reduce="max") | sf.Probe(jumprelu(), reduce="mean"),
    "held": lambda: sf.Clamp(jumprelu(2), 5.0, when=sf.When(direction(0), above=0.2, hold=True)),
    "tokens": lambda: sf.Clamp(jumprelu(), add=2.0, where=~sf.Tokens.first(1) & sf.Tokens.prompt()),
    "special": lambda: sf.Clamp(jumprelu(), add=2.0, where=~sf.Tokens.special()),
    "by prompt": lambda: sf.Clamp(jumprelu(), values()),
    "transcoder": lambda: sf.Clamp(make_sae("transcoder").latents([1, 5]), 4.0),
    "error": lambda: sf.Clamp(
        sf.dictionaries.ErrorTerm(make_sae("jumprelu", "resid_post.1")), scale=0.5
    ),
    "direction": lambda: sf.Ablate(direction()) | sf.Clamp(direction(2), add=3.0),
    "topk": lambda: sf.Ablate(make_sae("topk", "resid_post.1").latents([1, 2, 3])),
    "schedule": lambda: sf.Clamp(jumprelu(), add=sf.values.Schedule([4.0, 2.0, 0.0])),
    "resample": lambda: sf.Ablate(jumprelu(), to=sf.values.Resample(values(), seed=1)),
    "orthogonal": lambda: sf.Ablate(jumprelu().span()),
    "between": lambda: sf.Clamp(sf.Direction(unit(), site="resid_mid.1"), add=3.0),
}


def same_events(mine, theirs) -> None:
    assert (mine is None) == (theirs is None)
    if mine is not None:
        assert mine.sites == theirs.sites and mine.prompts == theirs.prompts
        for name, column in mine.columns().items():
            torch.testing.assert_close(theirs.columns()[name], column, atol=1e-4, rtol=1e-4)


def same_run(here: sf.results.Run, there: sf.results.Run) -> None:
    """Equal in everything a run gives, readings where their mask is true."""
    assert torch.allclose(here.logits, there.logits, atol=1e-4)
    assert here.completions == there.completions
    assert [(r.edit, r.tokens, r.changed) for r in here.receipt.rows] == [
        (r.edit, r.tokens, r.changed) for r in there.receipt.rows
    ]
    assert here.receipt.passes == there.receipt.passes
    for mine, theirs in zip(here.receipt.rows, there.receipt.rows, strict=True):
        same_events(mine.events, theirs.events)
    for a, b in zip(here.readings, there.readings, strict=True):
        assert torch.equal(a.mask, b.mask)
        assert torch.allclose(a.values[a.mask], b.values[b.mask], atol=1e-4)


def same_log(intervention, here, there) -> None:
    mine, theirs = intervention.receipt(here), intervention.receipt(there)
    assert [(r.tokens, r.changed) for r in mine.rows] == [
        (r.tokens, r.changed) for r in theirs.rows
    ]
    for a, b in zip(intervention.readings(here), intervention.readings(there), strict=True):
        assert torch.equal(a.mask, b.mask)
        assert torch.allclose(a.values[a.mask], b.values[b.mask], atol=1e-4)


# ---------------------------------------------------------------- verb x way x server


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("where", [LOCAL, BESIDE, "boundary"])
def test_every_verb_runs_remotely(verb, where, model, server, boundary):
    """run: tokens, logits, readings and receipts as here, over ragged prompts."""
    intervention = VERBS[verb]()
    options = {"max_new_tokens": NEW, "allow_unfired": True}
    here = sf.run(model, RAGGED, intervention, **options)
    there = sf.run(
        model,
        RAGGED,
        intervention,
        on=Server({"local": "local", "server": server.url, "boundary": boundary.url}[where]),
        **options,
    )
    bare = sf.run(model, RAGGED, **options)
    if any(step.change is not None for step in intervention.parts()):
        assert not torch.allclose(here.logits, bare.logits, atol=1e-3)
    same_run(here, there)


def trace(model, batch, intervention, **how):
    bound = intervention.bind(model)
    with torch.no_grad(), model.trace(batch, **how):
        log = nnsight.save(bound(model))
        logits = nnsight.save(model.output.logits.detach())
    return log, logits


def generate(model, batch, intervention, **how):
    bound = intervention.bind(model)
    with model.generate(max_new_tokens=NEW, do_sample=False, **how) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save(bound(model))
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return log, tokens


def session(model, batch, intervention, **how):
    bound = intervention.bind(model)
    with model.session(**how):  # noqa: SIM117  (a trace in a session)
        with model.trace(batch):
            log = nnsight.save(bound(model))
            logits = nnsight.save(model.output.logits.detach())
    return log, logits


def edited(model, batch, intervention, **how):
    copy = sf.edit(model, intervention)
    with torch.no_grad(), copy.trace(batch, **how):
        logits = nnsight.save(copy.output.logits.detach())
    return None, logits


def edited_generation(model, batch, intervention, **how):
    copy = sf.edit(model, intervention)
    with copy.generate(batch, max_new_tokens=NEW, do_sample=False, **how) as tracer:
        tokens = nnsight.save(tracer.result)
    return None, tokens


def by_hand(model, batch, intervention, **how):
    """An edit that the user records, with the intervention named in its block."""
    bound = intervention.bind(model)
    with model.edit() as (_, copy):
        bound(copy)
    with torch.no_grad(), copy.trace(batch, **how):
        logits = nnsight.save(copy.output.logits.detach())
    return None, logits


SEARCH = {"max_new_tokens": 5, "do_sample": False, "num_beams": 4}


def beams(model, batch, intervention, **how):
    bound = intervention.bind(model)
    with model.generate(**SEARCH, **how) as tracer:
        with tracer.invoke(batch):
            nnsight.save(bound(model))
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return tokens


def beams_edited(model, batch, intervention, **how):
    copy = sf.edit(model, intervention)
    with copy.generate(batch, **SEARCH, **how) as tracer:
        tokens = nnsight.save(tracer.result)
    return tokens


WAYS = [trace, generate, session, edited, edited_generation, by_hand]
OFTEN = ["clamp", "held"]
RARELY = [pytest.param(verb, marks=pytest.mark.slow) for verb in VERBS if verb not in OFTEN]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("verb", [*OFTEN, *RARELY])
@pytest.mark.parametrize("where", [LOCAL, "server", "boundary"])
def test_every_way_runs_remotely(way, verb, where, model, server, boundary):
    intervention, batch = VERBS[verb](), batch_of()
    log, values = way(model, batch, intervention)
    remote = {"local": "local", "server": server.url, "boundary": boundary.url}[where]
    their_log, their_values = way(model, batch, intervention, remote=remote)
    assert torch.allclose(values, their_values, atol=1e-4)
    if log is not None:
        same_log(intervention, log, their_log)


def test_each_invoke_has_its_own_edit(model, server):
    def two(**how):
        first, second = sf.Clamp(jumprelu(), 4.0).bind(model), sf.Ablate(direction()).bind(model)
        with torch.no_grad(), model.trace(**how) as tracer:
            with tracer.invoke(RAGGED[0]):
                first(model)
                a = nnsight.save(model.output.logits.detach())
            with tracer.invoke(RAGGED[1]):
                second(model)
                b = nnsight.save(model.output.logits.detach())
        return a, b

    for here, there in zip(two(), two(remote=server.url), strict=True):
        assert torch.allclose(here, there, atol=1e-4)


def test_a_loop_of_ones_own(model, server):
    probe, batch = sf.Probe(jumprelu()).bind(model), batch_of()

    def loop(**how):
        with model.generate(max_new_tokens=NEW, do_sample=False, **how) as tracer:  # noqa: SIM117
            with tracer.invoke(batch):
                logs = nnsight.save([])
                for step in tracer.iter[:NEW]:
                    logs.append(probe(model, step=step))
        return logs

    for here, there in zip(loop(), loop(remote=server.url), strict=True):
        same_log(probe, here, there)


def test_a_held_condition_is_refused_pass_by_pass_there_too(model, server):
    held, batch = VERBS["held"]().bind(model), batch_of()
    with pytest.raises(RemoteError, match="look back over the whole sequence"):  # noqa: SIM117
        with model.generate(max_new_tokens=2, do_sample=False, remote=server.url) as tracer:
            with tracer.invoke(batch):
                for step in tracer.iter[:2]:
                    held(model, step=step)


@pytest.mark.parametrize("way", [beams, beams_edited], ids=lambda way: way.__name__)
@pytest.mark.parametrize("verb", ["held", "clamp"])
def test_beams_are_followed(way, verb, model, server, boundary):
    """A block that runs apart from the model has copies of the cache, whose keys tell as much."""
    intervention, batch = VERBS[verb](), batch_of()
    here = way(model, batch, intervention)
    for there in (server, boundary):
        assert torch.equal(here, way(model, batch, intervention, remote=there.url))


# ---------------------------------------------------------------- what travels


def request_of(model, intervention) -> bytes:
    backend, bound = Capture(), intervention.bind(model)
    with model.trace(batch_of(), backend=backend):
        nnsight.save(bound(model))
    return backend.raw


@pytest.mark.parametrize("verb", VERBS)
def test_only_the_kernel_travels(verb, model):
    raw = request_of(model, VERBS[verb]())
    for name in (b"saefeat.verbs", b"saefeat.latents", b"saefeat.dictionaries", b"jaxtyping"):
        assert name not in raw
    assert b"b_dec" not in raw
    assert sf.remote.preflight(model, RAGGED, VERBS[verb]()).strangers == ()


@pytest.mark.parametrize("verb", VERBS)
def test_every_tensor_owns_its_storage(verb, model):
    """A view would drag its whole matrix over the wire."""
    found = list(tensors(narrowed(lower(VERBS[verb](), model))))
    assert found
    for tensor in found:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("bound", [False, True])
def test_an_intervention_pickles_as_itself_elsewhere(bound, model):
    """Also while a request is being built; and a copy brings no model along."""
    intervention = VERBS["clamp"]()
    named = intervention.bind(model) if bound else intervention
    subjects = {"intervention": named, "latents": jumprelu(), "sae": jumprelu().parts[0][0]}
    copies = []

    class Copies:
        def __reduce__(self):
            for subject in subjects.values():
                copies.append((subject, pickle.loads(pickle.dumps(subject))))
                copies.append((subject, copy.deepcopy(subject)))
            return list, ()

    meddler = Copies()
    with model.trace(batch_of(), backend=Capture()):
        nnsight.save(len(meddler))
    assert len(copies) == 6
    for subject, again in copies:
        assert type(again) is type(subject) and repr(again) == repr(subject)
        assert "_model" not in vars(again)
    assert len(pickle.dumps(named)) == len(pickle.dumps(intervention))
    assert named == intervention and hash(named) == hash(intervention)


@pytest.mark.parametrize("verb", ["clamp", "probe", "chain"])
def test_an_intervention_that_is_not_bound_is_refused_before_anything_is_sent(verb, model, server):
    sent, intervention = len(server.payloads), VERBS[verb]()
    with pytest.raises(sf.errors.RemoteError, match=r"intervention\.bind\(model\)"):  # noqa: SIM117
        with model.trace(batch_of(), remote=server.url):
            nnsight.save(intervention(model))
    assert len(server.payloads) == sent


def test_dictionaries_named_in_a_block_are_refused(model, server):
    latents = jumprelu()
    sae = latents.parts[0][0]
    with pytest.raises(sf.errors.RemoteError, match="before the block"):  # noqa: SIM117
        with model.trace(batch_of(), remote=server.url):
            nnsight.save(len(latents))
    with pytest.raises(sf.errors.RemoteError, match="before the block"):  # noqa: SIM117
        with model.trace(batch_of(), remote=server.url):
            nnsight.save(sae.d_sae)


def test_a_site_the_model_lacks_is_refused_before_anything_is_sent(model, server):
    sent = len(server.payloads)
    deep = sf.Ablate(sf.Direction(unit(), site="resid_post.40"))
    with pytest.raises(sf.errors.SiteError, match="a layer in 0"):
        trace(model, batch_of(), deep, remote=server.url)
    assert len(server.payloads) == sent


def test_results_are_small(model, server):
    """Selected latents at selected tokens come back, counts, and the changes an edit made."""
    probe = sf.Probe(jumprelu(), where=sf.Tokens.last(1)) | sf.Clamp(jumprelu(2), 3.0)
    log, _ = generate(model, batch_of(), probe, remote=server.url)
    assert log["readings"][0].shape == (3, 3)
    assert list(log["view"]) == ["position"]
    assert set(log) == {"passes", "readings", "masks", "fired", "events", "view"}
    changed = log["fired"][1][:, 1].tolist()
    assert [len(seen["changes"]["row"]) for seen in log["events"][1]] == changed
    assert all(tensor.ndim == 1 for seen in log["events"][1] for tensor in seen["changes"].values())
    assert log["fired"][1].shape == (NEW, 3)


def test_halves_are_sent_where_nothing_is_lost(model):
    half = make_sae("jumprelu", "resid_post.1", dtype=torch.bfloat16).latents([3, 4])
    assert "bfloat16" in sf.remote.preflight(model, RAGGED, sf.Ablate(half)).dtypes
    assert sf.remote.preflight(model, RAGGED, sf.Ablate(direction())).dtypes == ("float32",)


def test_the_process_alone(model, server):
    """Serialized, and run in a fresh interpreter, without HTTP."""
    task, sent = {"request": {"model_key": model.to_model_key(), "trusted": True}}, []
    backend, bound = Capture(), VERBS["chain"]().bind(model)
    with model.trace(batch_of(), backend=backend):
        log = nnsight.save(bound(model))  # noqa: F841  (comes back under its name)
    job = {**task, "fault": None}
    assert server.worker.run(job, backend.raw, lambda *what: sent.append(what)) == ""
    (result,) = [data for kind, name, data in sent if name.endswith(".pt")]
    assert "log" in torch.load(io.BytesIO(result), weights_only=False)
    assert [json.loads(data)["status"] for _, name, data in sent if name.endswith(".json")] == [
        "RUNNING",
        "COMPLETED",
    ]


def test_nothing_of_ours_exists_there(model, server):
    with model.session(remote=server.url):
        found = nnsight.save([])
        import importlib

        for name in ("saefeat", "sae_lens", "transformer_lens", "jaxtyping", "beartype"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                found.append(name)
    assert len(found) == 5


# ---------------------------------------------------------------- blocking, polling, async


def test_polling_by_hand(model, server):
    probe, batch = sf.Probe(jumprelu()).bind(model), batch_of()
    with model.trace(batch, remote=server.url, blocking=False) as tracer:
        log = nnsight.save(probe(model))  # noqa: F841  (comes back under its name)
    saved = None
    while saved is None:
        saved = tracer.backend()
    here, _ = trace(model, batch, probe)
    same_log(probe, here, saved["log"])


def test_async_by_hand(model, server):
    probe, batch = sf.Probe(jumprelu()).bind(model), batch_of()
    backend = AsyncRemoteBackend(model.to_model_key(), host=server.url)
    with model.trace(batch, backend=backend):
        log = nnsight.save(probe(model))  # noqa: F841  (comes back under its name)

    async def wait():
        return await backend

    here, _ = trace(model, batch, probe)
    same_log(probe, here, asyncio.run(wait())["log"])


def test_a_submitted_run(model, server):
    intervention = VERBS["chain"]()
    options = {"max_new_tokens": NEW, "batch_size": 1}
    job = sf.remote.submit(
        model, RAGGED, intervention, on=Server(server.url, requests=2), **options
    )
    assert job.in_flight <= 2
    same_run(sf.run(model, RAGGED, intervention, **options), job.wait())
    assert job.statuses == ("COMPLETED",) * 3


def test_a_job_can_be_awaited(model, server):
    async def wait():
        return await sf.remote.submit(model, RAGGED, on=Server(server.url))

    same_run(sf.run(model, RAGGED), asyncio.run(wait()))


def test_values_by_prompt_follow_their_batch(model, server):
    intervention = VERBS["by prompt"]()
    job = sf.remote.submit(model, RAGGED, intervention, on=Server(server.url), batch_size=2)
    same_run(sf.run(model, RAGGED, intervention, batch_size=2), job.wait())


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "fault, said",
    [
        ("fail", "CUDA out of memory"),
        pytest.param("die", "Error submitting request to model", marks=pytest.mark.slow),
        ("truncate", "without a readable result"),
        pytest.param("expire", "without a readable result", marks=pytest.mark.slow),
    ],
)
def test_a_failed_job_is_named_and_sent_again(fault, said, model, server, faulty, tmp_path):
    """One of two batches fails; the same call keeps the other and sends only that one again."""
    file, probe = tmp_path / "job.json", sf.Probe(jumprelu())
    call = lambda: sf.remote.submit(  # noqa: E731
        model, RAGGED, probe, on=Server(server.url), batch_size=2, file=file
    )
    faulty += [None, fault]
    with pytest.raises(sf.errors.RemoteError, match=said):
        call().wait()
    first = call()
    with contextlib.suppress(sf.errors.RemoteError):
        first.wait()
    sent = len(server.payloads)
    same_run(sf.run(model, RAGGED, probe, batch_size=2), call().wait())
    assert len(server.payloads) <= sent  # everything had arrived


def test_a_vanished_job_counts_as_lost(model, server, faulty, tmp_path, monkeypatch):
    monkeypatch.setattr("saefeat.remote.jobs.MISSED", 3)
    file = tmp_path / "job.json"
    faulty += ["vanish"]
    job = sf.remote.submit(model, RAGGED, on=Server(server.url), file=file)
    with pytest.raises(sf.errors.RemoteError, match="unknown to the server"):
        job.wait()
    same_run(
        sf.run(model, RAGGED),
        sf.remote.submit(model, RAGGED, on=Server(server.url), file=file).wait(),
    )


def test_a_job_that_vanishes_ends_a_run(model, server, faulty, monkeypatch):
    monkeypatch.setattr("saefeat.remote.jobs.MISSED", 3)
    faulty += ["vanish"]
    with pytest.raises(sf.errors.RemoteError, match="unknown to the server"):
        sf.run(model, RAGGED, on=Server(server.url))
    same_run(sf.run(model, RAGGED), sf.run(model, RAGGED, on=Server(server.url)))


def test_a_failure_there_is_shown_as_nnsight_shows_it(model, server, faulty):
    faulty += ["fail"]
    with pytest.raises(sf.errors.RemoteError, match="CUDA out of memory"):
        sf.run(model, RAGGED, on=Server(server.url))


def test_a_slow_job_outlives_a_wait(model, faulty, server):
    faulty += ["slow"]
    with server._order:  # no job begins meanwhile, so none is done however slow this machine is
        job = sf.remote.submit(model, RAGGED, on=Server(server.url))
        with pytest.raises(sf.errors.RemoteError, match="not done after"):
            job.wait(timeout=0.2)
    same_run(sf.run(model, RAGGED), job.wait())


def test_a_server_that_is_gone_loses_nothing(model, tmp_path):
    file = tmp_path / "job.json"
    with loopback.serve(model, faults=["slow"], slow=30) as server:
        job = sf.remote.submit(model, RAGGED, on=Server(server.url), file=file)
    with pytest.raises(sf.errors.RemoteError, match="poll again"):
        job.wait()
    assert job.statuses != ("ERROR",)


def test_another_version_is_refused(model):
    with loopback.serve(model, version="0.9.0") as server:
        report = sf.remote.preflight(model, RAGGED, on=Server(server.url))
        assert report.nnsight[1] == "0.9.0"
        with pytest.raises(sf.errors.RemoteError, match=r"below the minimum supported 0\.9\.0"):
            sf.run(model, RAGGED, on=Server(server.url))


def test_job_files_hold_no_key(model, server, tmp_path, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "APIKEY", "secret-key")
    sf.remote.submit(model, RAGGED, on=Server(server.url), file=tmp_path / "job.json").wait()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert not any(b"secret-key" in path.read_bytes() for path in tmp_path.iterdir())


def test_a_job_file_belongs_to_one_run(model, server, tmp_path):
    file = tmp_path / "job.json"
    sf.remote.submit(model, RAGGED, on=Server(server.url), file=file).wait()
    with pytest.raises(sf.errors.RemoteError, match="of another run"):
        sf.remote.submit(model, RAGGED, VERBS["clamp"](), on=Server(server.url), file=file)
    file.write_text("{")
    with pytest.raises(sf.errors.RemoteError, match="not a job file"):
        sf.remote.submit(model, RAGGED, on=Server(server.url), file=file)


def test_a_damaged_result_is_named(model, server, tmp_path):
    file = tmp_path / "job.json"
    sf.remote.submit(model, RAGGED, on=Server(server.url), file=file).wait()
    part = next(tmp_path.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:20])
    with pytest.raises(sf.errors.RemoteError, match="delete it"):
        sf.remote.submit(model, RAGGED, on=Server(server.url), file=file)
    part.unlink()
    same_run(
        sf.run(model, RAGGED),
        sf.remote.submit(model, RAGGED, on=Server(server.url), file=file).wait(),
    )


def test_unknown_faults_are_refused(model):
    with (
        pytest.raises(sf.errors.RemoteError, match="vanish"),
        loopback.serve(model, faults=["explode"]),
    ):
        pass


# ---------------------------------------------------------------- sweeps


def settings() -> dict[float, sf.Intervention]:
    return {value: sf.Clamp(jumprelu(), value) | sf.Probe(jumprelu(2)) for value in (0.0, 2.0, 4.0)}


def test_a_sweep_of_jobs_is_throttled(model, server):
    found = sf.sweep(
        model, RAGGED, settings(), max_new_tokens=NEW, on=Server(server.url, requests=2)
    )
    for value, here in sf.sweep(model, RAGGED, settings(), max_new_tokens=NEW).items():
        same_run(here, found[value])
    assert server.most_at_once <= 2


@pytest.mark.slow
def test_a_sweep_loses_nothing(model, server, faulty, tmp_path):
    """One setting fails: the others arrive, and the same call asks for that one alone."""
    call = {"on": Server(server.url, requests=1), "folder": tmp_path}
    faulty += [None, "fail"]
    with pytest.raises(sf.errors.RemoteError, match=r"(?s)setting 2\.0.*CUDA out of memory"):
        sf.sweep(model, RAGGED, settings(), **call)
    sent = len(server.payloads)
    found = sf.sweep(model, RAGGED, settings(), **call)
    assert len(server.payloads) == sent + 1
    for value, one in settings().items():
        same_run(sf.run(model, RAGGED, one), found[value])


# ---------------------------------------------------------------- every value crosses a process


def test_no_cache_crosses(model, monkeypatch):
    """After the first pass a run on a server reads tokens, not inputs, which hold the cache."""
    seen, value = [], Mediator.value

    def noted(location):
        seen.append(location)
        return value(location)

    monkeypatch.setattr(Mediator, "value", staticmethod(noted))
    intervention = sf.Clamp(jumprelu(), 3.0, where=~sf.Tokens.special()) | sf.Probe(jumprelu(2))
    program = lower(intervention, model).replace(embedding=embedding(model), beside=None)
    logs = []
    for own in (program, program.replace(embedding=None)):
        with model.generate(max_new_tokens=NEW, do_sample=False) as tracer:
            with tracer.invoke(batch_of()):
                log = nnsight.save(Log())
                whole_run(model, own, log)
            with tracer.invoke():
                nnsight.save(tracer.result)
        logs.append(log)
        if own is program:
            assert [place for place in seen if "model.input" in place] == ["model.input"]
    same_log(intervention, *logs)


# ---------------------------------------------------------------- preflight


def test_the_payload_is_what_is_sent(model, server):
    intervention = VERBS["chain"]()
    report = sf.remote.preflight(model, RAGGED, intervention, max_new_tokens=NEW)
    sf.run(model, RAGGED, intervention, max_new_tokens=NEW, on=Server(server.url))
    assert abs(report.payload - server.payloads[-1]) < 100  # compression of the same content
    assert report.parts["inputs"] == sum(t.nbytes for t in batch_of().values())


@pytest.mark.parametrize("verb", ["chain", "probe", "transcoder", "between"])
def test_parks_are_counted(verb, model, monkeypatch):
    intervention, seen = VERBS[verb](), []
    event = Mediator.event

    def counted(kind, location, *rest):
        seen.append(location)
        return event(kind, location, *rest)

    monkeypatch.setattr(Mediator, "event", staticmethod(counted))
    with torch.no_grad(), model.trace(batch_of()):
        intervention(model)
    assert len(seen) == parks(lower(intervention, model))


def test_expected_tokens_are_those_selected(model):
    intervention = VERBS["tokens"]() | VERBS["clamp"]() | VERBS["special"]()
    batch = batch_of([[BOS, 5, 6], [BOS, 7, 8, 9]])
    report = sf.remote.preflight(model, batch, intervention)
    rows = sf.run(model, batch, intervention).receipt.rows
    assert [count for _, count in report.tokens] == [row.tokens for row in rows]


def test_the_limit_names_the_largest_part(model, server):
    with pytest.raises(sf.errors.RemoteError, match="alone is"):
        sf.run(model, RAGGED, sf.Ablate(direction()), on=Server(server.url, payload_limit=1000))


def test_what_travels_by_reference_is_named(model, server):
    import safetensors.torch

    def with_stranger(x):
        return x[..., :2] * len(safetensors.torch.__name__)

    own = sf.dictionaries.Function(with_stranger, torch.randn(2, D), site="resid_post.1", width=D)
    report = sf.remote.preflight(model, RAGGED, sf.Ablate(own))
    assert report.strangers == ("safetensors",)
    with pytest.raises(sf.errors.RemoteError, match="in need of safetensors"):
        sf.run(model, RAGGED, sf.Ablate(own), on=Server(server.url))


def test_functions_of_ones_own_travel(model, server):
    def positive(x):
        return torch.relu(x[..., :2])

    own = sf.dictionaries.Function(positive, torch.randn(2, D), site="resid_post.1", width=D)
    rule = sf.Tokens.where(lambda ids, position: position % 2 == 0)
    intervention = sf.Clamp(own, add=2.0, where=rule)
    here = sf.run(model, RAGGED, intervention)
    same_run(here, sf.run(model, RAGGED, intervention, on=Server(server.url)))


def test_preflight_prints_a_table(model):
    text = str(sf.remote.preflight(model, RAGGED, VERBS["clamp"]()))
    for word in ("payload", "model.layers.1.output", "parks", "nnsight", "would fail"):
        assert word in text


def test_a_model_without_weights(server, tmp_path):
    """The model here is a skeleton; the server has the weights."""
    full = wrapped(build("llama"))
    full._module.save_pretrained(tmp_path)
    full.tokenizer.save_pretrained(tmp_path)
    intervention = sf.Clamp(jumprelu(), 3.0) | sf.Probe(jumprelu(2))
    with loopback.serve(tmp_path) as own:
        bare = nnsight.TransformersModel(
            str(tmp_path), tokenizer=full.tokenizer, task="text-generation"
        )
        there = sf.run(bare, RAGGED, intervention, max_new_tokens=NEW, on=Server(own.url))
    assert next(bare._module.parameters()).device.type == "meta"
    same_run(sf.run(full, RAGGED, intervention, max_new_tokens=NEW), there)


@pytest.mark.slow
def test_twenty_latents_at_26_sites_are_light(tmp_path):
    """DESIGN section 6: 20 latents at 26 sites, d 2304, bf16, in at most 5.2 MB and 64 KB."""
    from saefeat.dictionaries.weights import InMemory

    config = Gemma2Config(num_hidden_layers=26, hidden_size=2304, vocab_size=100)
    config.save_pretrained(tmp_path)
    model = nnsight.TransformersModel(str(tmp_path), tokenizer=tokenizer(), task="text-generation")
    latents = sf.Latents(())
    for layer in range(26):
        shapes = {"W_enc": (2304, 24), "W_dec": (24, 2304), "b_enc": (24,), "b_dec": (2304,)}
        held = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
        held["threshold"] = torch.rand(24).bfloat16()
        own = sf.SAE(InMemory(held), architecture="jumprelu", site=f"resid_post.{layer}")
        latents = latents | own.latents(range(20))
    report = sf.remote.preflight(model, torch.tensor([[1, 2, 3, 4]]), sf.Ablate(latents))
    assert report.dtypes[0] == "bfloat16"
    assert report.payload <= 5.2e6 + 64 * 1024
    assert report.parks == 53


def test_vllm_models_are_refused():
    """Positions would be guessed: a pass there holds the tokens of many requests in one row."""
    kind = type("VLLM", (), {"__module__": "nnsight.modeling.vllm.vllm"})
    with pytest.raises(sf.errors.ModelError, match="vLLM"):
        lower(VERBS["clamp"](), kind())


def code_of(model, intervention) -> tuple[int, bytes]:
    """Bytes of a block's request that are no tensors' storage, and the request."""
    raw = request_of(model, intervention)
    held = [*tensors(lower(intervention, model).visits), *batch_of().values()]
    return len(raw) - sum(tensor.nbytes for tensor in held), raw


def test_only_the_actions_used_travel(model):
    """One ablated latent brings what it needs, and nothing of conditions, probes or attribution."""
    size, raw = code_of(model, sf.Ablate(jumprelu(1)))
    bare = Capture()
    with model.trace(batch_of(), backend=bare):
        nnsight.save(model.output.logits)
    empty = len(bare.raw) - sum(tensor.nbytes for tensor in batch_of().values())
    assert size - empty <= 40_000
    names = {arg for _, arg, _ in pickletools.genops(raw) if isinstance(arg, str)}
    assert {"Program", "Visit", "Read", "Write", "Change"} <= names
    unused = {"Collect", "Test", "Stash", "Show", "Keep", "Split", "LookingBack", "Reselect"}
    unused |= {"ChangeByRow", "Where", "Scheduled", "Pinned", "Drawn"}
    unused |= {"encode_prefix", "matches", "record", "pulled_back"}
    assert not unused & names


def test_nothing_travels_as_bytecode(model):
    """Only this very version of Python could run it; nnsight sends functions as their source."""
    for verb in VERBS.values():
        raw = request_of(model, verb())
        assert b"CodeType" not in raw and b"_make_function" not in raw


def test_looking_into_a_request_leaves_our_classes_alone(model):
    """In one process cloudpickle knows a class by its id, and would fill it with copies."""
    before = dict(vars(View))
    sf.remote.preflight(model, RAGGED, sf.Ablate(jumprelu()))
    assert dict(vars(View)) == before
