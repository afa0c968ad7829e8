"""Long audits: interrupted anywhere, they go on where they stopped, and only as the same job."""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, build, make_sae, wrapped
from saefeat.metrics.evaluator import Evaluator

METRIC = sf.logit_diff([5, 9], 7)
FIELDS = {
    "audit": ("effects", "estimates"),
    "faithfulness": ("clean", "empty", "marginals", "kept", "removed"),
    "minimal_set": ("metric", "without", "clean"),
    "interactions": ("pairs", "alone", "clean"),
}
EACH = pytest.mark.parametrize("name", FIELDS)


@pytest.fixture(scope="module")
def jobs():
    """name → a small job of each kind; every piece is one pass, also of a set of many prompts."""
    nn, sae = wrapped(build("llama")), make_sae("standard")
    attribute = sf.Attribute(sae, METRIC)
    scores = attribute(nn, RAGGED)
    top = scores.top(4)
    ends = [sf.metrics.measure(nn, RAGGED, METRIC, edit).mean() for edit in (None, sf.Ablate(top))]
    holds = float(sum(ends) / 2)
    given = (attribute, nn, RAGGED, scores)

    def minimal(**options):
        return sf.validation.minimal_set(nn, RAGGED, top, METRIC, **{"holds": holds, **options})

    return {
        "audit": lambda **options: sf.audit(*given, **{"budget": 6, "batch_size": 4, **options}),
        "faithfulness": lambda **options: sf.validation.faithfulness(
            *given, **{"sizes": [1, 2], "controls": 1, "batch_size": 2, **options}
        ),
        "minimal_set": lambda **options: minimal(**{"batch_size": 6, **options}),
        "interactions": lambda **options: sf.validation.interactions(
            nn, RAGGED, top, METRIC, **{"batch_size": 6, **options}
        ),
    }


class Runs:
    """Counts passes, and breaks off after ``stop`` of them."""

    def __init__(self, monkeypatch) -> None:
        self.count, self.stop = 0, None
        run = Evaluator.forward

        def spy(watch, *args, **options):
            if self.count == self.stop:
                raise KeyboardInterrupt
            self.count += 1
            return run(watch, *args, **options)

        monkeypatch.setattr(Evaluator, "forward", spy)

    def of(self, call):
        """How many passes a call makes, and what it gives."""
        self.count, self.stop = 0, None
        found = call()
        return self.count, found


def flat(found, name) -> list[torch.Tensor]:
    value = getattr(found, name)
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, tuple) else [value]


def same(name, first, second) -> bool:
    pairs = [
        pair for f in FIELDS[name] for pair in zip(flat(first, f), flat(second, f), strict=True)
    ]
    return all(torch.equal(a, b) for a, b in pairs)


