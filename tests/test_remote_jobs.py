"""Jobs taken up again from their files, samples and checkpoints on a server, and bad servers."""

from __future__ import annotations

import asyncio
import copy
import json
from dataclasses import replace
from pathlib import Path

import httpx
import nnsight
import pytest
import torch
from nnsight import CONFIG
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.backends.remote import RemoteError as Refused
from nnsight.intervention.interleaver import Mediator
from nnsight.schema.request import RequestModel
from nnsight.tracing import tracer as tracing

import loopback
import saefeat as sf
from helpers import BOS, RAGGED, batch_of, build, make_sae, unit, wrapped
from saefeat.generation import Beams, Greedy, Sample
from saefeat.generation.decoding import decoding
from saefeat.remote import Server
from saefeat.remote.batch import received, remote_batch
from saefeat.remote.preflight import Capture
from saefeat.verbs.lower import lower

NEW = 4
SAMPLE = {"max_new_tokens": NEW, "decode": Sample(1.5, top_k=40, top_p=0.9, seed=3)}


pytestmark = pytest.mark.usefixtures("silent")


@pytest.fixture(scope="module")
def model():
    return wrapped(build("gemma2"))


def jumprelu(layer: int = 1) -> sf.Latents:
    return make_sae("jumprelu", f"resid_post.{layer}", layer).latents([3, 40, 17])


def edits() -> sf.Intervention:
    when = sf.When(sf.Direction(unit(), site="resid_post.0"), above=0.2)
    return sf.Clamp(jumprelu(), 3.0, when=when) | sf.Probe(jumprelu(2), where=sf.Tokens.last(2))


def same_run(here: sf.results.Run, there: sf.results.Run) -> None:
    assert torch.allclose(here.logits, there.logits, atol=1e-4)
    assert here.completions == there.completions and here.texts == there.texts
    assert [(r.edit, r.tokens, r.changed) for r in here.receipt.rows] == [
        (r.edit, r.tokens, r.changed) for r in there.receipt.rows
    ]
    for mine, theirs in zip(here.receipt.rows, there.receipt.rows, strict=True):
        for name, column in mine.events.columns().items():
            torch.testing.assert_close(theirs.events.columns()[name], column, atol=1e-4, rtol=1e-4)
    for a, b in zip(here.readings, there.readings, strict=True):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.starts, b.starts)
        assert torch.allclose(a.values[a.mask], b.values[b.mask], atol=1e-4)


# ---------------------------------------------------------------- from the file and the model alone


def test_a_finished_job_is_loaded_and_asks_nobody(model, server, tmp_path):
    file, options = tmp_path / "job.json", {"max_new_tokens": NEW, "batch_size": 2}
    sf.remote.submit(model, RAGGED, edits(), on=Server(server.url), file=file, **options).wait()
    again = sf.remote.Job.load(file, model, on=Server("http://127.0.0.1:9"))
    assert again.statuses == ("COMPLETED",) * 2
    same_run(sf.run(model, RAGGED, edits(), **options), again.poll())


def test_a_pending_job_is_polled_from_its_file(model, server, faulty, tmp_path):
    faulty += ["slow"]
    file = tmp_path / "job.json"
    sf.remote.submit(model, RAGGED, edits(), on=Server(server.url), file=file)
    sent = len(server.payloads)
    again = sf.remote.Job.load(file, model, on=Server(server.url))
    assert again.in_flight == 1 and again.poll() is None
    same_run(sf.run(model, RAGGED, edits()), again.wait())
    assert len(server.payloads) == sent


def test_a_failed_batch_is_sent_again_from_its_file(model, server, faulty, tmp_path):
    """Values by prompt, a sample and stop tokens too: all that was asked is in the file."""
    values = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 4.0], [9.0, 9.0, 9.0]])
    edit, file = sf.Clamp(jumprelu(), values), tmp_path / "job.json"
    sample = replace(SAMPLE["decode"], stop=[7, 8, 9])
    options = {"max_new_tokens": NEW, "decode": sample, "batch_size": 2}
    faulty += [None, "fail"]
    job = sf.remote.submit(
        model, RAGGED, edit, on=Server(server.url, requests=1), file=file, **options
    )
    with pytest.raises(sf.errors.RemoteError, match="resubmit"):
        job.wait()
    sent = len(server.payloads)
    again = sf.remote.Job.load(file, model, on=Server(server.url))
    assert again.statuses == ("COMPLETED", "ERROR") and "CUDA out of memory" in again.errors[1]
    with pytest.raises(sf.errors.RemoteError, match="CUDA out of memory"):
        again.poll()
    assert len(server.payloads) == sent  # loading and polling send nothing that has failed
    same_run(sf.run(model, RAGGED, edit, **options), again.resubmit().wait())
    assert len(server.payloads) == sent + 1


