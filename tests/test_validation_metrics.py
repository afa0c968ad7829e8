"""Every metric of ``Attribute`` in audit, faithfulness, minimal_set and interactions.

The oracle runs one prompt at a time, without padding, under plain hooks, and computes the metric
by hand. Prompts are ragged, so the batched runs are padded, by other amounts in every batch.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, VOCAB, build, make_sae, raw_hooks, tokenizer, unit, wrapped
from saefeat.validation import experiment as memory
from saefeat.validation.experiment import Experiment

F64 = torch.float64
MORE = [[5, 9, 4], [7], [30, 31]]
V = unit(3).double()
STEER = sf.Clamp(sf.Direction(unit(3), site="resid_post.0"), add=6.0)
READ = unit(5).double()
ROWS = [tokenizer()(text)["input_ids"] for text in RAGGED]
TO = torch.randn(len(RAGGED), VOCAB, generator=torch.Generator().manual_seed(1))


class One(NamedTuple):
    """One prompt's run: logits [t, vocabulary], the last block's output [t, d], its number."""

    logits: torch.Tensor
    hidden: torch.Tensor
    number: int


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    return (a.exp() * (a - b)).sum()


def log_prob(here: One, *_) -> torch.Tensor:
    more = MORE[here.number]
    rows = here.logits[len(ROWS[here.number]) - 1 :].log_softmax(-1)
    return sum(rows[n, token] for n, token in enumerate(more))


CASES = {  # metric, by hand from (this run, clean run, steered run), whether the baseline steers
    "per prompt": (
        sf.logit_diff(
            sf.metrics.PerPrompt([5, [9, 2], 13]), sf.metrics.PerPrompt([7, 8, [40, 41]])
        ),
        lambda here, *_: (
            here.logits[-1][[[5], [9, 2], [13]][here.number]].logsumexp(0)
            - here.logits[-1][[[7], [8], [40, 41]][here.number]].logsumexp(0)
        ),
        False,
    ),
    "continuation": (sf.metrics.log_prob(sf.metrics.PerPrompt(MORE)), log_prob, False),
    "kl from clean": (
        sf.metrics.kl(),
        lambda here, clean, _: kl(clean.logits[-1], here.logits[-1]),
        False,
    ),
    "kl from given": (
        sf.metrics.kl(TO),
        lambda here, *_: kl(TO[here.number].double(), here.logits[-1]),
        False,
    ),
    "kl from baseline": (
        sf.metrics.kl("baseline"),
        lambda here, _, base: kl(base.logits[-1], here.logits[-1]),
        True,
    ),
    "steered argmax": (
        sf.logit_diff(sf.metrics.BASELINE_TOP, 7),
        lambda here, _, base: here.logits[-1][base.logits[-1].argmax()] - here.logits[-1][7],
        True,
    ),
    "all logits": (
        sf.metrics.custom(
            lambda logits, mask: (logits.logsumexp(-1) * mask).sum(1), "mass", tokens="all"
        ),
        lambda here, *_: here.logits.logsumexp(-1).sum(),
        False,
    ),
    "site": (
        sf.metrics.at_site("resid_post.2", lambda x, mask: (x[..., 3] * mask).sum(1) ** 2),
        lambda here, *_: here.hidden[:, 3].sum() ** 2,
        False,
    ),
    "activation": (
        sf.metrics.activation(sf.Direction(unit(5), site="resid_post.2"), sf.Tokens.last(2)),
        lambda here, *_: (here.hidden[-2:] @ READ).sum(),
        False,
    ),
}
EVERY = pytest.mark.parametrize("case", CASES)


def _steer(x: torch.Tensor) -> torch.Tensor:
    return x + 6.0 * V


class Oracle:
    """A model, an SAE of its middle block, and a metric by hand."""

    def __init__(self, case: str, architecture: str = "standard", family: str = "llama") -> None:
        self.metric, self._value, steered = CASES[case]
        self.model, self.sae = build(family, F64), make_sae(architecture)
        self.nn, self.baseline = wrapped(self.model), STEER if steered else None
        self._fed = [
            row + (MORE[n][:-1] if case == "continuation" else []) for n, row in enumerate(ROWS)
        ]
        self._known = [(self.run(n), self.run(n, {0: _steer})) for n in range(len(ROWS))]

    def attribute(self) -> sf.Attribute:
        """With a method that every metric has: a divergence from clean has no slope there."""
        return sf.Attribute(self.sae, self.metric, self.baseline, sf.IG(3, "midpoint"))

    def run(self, n: int, edits=None) -> One:
        held: list[torch.Tensor] = []
        with (
            torch.no_grad(),
            raw_hooks(self.model, edits or {}),
            raw_hooks(self.model, {2: lambda x: held.append(x) or x}),
        ):
            logits = self.model(torch.tensor([self._fed[n]])).logits[0]
        return One(logits, held[0][0], n)

    def value(self, n: int, edit=None) -> float:
        edits = {} if edit is None else {1: edit}
        return float(self._value(self.run(n, edits), *self._known[n]))

    def table(self, edits) -> torch.Tensor:
        """[prompts]: the metric with ``edits(n)`` on the middle block."""
        return torch.tensor([self.value(n, edits(n)) for n in range(len(ROWS))])

    def step(self, indices, target=None, tokens=None):
        """x → x with latents at zero, or at ``target`` [t, k], at so many first tokens."""
        index = sorted(indices)

        def edit(x):
            f = self.sae.encode(x, index)
            wanted = torch.zeros_like(f) if target is None else target
            delta = (wanted - f) @ self.sae.directions(index).to(x.dtype)
            real = torch.arange(x.shape[1]) < (x.shape[1] if tokens is None else tokens)
            return x + torch.where(real[:, None], delta, 0.0)

        return edit

    def base_values(self, n: int, index: int) -> torch.Tensor:
        """[1, t, 1]: a latent in the steered run."""
        held: list[torch.Tensor] = []
        with raw_hooks(self.model, {0: _steer, 1: lambda x: held.append(x) or x}):
            self.model(torch.tensor([self._fed[n]]))
        return self.sae.encode(held[0].detach(), [index])


CLOSE = {"atol": 5e-5, "rtol": 2e-4, "check_dtype": False}


@pytest.mark.parametrize(
    ("case", "family"), [*((case, "llama") for case in CASES), ("continuation", "gpt2")]
)
def test_audited_effects_are_those_of_one_prompt_at_a_time(case, family):
    oracle = Oracle(case, family=family)
    attribute = oracle.attribute()
    scores = attribute(oracle.nn, RAGGED)
    found = sf.audit(attribute, oracle.nn, RAGGED, scores, k=3, budget=6, batch_size=5)
    assert found.effects.abs().max() > 1e-4
    for (_, index), row in zip(found.keys.tolist(), found.effects, strict=True):

        def edits(n, index=index):
            to = oracle.base_values(n, index) if oracle.baseline else None
            return oracle.step([index], to, len(ROWS[n]))  # a continuation is not scored

        torch.testing.assert_close(row, oracle.table(edits) - oracle.table(lambda _: None), **CLOSE)


@pytest.mark.parametrize(
    ("case", "to"), [*((case, "zero") for case in CASES), ("continuation", "mean")]
)
def test_sets_kept_and_removed_are_those_of_one_prompt_at_a_time(case, to):
    oracle = Oracle(case, "jumprelu")
    attribute = oracle.attribute()
    scores = attribute(oracle.nn, RAGGED)
    found = sf.validation.faithfulness(
        attribute, oracle.nn, RAGGED, scores, sizes=[3], controls=1, batch_size=2, to=to
    )
    means = torch.zeros(oracle.sae.d_sae, dtype=F64)
    for row in ROWS if to == "mean" else []:
        held: list[torch.Tensor] = []
        with raw_hooks(oracle.model, {1: lambda x, held=held: held.append(x) or x}):
            oracle.model(torch.tensor([row]))
        means += oracle.sae.encode(held[0].detach()[0]).mean(0) / len(ROWS)

    def without(latents):
        target = means[sorted(latents)]
        return oracle.table(lambda n: oracle.step(latents, target, len(ROWS[n])))

    every = set(range(oracle.sae.d_sae))
    torch.testing.assert_close(found.empty, without(every), **CLOSE)
    for of, keys in found.sets.items():
        chosen = set(keys[0, :, 1].tolist())
        torch.testing.assert_close(found.kept[of][0, 0], without(every - chosen), **CLOSE)
        torch.testing.assert_close(found.removed[of][0, 0], without(chosen), **CLOSE)
    assert found.removed["top"].std() > 1e-4


@EVERY
def test_pairs_are_those_of_one_prompt_at_a_time(case):
    oracle = Oracle(case)
    look = sf.run(oracle.nn, RAGGED, sf.Probe(oracle.sae)).readings[0].active()
    chosen = oracle.sae.latents(look.topk(3).indices)
    found = sf.validation.interactions(
        oracle.nn, RAGGED, chosen, oracle.metric, baseline=oracle.baseline, batch_size=7
    )
    index = [i for _, i in chosen]
    torch.testing.assert_close(found.clean, oracle.table(lambda _: None), **CLOSE)
    for i in range(3):
        for j in range(3):
            wanted = oracle.table(lambda _, i=i, j=j: oracle.step({index[i], index[j]}))
            torch.testing.assert_close(found.pairs[i, j], wanted, **CLOSE)
    assert (found.alone - found.clean).abs().max() > 1e-4


@EVERY
def test_minimal_sets_are_those_of_one_prompt_at_a_time(case):
    """Greedy pruning written out; the sign is turned where ablation lowers the metric."""
    oracle = Oracle(case)
    start = oracle.sae.latents(
        sf.run(oracle.nn, RAGGED, sf.Probe(oracle.sae)).readings[0].active().topk(4).indices
    )
    whole = oracle.table(lambda _: oracle.step([i for _, i in start])).mean()
    none = oracle.table(lambda _: None).mean()
    if whole < none:  # the criterion must be one that ablating brings about: keep it instead
        options = {"within": start}

        def value(kept):
            gone = {i for _, i in start} - kept
            return oracle.table(lambda _: oracle.step(gone) if gone else None)
    else:
        options = {}

        def value(kept):
            return oracle.table(lambda _: oracle.step(kept) if kept else None)

    limit = float(0.5 * whole + 0.5 * none)
    left = [i for _, i in start]
    while len(left) > 1:
        tries = [(float(value(set(left) - {i}).mean()), -n) for n, i in enumerate(left)]
        best = max(tries)
        if best[0] < limit:
            break
        left.pop(-best[1])
    found = sf.validation.minimal_set(
        oracle.nn, RAGGED, start, oracle.metric, holds=limit, baseline=oracle.baseline,
        batch_size=5, **options,
    )  # fmt: skip
    assert [i for _, i in found.latents] == left
    torch.testing.assert_close(found.metric[-1], value(set(left)), **CLOSE)


# ---------------------------------------------------------------- memory


def test_only_the_logits_that_a_metric_reads_are_kept(monkeypatch):
    nn, seen = wrapped(build("llama")), []
    from saefeat.metrics.evaluator import Evaluator

    forward = Evaluator.forward

    def spy(self, batch, program):
        log, logits = forward(self, batch, program)
        seen.append(tuple(logits.shape))
        return log, logits

    monkeypatch.setattr(Evaluator, "forward", spy)
    for metric, columns in (
        (sf.metrics.logit(5), 1),
        (sf.metrics.log_prob([5, 9]), 2),
        (CASES["all logits"][0], 6),
    ):
        seen.clear()
        Experiment.of_metric(nn, RAGGED, metric, function="test", batch_size=3).under()
        assert seen == [(3, columns, VOCAB)]


@pytest.mark.parametrize("case", ["per prompt", "all logits", "continuation"])
def test_rows_are_as_many_as_there_is_room_for(monkeypatch, case):
    oracle = Oracle(case)
    attribute = oracle.attribute()
    scores = attribute(oracle.nn, RAGGED)
    wanted = sf.audit(attribute, oracle.nn, RAGGED, scores, k=2, budget=4)
    from saefeat.metrics.evaluator import Evaluator

    sizes, run = [], Evaluator.forward

    def spy(self, batch, *args, **options):
        sizes.append(len(batch.numbers))
        return run(self, batch, *args, **options)

    monkeypatch.setattr(Evaluator, "forward", spy)
    monkeypatch.setattr(memory, "CAPACITY", 12_000)
    found = sf.audit(attribute, oracle.nn, RAGGED, scores, k=2, budget=4)
    assert 1 <= max(sizes) <= 3, "more rows than there is room for"
    torch.testing.assert_close(found.effects, wanted.effects, atol=1e-6, rtol=1e-6)
    monkeypatch.setattr(memory, "CAPACITY", 1)
    sizes.clear()
    found = sf.audit(attribute, oracle.nn, RAGGED, scores, k=2, budget=4)
    assert set(sizes) == {1}, "one row is the least"
    torch.testing.assert_close(found.effects, wanted.effects, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "metric", [sf.metrics.logit(sf.metrics.BASELINE_TOP), sf.metrics.kl("baseline")], ids=repr
)
def test_a_metric_of_a_baseline_needs_one(metric):
    nn, chosen = wrapped(build("llama")), make_sae("standard").latents([3, 5])
    for call in (sf.validation.interactions, sf.validation.minimal_set):
        with pytest.raises(sf.SaefeatError, match="there is none here"):
            call(nn, RAGGED, chosen, metric)
    by_prompt = sf.metrics.logit(sf.metrics.PerPrompt([5, sf.metrics.BASELINE_TOP, 7]))
    with pytest.raises(sf.SaefeatError, match="BASELINE_TOP"):
        sf.validation.interactions(nn, RAGGED, chosen, by_prompt)
    named = sf.metrics.custom(lambda logits: logits[:, 5], "BASELINE_TOP")  # a name is no token
    assert len(sf.validation.interactions(nn, RAGGED, chosen, named).alone) == 2


def test_metrics_of_other_prompts_or_earlier_sites_are_refused_before_any_run(monkeypatch):
    nn, sae = wrapped(build("llama")), make_sae("standard")
    from saefeat.metrics.evaluator import Evaluator

    monkeypatch.setattr(Evaluator, "forward", lambda *_, **__: pytest.fail("a run was made"))
    for call in (sf.validation.interactions, sf.validation.minimal_set):
        with pytest.raises(sf.errors.PromptError, match="made for 2 prompts"):
            call(nn, RAGGED, sae.latents([3, 5]), sf.metrics.logit(sf.metrics.PerPrompt([5, 9])))
        early = sf.metrics.at_site("resid_post.0", lambda x, mask: x[:, -1].norm(dim=-1))
        with pytest.raises(sf.errors.SiteError, match=f"{call.__name__}.*no later than"):
            call(nn, RAGGED, sae.latents([3, 5]), early)
        wrong = sf.Clamp(sae, add=torch.zeros(2, sae.d_sae))
        with pytest.raises(sf.errors.LatentError, match="2 prompts"):
            call(
                nn,
                RAGGED,
                sae.latents([3, 5]),
                sf.metrics.logit(sf.metrics.BASELINE_TOP),
                baseline=wrong,
            )