@EACH
def test_an_interrupted_call_goes_on_where_it_stopped(name, jobs, tmp_path, monkeypatch):
    runs, job = Runs(monkeypatch), jobs[name]
    total, whole = runs.of(job)
    assert total > 4
    for stop in (1, total // 2, total - 1):
        folder = tmp_path / str(stop)
        runs.count, runs.stop = 0, stop
        with pytest.raises(KeyboardInterrupt):
            job(checkpoint=folder)
        assert len(list(folder.glob("*.safetensors"))) == stop, "nothing finished is lost"
        left, found = runs.of(lambda folder=folder: job(checkpoint=folder))
        assert left == total - stop and same(name, whole, found)
        left, found = runs.of(lambda folder=folder: job(checkpoint=folder))
        assert left == 0 and same(name, whole, found)


@EACH
def test_a_damaged_batch_is_made_again(name, jobs, tmp_path, monkeypatch):
    runs, job = Runs(monkeypatch), jobs[name]
    whole = job(checkpoint=tmp_path)
    damaged = tmp_path / "batch-000002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="damaged"):
        again, found = runs.of(lambda: job(checkpoint=tmp_path))
    assert again == 1 and same(name, whole, found)


@pytest.mark.parametrize(
    ("name", "other", "differs"),
    [
        ("audit", {"budget": 8}, "budget"),
        ("audit", {"k": 2}, "k"),
        ("audit", {"seed": 1}, "seed"),
        ("audit", {"batch_size": 5}, "batch_size"),
        ("faithfulness", {"to": "mean"}, "to"),
        ("faithfulness", {"controls": 2}, "controls"),
        ("faithfulness", {"sizes": [1, 3]}, "sizes"),
        ("minimal_set", {"holds": lambda m: m > 0}, "holds"),
        ("minimal_set", {"where": sf.Tokens.last(1)}, "tokens"),
        ("interactions", {"where": sf.Tokens.last(1)}, "tokens"),
        ("interactions", {"baseline": sf.Ablate(make_sae("standard").latents([3]))}, "baseline"),
    ],
    ids=lambda part: part if isinstance(part, str) else "-".join(part),
)
def test_another_job_is_refused_before_any_run(name, other, differs, jobs, tmp_path, monkeypatch):
    jobs[name](checkpoint=tmp_path)
    monkeypatch.setattr(Evaluator, "forward", lambda *_, **__: pytest.fail("a run was made"))
    with pytest.raises(sf.errors.CheckpointError, match=f"{name}.*differs in .*{differs}"):
        jobs[name](checkpoint=tmp_path, **other)


def test_an_edit_that_never_acted_is_refused_after_a_restart_too(tmp_path):
    nn, top = wrapped(build("llama")), make_sae("standard").latents([3, 5])
    never = {"where": sf.Tokens.ids(2), "batch_size": 6, "checkpoint": tmp_path}
    for _ in range(2):
        with pytest.raises(sf.errors.FiringError, match="interactions"):
            sf.validation.interactions(nn, RAGGED, top, METRIC, **never)


def test_one_kind_of_job_is_not_another(jobs, tmp_path):
    jobs["interactions"](checkpoint=tmp_path)
    with pytest.raises(sf.errors.CheckpointError, match="job was 'interactions', is 'minimal_set'"):
        jobs["minimal_set"](checkpoint=tmp_path)


def test_a_folder_that_is_no_checkpoint_is_refused(jobs, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for job in jobs.values():
        with pytest.raises(sf.errors.CheckpointError, match="no checkpoint"):
            job(checkpoint=tmp_path)


def test_scores_of_another_attribution_are_another_job(tmp_path):
    nn, sae = wrapped(build("llama")), make_sae("standard")
    for n, method in enumerate((sf.attribution.AtP(), sf.IG(3))):
        attribute = sf.Attribute(sae, METRIC, method=method)
        scores = attribute(nn, RAGGED)
        if n:
            with pytest.raises(sf.errors.CheckpointError, match="differs in scores"):
                sf.audit(attribute, nn, RAGGED, scores, budget=4, checkpoint=tmp_path)
        else:
            sf.audit(attribute, nn, RAGGED, scores, budget=4, checkpoint=tmp_path)


# ---------------------------------------------------------------- before work starts


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("audit", {"budget": 1}),
        ("audit", {"k": 9}),
        ("audit", {"batch_size": 0}),
        ("faithfulness", {"to": "median"}),
        ("faithfulness", {"sizes": [2, 1]}),
        ("faithfulness", {"sizes": [40]}),
        ("minimal_set", {"holds": (abs, 2.0)}),
        ("minimal_set", {"within": make_sae("standard").latents([3])}),
        ("minimal_set", {"batch_size": 2.5}),
        ("interactions", {"batch_size": -1}),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_any_run(name, options, jobs, monkeypatch):
    monkeypatch.setattr(Evaluator, "forward", lambda *_, **__: pytest.fail("a run was made"))
    with pytest.raises(sf.SaefeatError, match=next(iter(options))):
        jobs[name](**options)


def test_scores_of_other_latents_are_refused_before_any_run(monkeypatch):
    nn, sae = wrapped(build("llama")), make_sae("standard")
    scores = sf.Attribute(sae, METRIC)(nn, RAGGED)
    monkeypatch.setattr(Evaluator, "forward", lambda *_, **__: pytest.fail("a run was made"))
    again = sf.Attribute(make_sae("standard"), METRIC)
    with pytest.raises(sf.errors.LatentError, match="loaded again"):
        sf.validation.faithfulness(again, nn, RAGGED, scores)


@EACH
def test_the_bar_is_off_unless_asked_for(name, jobs, capsys):
    jobs[name]()
    assert capsys.readouterr().err == ""
    jobs[name](progress=True)
    assert name in capsys.readouterr().err