@pytest.mark.slow
def test_a_skeleton_takes_a_job_up(server, tmp_path):
    full = wrapped(build("llama"))
    full._module.save_pretrained(tmp_path / "model")
    full.tokenizer.save_pretrained(tmp_path / "model")
    bare = nnsight.TransformersModel(
        str(tmp_path / "model"), tokenizer=full.tokenizer, task="text-generation"
    )
    with loopback.serve(tmp_path / "model") as own:
        sf.remote.submit(bare, RAGGED, edits(), on=Server(own.url), file=tmp_path / "job.json")
        there = sf.remote.Job.load(tmp_path / "job.json", bare, on=Server(own.url)).wait()
    assert next(bare._module.parameters()).is_meta
    same_run(sf.run(full, RAGGED, edits()), there)


def odd(ids, position):
    return position % 2 == 1


def even(ids, position):
    return position % 2 == 0


def test_what_a_file_cannot_hold_is_said_and_may_be_given(model, server, tmp_path):
    file, edit = tmp_path / "job.json", sf.Clamp(jumprelu(), 3.0, where=sf.Tokens.where(odd))
    here = sf.remote.submit(model, RAGGED, edit, on=Server(server.url), file=file).wait()
    assert "Tokens.where(odd)" in json.loads(file.read_text())["intervention"]["not kept"]
    with pytest.raises(sf.errors.RemoteError, match=r"no file can hold it.*intervention=\.\.\."):
        sf.remote.Job.load(file, model, on=Server(server.url))
    same_run(here, sf.remote.Job.load(file, model, on=Server(server.url), intervention=edit).wait())
    other = sf.Clamp(jumprelu(), 3.0, where=sf.Tokens.where(even))
    with pytest.raises(sf.errors.RemoteError, match="of another run"):
        sf.remote.Job.load(file, model, on=Server(server.url), intervention=other)


@pytest.mark.slow
def test_two_functions_of_one_name_are_two_runs(model, server, tmp_path):
    """Told apart by their names alone, one's results would be taken for the other's."""
    file = tmp_path / "job.json"

    def parity(n):
        return sf.Clamp(jumprelu(), 3.0, where=sf.Tokens.where(lambda _, at: at % 2 == n))

    first, second = parity(0), parity(1)
    sf.remote.submit(model, RAGGED, first, on=Server(server.url), file=file).wait()
    with pytest.raises(sf.errors.RemoteError, match="of another run"):
        sf.remote.submit(model, RAGGED, second, on=Server(server.url), file=file)


@pytest.mark.slow
def test_files_of_two_jobs_are_apart(model, server, tmp_path):
    """A number behind a dot is no suffix; a result of one job is never one of another."""
    jobs = {v: sf.Clamp(jumprelu(), v) for v in (0.5, 0.7)}
    for value, edit in jobs.items():
        sf.remote.submit(
            model, RAGGED, edit, on=Server(server.url), file=tmp_path / f"exp-{value}"
        ).wait()
    for value, edit in jobs.items():
        again = sf.remote.Job.load(tmp_path / f"exp-{value}", model, on=Server(server.url))
        same_run(sf.run(model, RAGGED, edit), again.poll())
    (tmp_path / "exp-0.7.0.safetensors").replace(tmp_path / "exp-0.5.0.safetensors")
    with pytest.raises(sf.errors.RemoteError, match="of another job"):
        sf.remote.Job.load(tmp_path / "exp-0.5", model, on=Server(server.url))


@pytest.mark.parametrize(
    "on",
    [lambda: Server("local"), lambda: None, lambda: Server("127.0.0.1:80"), lambda: "http://x"],
)
def test_a_job_needs_a_server(on, model):
    with pytest.raises(sf.errors.RemoteError, match="http://"):
        sf.remote.submit(model, RAGGED, on=on())


@pytest.mark.parametrize(
    "wrong",
    [{"url": False}, {"requests": 0}, {"payload_limit": 1.5}, {"dtype": torch.int8}],
)
def test_a_server_checks_what_it_is_given(wrong):
    with pytest.raises(sf.errors.RemoteError, match=f"`{next(iter(wrong))}`"):
        Server(**wrong)


def test_an_edited_copy_has_no_file(model, server, tmp_path):
    copy = sf.edit(model, sf.Ablate(jumprelu()))
    with pytest.raises(sf.errors.ModelError, match="edited copy"):
        sf.remote.submit(copy, RAGGED, on=Server(server.url), file=tmp_path / "job.json")


def test_a_file_is_there_before_anything_is_sent(model, server, tmp_path):
    """So that a job whose first request fails can be taken up as well."""
    file = tmp_path / "job.json"
    with pytest.raises(sf.errors.RemoteError, match="not answered"):
        sf.remote.submit(model, RAGGED, edits(), on=Server("http://127.0.0.1:9"), file=file)
    again = sf.remote.Job.load(file, model, on=Server("http://127.0.0.1:9"))
    assert again.statuses == ("new",)


# ---------------------------------------------------------------- files that are not to be trusted


@pytest.fixture(scope="module")
def finished(model, server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    sf.remote.submit(model, RAGGED, edits(), on=Server(server.url), file=folder / "job.json").wait()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(finished, tmp_path, **changed) -> Path:
    for name, data in finished.items():
        (tmp_path / name).write_bytes(data)
    head = json.loads(finished["job.json"]) | changed
    (tmp_path / "job.json").write_text(json.dumps(head))
    return tmp_path / "job.json"


HOSTILE = {
    "batches": [{"id": "../../admin", "status": "RUNNING", "error": ""}],
    "version": 99,
    "fingerprint": 3,
    "model": "another:model",
    "call": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_changed_file_is_refused(name, finished, model, server, tmp_path):
    file = written(finished, tmp_path, **{name: HOSTILE[name]})
    with pytest.raises(sf.errors.RemoteError, match=r"job.json|Job\.load"):
        sf.remote.Job.load(file, model, on=Server(server.url))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "saefeat-job"}', "\x00", "null"])
def test_what_is_no_job_file_is_refused(text, model, tmp_path):
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(sf.errors.RemoteError, match="not a job file"):
        sf.remote.Job.load(tmp_path / "job.json", model, on=Server())
    with pytest.raises(sf.errors.RemoteError, match="not a job file"):
        sf.remote.Job.load(tmp_path / "missing.json", model, on=Server())


@pytest.mark.parametrize("name", ["job.prompts.json", "job.edits.safetensors"])
def test_files_beside_it_belong_to_it(name, finished, model, server, tmp_path):
    file = written(finished, tmp_path)
    with (tmp_path / name).open("ab") as beside:
        beside.write(b" ")
    with pytest.raises(sf.errors.RemoteError, match=f"{name} is changed"):
        sf.remote.Job.load(file, model, on=Server(server.url))
    (tmp_path / name).unlink()
    with pytest.raises(sf.errors.RemoteError, match=f"{name} is missing"):
        sf.remote.Job.load(file, model, on=Server(server.url))


def test_a_file_does_not_say_where_the_key_goes(finished, model, server, tmp_path, monkeypatch):
    """Polling sends the key, and nnsight unpickles what comes back."""
    file = written(finished, tmp_path, host="http://somewhere.else")
    with pytest.raises(
        sf.errors.RemoteError, match=r"on=Server\('http://somewhere.else'\)\), if you trust"
    ):
        sf.remote.Job.load(file, model)
    monkeypatch.setattr(CONFIG.API, "HOST", "http://somewhere.else")
    assert sf.remote.Job.load(file, model).statuses == ("COMPLETED",)


# ---------------------------------------------------------------- a server that answers oddly


@pytest.fixture(scope="module")
def saved(model):
    """What a server would have sent, for ``edits`` and two new tokens."""
    settings = decoding(model, max_new_tokens=2)
    return remote_batch(model, lower(edits(), model), batch_of(), settings, remote="local")[0]


def spoiled(monkeypatch, change) -> None:
    """Every result passes through ``change`` on its way here."""
    plain = RemoteBackend.finalize

    def finalize(self, content):
        found = plain(self, content)
        change(found["saved"])
        return found

    monkeypatch.setattr(RemoteBackend, "finalize", finalize)


def cut(name, group=None, number=None):
    def change(saved):
        place, key = (saved["log"][group], number) if group else (saved, name)
        place[key] = place[key][:-1]

    return change


def later(saved):
    saved["tokens"] = saved["tokens"].roll(1, 0)


def other_view(saved):
    saved["log"]["view"] = {"position": saved["log"]["view"]["position"].float()}


def outside(saved):
    saved["log"]["events"][0][0]["changes"]["row"] += 3


def unasked(saved):
    saved["log"]["readings"][9] = torch.zeros(1, 3)


def gone(saved):
    saved.clear()


GARBAGE = {
    "fewer tokens": (cut("tokens"), "tokens"),
    "fewer logits": (cut("logits"), "logits"),
    "fewer readings": (cut("", "readings", 1), "readings"),
    "another mask": (cut("", "masks", 1), "a mask"),
    "fewer counts": (cut("", "fired", 0), "counts"),
    "other prompts": (later, "do not begin with the prompts"),
    "positions": (other_view, "positions"),
    "events": (outside, "outside"),
    "a step nobody asked for": (unasked, "readings of steps"),
    "nothing": (gone, "a log, tokens and logits"),
    "no place": (lambda saved: saved.pop("where"), "where it ran"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_a_result_that_does_not_fit_is_no_result(case, saved):
    change, said = GARBAGE[case]
    assert received(saved, edits(), batch_of(), 2)
    bad = copy.deepcopy(saved)
    change(bad)
    with pytest.raises(sf.errors.RemoteError, match=f"(?s)a server whose result has.*{said}"):
        received(bad, edits(), batch_of(), 2)


def test_run_holds_results_against_what_it_asked(model, server, monkeypatch):
    spoiled(monkeypatch, later)
    with pytest.raises(sf.errors.RemoteError, match="do not begin with the prompts"):
        sf.run(model, RAGGED, on=Server(server.url))


def test_a_result_that_does_not_fit_is_asked_for_again(model, server, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        spoiled(patch, later)
        job = sf.remote.submit(
            model, RAGGED, edits(), on=Server(server.url), file=tmp_path / "job.json"
        )
        with pytest.raises(sf.errors.RemoteError, match="do not begin with the prompts"):
            job.wait()
    assert not list(tmp_path.glob("*.0.safetensors"))
    same_run(sf.run(model, RAGGED, edits()), job.resubmit().wait())


def test_completed_without_a_result_is_an_error(model, server, monkeypatch):
    """It was polled for ever."""
    job = sf.remote.submit(model, RAGGED, on=Server(server.url))
    monkeypatch.setattr(RemoteBackend, "download_result", lambda *_: None)
    with pytest.raises(sf.errors.RemoteError, match="completed without a result"):
        job.wait(timeout=600)


@pytest.mark.parametrize("code", [401, 429, 503])
def test_a_refusal_to_answer_loses_nothing(code, model, server, monkeypatch):
    """A busy server, a bad gateway or a missing key says nothing of the job."""
    job = sf.remote.submit(model, RAGGED, on=Server(server.url))
    plain = httpx.Client.get
    monkeypatch.setattr(
        httpx.Client,
        "get",
        lambda self, url, **_: httpx.Response(code, request=httpx.Request("GET", url)),
    )
    with pytest.raises(sf.errors.RemoteError, match="not answered"):
        job.poll()
    monkeypatch.setattr(httpx.Client, "get", plain)
    same_run(sf.run(model, RAGGED), job.wait())


@pytest.mark.slow
def test_a_sweep_outlives_a_server_that_is_busy(model, server, monkeypatch):
    settings = {v: sf.Clamp(jumprelu(), v) for v in (0.0, 2.0)}
    plain, refused = RemoteBackend._post, iter([True, False, True])

    def post(self, *args):
        if next(refused, False):
            raise Refused("Failed to send request: 503")
        return plain(self, *args)

    monkeypatch.setattr(RemoteBackend, "_post", post)
    found = sf.sweep(model, RAGGED, settings, on=Server(server.url, requests=1))
    for value, edit in settings.items():
        same_run(sf.run(model, RAGGED, edit), found[value])


def test_a_sweep_gives_up_on_a_server_that_is_gone(model, server, monkeypatch):
    monkeypatch.setattr("saefeat.remote.scheduler.STRIKES", 2)
    settings = {v: sf.Clamp(jumprelu(), v) for v in (0.0, 2.0)}
    with pytest.raises(sf.errors.RemoteError, match="2 of 2 settings failed"):
        sf.sweep(model, RAGGED, settings, on=Server("http://127.0.0.1:9"))


def test_a_setting_that_cannot_be_sent_does_not_stop_the_others(model, server, tmp_path):
    settings = {"well": sf.Clamp(jumprelu(), 2.0)}
    settings["deep"] = sf.Ablate(sf.Direction(unit(), site="resid_post.40"))
    with pytest.raises(sf.errors.RemoteError, match=r"(?s)1 of 2.*setting 'deep'.*a layer in 0"):
        sf.sweep(model, RAGGED, settings, on=Server(server.url), folder=tmp_path)
    there = sf.remote.Job.load(tmp_path / "00000.json", model, on=Server(server.url)).poll()
    same_run(sf.run(model, RAGGED, settings["well"]), there)


def test_a_sweeps_requests_have_a_limit(model, server):
    settings = {v: sf.Clamp(jumprelu(), v) for v in (0.0, 2.0)}
    with pytest.raises(sf.errors.RemoteError, match=r"payload_limit` is 100 bytes"):
        sf.sweep(model, RAGGED, settings, on=Server("http://127.0.0.1:9", payload_limit=100))


def test_an_edit_that_never_fired_is_named_by_its_setting(model, server):
    settings = {"never": sf.Clamp(jumprelu(), 2.0, where=sf.Tokens.ids(99)), "bare": None}
    with pytest.raises(sf.errors.FiringError, match=r"(?s)setting 'never'.*selected no token"):
        sf.sweep(model, RAGGED, settings, on=Server(server.url))


# ---------------------------------------------------------------- samples, stops, checkpoints


@pytest.mark.slow
def test_samples_are_those_of_a_run_here(model, server):
    options = {**SAMPLE, "batch_size": 2}
    here = sf.run(model, RAGGED, edits(), **options)
    assert here.completions != sf.run(model, RAGGED, edits(), max_new_tokens=NEW).completions
    same_run(here, sf.run(model, RAGGED, edits(), on=Server(server.url), **options))
    same_run(
        here, sf.remote.submit(model, RAGGED, edits(), on=Server(server.url), **options).wait()
    )
    assert here.provenance.generation["seed"] == 3


def test_a_sample_that_the_seed_did_not_make_is_refused(model, monkeypatch):
    """Where the block runs apart from the model, seeding it there would change nothing."""
    monkeypatch.setattr(torch, "multinomial", lambda probs, **_: probs.argmax(-1, keepdim=True))
    with pytest.raises(sf.SaefeatError, match="process of their own"):
        sf.run(model, RAGGED, on=Server("local"), **SAMPLE)


@pytest.mark.slow  # it starts a server of its own
def test_a_sample_is_right_or_refused_where_values_are_copied(model):
    """Never a sample that only looks like one from the seed."""
    here = sf.run(model, RAGGED, edits(), **SAMPLE)
    with loopback.serve(model, sandbox=True) as boundary:
        try:
            there = sf.run(model, RAGGED, edits(), on=Server(boundary.url), **SAMPLE)
        except sf.errors.RemoteError as error:
            assert "process of their own" in str(error)
        else:
            same_run(here, there)


def test_generators_are_left_as_they_were(model):
    state = torch.get_rng_state()
    sf.run(model, RAGGED, on=Server("local"), **SAMPLE)
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_tokens_end_a_completion_there(model, server):
    free = sf.run(model, RAGGED, edits(), max_new_tokens=NEW)
    stop = [free.completions[0][1], free.completions[1][0]]
    options = {"max_new_tokens": NEW, "decode": Greedy(stop=stop)}
    here = sf.run(model, RAGGED, edits(), **options)
    assert here.completions != free.completions
    same_run(here, sf.run(model, RAGGED, edits(), on=Server(server.url), **options))


def test_a_checkpoint_keeps_batches_from_a_server(model, server, faulty, tmp_path):
    options = {"max_new_tokens": 2, "batch_size": 2, "on": Server(server.url)}
    faulty += [None, "fail"]
    with pytest.raises(sf.errors.RemoteError, match="CUDA out of memory"):
        sf.run(model, RAGGED, edits(), checkpoint=tmp_path / "run", **options)
    sent = len(server.payloads)
    there = sf.run(model, RAGGED, edits(), checkpoint=tmp_path / "run", **options)
    assert len(server.payloads) == sent + 1
    same_run(sf.run(model, RAGGED, edits(), max_new_tokens=2, batch_size=2), there)
    with pytest.raises(sf.errors.CheckpointError, match="differs in"):  # not those of a run here
        sf.run(model, RAGGED, edits(), checkpoint=tmp_path / "run", max_new_tokens=2, batch_size=2)


def test_a_call_that_ran_out_of_time_takes_its_requests_up(model, server, faulty, tmp_path):
    """Nothing is sent twice: ids of what is under way lie in the checkpoint's folder."""
    faulty += ["slow", "slow"]
    hasty = Server(server.url, timeout=2)
    with pytest.raises(sf.errors.RemoteError, match=r"the same call again.*requests\.json"):
        sf.run(model, RAGGED, edits(), batch_size=2, on=hasty, checkpoint=tmp_path / "c")
    sent = len(server.payloads)
    patient = Server(server.url)
    there = sf.run(model, RAGGED, edits(), batch_size=2, on=patient, checkpoint=tmp_path / "c")
    same_run(sf.run(model, RAGGED, edits(), batch_size=2), there)
    assert len(server.payloads) == sent
    assert json.loads((tmp_path / "c" / "requests.json").read_text())["requests"] == {}


@pytest.mark.slow
def test_requests_that_the_server_has_forgotten_are_sent_again(model, server, faulty, tmp_path):
    faulty += ["slow", "slow"]
    folder = tmp_path / "c"
    with pytest.raises(sf.errors.RemoteError, match=r"requests\.json"):
        sf.run(model, RAGGED, batch_size=2, on=Server(server.url, timeout=2), checkpoint=folder)
    said = json.loads((folder / "requests.json").read_text())
    said["requests"] = {number: "0" * 32 for number in said["requests"]}
    (folder / "requests.json").write_text(json.dumps(said))
    there = sf.run(model, RAGGED, batch_size=2, on=Server(server.url), checkpoint=folder)
    assert torch.allclose(there.logits, sf.run(model, RAGGED).logits, atol=1e-4)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "saefeat-requests"}'])
def test_a_broken_list_of_requests_costs_no_result(text, model, server, tmp_path):
    there = Server(server.url)
    sf.run(model, RAGGED[:1], on=there, checkpoint=tmp_path / "c")
    (tmp_path / "c" / "requests.json").write_text(text)
    for batch in (tmp_path / "c").glob("batch-*"):
        batch.unlink()
    again = sf.run(model, RAGGED[:1], on=there, checkpoint=tmp_path / "c")
    assert torch.allclose(again.logits, sf.run(model, RAGGED[:1]).logits, atol=1e-4)


WAITING = {
    "run": lambda model, on: sf.run(model, RAGGED, on=on),
    "submit": lambda model, on: sf.remote.submit(model, RAGGED, on=on).wait(),
    "await": lambda model, on: asyncio.run(awaited(sf.remote.submit(model, RAGGED, on=on))),
    "sweep": lambda model, on: sf.sweep(model, RAGGED, {1: edits()}, on=on),
    "Attribute": lambda model, on: sf.Attribute(jumprelu(), METRIC)(model, RAGGED, on=on),
}
METRIC = sf.logit_diff(3, 5)


async def awaited(job):
    return await job


FIRST = ("await", "Attribute")  # the others share their code, and take another ten seconds
LATER = [pytest.param(name, marks=pytest.mark.slow) for name in WAITING if name not in FIRST]


@pytest.mark.parametrize("name", [*FIRST, *LATER])
def test_every_call_that_waits_has_a_limit(name, model, server, faulty):
    faulty += ["slow"]
    with pytest.raises(sf.errors.RemoteError, match=r"(not done|without a result|left) after 2 s"):
        WAITING[name](model, Server(server.url, timeout=2))


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), 1e300, True, "5"])
def test_a_limit_is_seconds(timeout, model, server):
    with pytest.raises(sf.errors.SaefeatError, match="`timeout` is"):
        Server(server.url, timeout=timeout)


def test_a_connection_that_is_lost_is_told(model, server, faulty):
    faulty += ["vanish"]
    attribute = sf.Attribute(jumprelu(), sf.logit_diff(3, 5))
    with pytest.raises(sf.errors.RemoteError, match="connection was lost"):
        attribute(model, RAGGED, on=Server(server.url))


# ---------------------------------------------------------------- where it was made


def test_a_result_says_where_it_was_made(model, tmp_path):
    """It described the client: float32 on cpu, for a deployment in bfloat16."""
    with loopback.serve(model, dtype="bfloat16") as half:
        there, folder = Server(half.url), tmp_path / "c"
        out = sf.run(model, RAGGED, edits(), batch_size=2, on=there, checkpoint=folder)
        restored = sf.run(model, RAGGED, edits(), batch_size=2, on=there, checkpoint=folder)
        job = sf.remote.submit(model, RAGGED, edits(), on=there, file=tmp_path / "job.json")
        job.wait()
        loaded = sf.remote.Job.load(tmp_path / "job.json", model, on=there).wait()
        scores = sf.Attribute(jumprelu(), sf.logit_diff(3, 5))(model, RAGGED, on=there)
    for origin in (x.provenance for x in (out, restored, loaded, scores)):
        assert (origin.dtype, origin.device) == ("bfloat16", "cpu")
        assert origin.server["url"] == half.url and origin.server["torch"] == torch.__version__
        assert f"bfloat16 on cpu at {half.url}" in origin.line
        assert sf.results.Provenance.from_dict(origin.to_dict()) == origin
    here = sf.run(model, RAGGED)
    assert here.provenance.server == {} and here.provenance.dtype == "float32"


def test_preflight_warns_of_another_dtype(model, server, monkeypatch):
    key = model.to_model_key()
    answers = {"env": {"packages": {"nnsight": "0.8.1"}}}
    answers["status"] = {"deployments": {"a": {"model_key": key, "dtype": "bfloat16"}, "b": {}}}

    def get(address, **_):
        request = httpx.Request("GET", address)
        return httpx.Response(200, json=answers[address.rpartition("/")[2]], request=request)

    monkeypatch.setattr(httpx, "get", get)
    with pytest.warns(UserWarning, match="float32 here and bfloat16 on the server"):
        report = sf.remote.preflight(model, RAGGED, edits(), on=Server(server.url))
    assert report.dtype == ("float32", "bfloat16") and "bfloat16 there" in str(report)
    answers["status"] = {"deployments": None}
    assert sf.remote.preflight(model, RAGGED, on=Server(server.url)).dtype == ("float32", None)


def test_a_model_has_the_name_that_it_is_given(monkeypatch):
    """The Hub was asked for the name of a private model, and of one in memory."""
    monkeypatch.setattr(nnsight.modeling.huggingface, "_ID_CACHE", {})
    nn = wrapped(build("llama"))
    assert sf.remote.named(nn, "my-lab/private", revision="v2") is nn
    assert nn.to_model_key().endswith(
        '{"repo_id": "my-lab/private", "revision": "v2", "task": "text-generation"}'
    )
    assert sf.run(nn, RAGGED, on=Server("local")).logits.shape[0] == len(RAGGED)
    assert "/home/me/model" in sf.remote.named(nn, "/home/me/model").to_model_key()
    for wrong in ("", "https://x/y", "a b", "a//b", "org/"):
        with pytest.raises(sf.errors.RemoteError, match="named: `repository`"):
            sf.remote.named(nn, wrong)


def test_nothing_new_is_sent_after_a_failure(model, server, faulty):
    faulty += ["fail"]
    sent = len(server.payloads)
    with pytest.raises(sf.errors.RemoteError, match="CUDA out of memory"):
        sf.run(model, RAGGED, on=Server(server.url, requests=1), batch_size=1)
    assert len(server.payloads) == sent + 1


@pytest.mark.parametrize("url", ["local", None])
def test_a_stream_sends_a_request_when_it_is_its_turn(url, model, server):
    """Values by prompt and samples go by a prompt's number in the whole list."""
    values = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 4.0], [9.0, 9.0, 9.0]])
    edit, options = sf.Clamp(jumprelu(), values), {**SAMPLE, "batch_size": 2}
    sent, taken = len(server.payloads), []
    prompts = (taken.append(prompt) or prompt for prompt in RAGGED)
    on = Server(url or server.url)
    parts = sf.run(model, prompts, edit, on=on, **options, stream=True)
    assert len(server.payloads) == sent and not taken
    first = next(parts)
    assert len(taken) == 2 and len(server.payloads) == sent + (url is None)
    here = sf.run(model, RAGGED, edit, **options)
    assert first.completions + next(parts).completions == here.completions


def test_beams_are_refused_and_say_why(model, server):
    with pytest.raises(sf.errors.RemoteError, match="key-value cache"):
        sf.run(model, RAGGED, on=Server("http://127.0.0.1:9"), max_new_tokens=2, decode=Beams(2))


def test_a_checkpoint_that_searches_beams_of_itself_does_not(server):
    """Its own settings would apply on a server, where nothing spelled out another number."""
    own = wrapped(build("gemma2"))
    here = sf.run(own, RAGGED, edits(), max_new_tokens=NEW)
    own._module.generation_config.num_beams = 3
    same_run(here, sf.run(own, RAGGED, edits(), max_new_tokens=NEW, on=Server("local")))


# ---------------------------------------------------------------- what crosses at each pass


def executed(model, raw: bytes, monkeypatch) -> tuple[list[str], dict]:
    """A request run as a server's worker does: the places its block reads or writes, its saves."""
    seen, event = [], Mediator.event

    def noted(kind, location, *rest):
        seen.append(location)
        return event(kind, location, *rest)

    tracer = RequestModel.deserialize(raw, model._remoteable_persistent_objects())
    tracing.inc()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Mediator, "event", staticmethod(noted))
            tracer.execute(tracer.info.code)
        held = tracer.info.frame.f_locals
        return seen, {name: v for name, v in held.items() if id(v) in tracing._saves()}
    finally:
        tracing.dec()


def generated(way, model, edit, **how):
    """An intervention in a generation of the user's own: in its block, or carried by a copy."""
    own, inline = sf.edit(model, edit) if way == "edited" else model, way == "inline"
    edit = edit.bind(model)
    with own.generate(max_new_tokens=NEW, do_sample=False, **how) as tracer:
        with tracer.invoke(batch_of()):
            log = nnsight.save(edit(own) if inline else {})
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return {"log": log, "tokens": tokens} if not how else {}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["inline", "edited"])
def test_no_cache_crosses_in_a_users_own_block(way, model, monkeypatch):
    """After the first pass only the new tokens are read, not the inputs, which hold the cache."""
    edit, backend = sf.Clamp(jumprelu(), 3.0, where=~sf.Tokens.special()), Capture()
    here = generated(way, model, edit)
    generated(way, model, edit, backend=backend)
    seen, there = executed(model, backend.raw, monkeypatch)
    assert seen.count("model.input") == 1
    assert sum("embed_tokens" in place for place in seen) >= NEW - 1
    assert torch.equal(here["tokens"], there["tokens"])
    if way == "inline":
        mine, theirs = (edit.receipt(run["log"]) for run in (here, there))
        assert mine.rows[0].tokens == theirs.rows[0].tokens > 13


@pytest.mark.slow
def test_a_program_for_another_model_is_refused_there(model, monkeypatch):
    """It would run, where the two models are alike, with the other's special tokens."""
    other, backend, batch = wrapped(build("gemma2")), Capture(), batch_of()
    monkeypatch.setattr(other, "repo_id", "somebody/another-model")
    bound = sf.Clamp(jumprelu(), 3.0).bind(other)
    with model.trace(batch, backend=backend):
        nnsight.save(bound(model))
    with pytest.raises(sf.SaefeatError, match="bound to the model somebody/another-model"):
        executed(model, backend.raw, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("hold", [False, True])
def test_guessed_tokens_are_refused_there(hold, model, monkeypatch):
    when = sf.When(sf.Direction(unit(), site="resid_post.0"), above=0.2, hold=hold)
    bound, backend = sf.Clamp(jumprelu(), 3.0, when=when).bind(model), Capture()
    options = {"max_new_tokens": NEW, "do_sample": False, "prompt_lookup_num_tokens": 2}
    with model.generate(batch_of([[BOS, 5, 6, 5, 6, 5]]), backend=backend, **options):
        nnsight.save(bound(model))
    with pytest.raises(ValueError, match="guess"):
        executed(model, backend.raw, monkeypatch)


def test_a_prompt_fed_in_chunks_is_refused_there(model, monkeypatch):
    """Several tokens behind the first pass may be guesses that are taken back."""
    edit, backend = sf.Clamp(jumprelu(), 3.0), Capture()
    generated("inline", model, edit, backend=backend, prefill_chunk_size=2)
    with pytest.raises(ValueError, match=r"feeds \d tokens behind the first pass"):
        executed(model, backend.raw, monkeypatch)
