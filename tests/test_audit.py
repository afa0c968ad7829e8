"""audit and stability against brute force: plain hooks, drawn-again prompts, scipy.

FIELD.md section 3: averages taken over pads and BOS, unmatched tokens, scores of other prompts.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import nnsight
import pytest
import scipy.stats
import torch

import saefeat as sf
from helpers import (
    RAGGED,
    D,
    batch_of,
    build,
    forward,
    make_sae,
    raw_hooks,
    readable,
    unit,
    wrapped,
)
from saefeat.validation.audit import draw
from saefeat.validation.stats import (
    agreement,
    resample,
    spearman,
    stratified_total,
    student,
    wilson,
)

F64 = torch.float64
METRIC = sf.logit_diff([5, 9], 7)


def measure(logits: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits[:, [5, 9]], 1) - logits[:, 7]


def values_at(model, layer, batch, edits=None) -> torch.Tensor:
    """The residual stream after a block [b, t, d], by a plain hook."""
    found = []
    with raw_hooks(model, edits or {}), raw_hooks(model, {layer: lambda x: found.append(x) or x}):
        forward(model, batch)
    return found[0]


def moved_alone(model, sae, latent, batch, tokens, target=None) -> torch.Tensor:
    """[b] the metric's change when one latent is set to ``target`` [b, t] (zero) at ``tokens``."""
    layer = sae.site.layer

    def edit(x):
        f = sae.encode(x, [latent])  # [b, t, 1]
        wanted = 0.0 if target is None else target[..., None]
        step = (wanted - f) @ sae.directions([latent]).to(x.dtype)
        return torch.where(tokens[..., None], x + step, x)

    with raw_hooks(model, {layer: edit}):
        after = forward(model, batch)[:, -1]
    return measure(after) - measure(forward(model, batch)[:, -1])


# ---------------------------------------------------------------- statistics


def test_rank_correlation_is_scipys():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 20):
        a = torch.randint(5, (n,), generator=generator).double()  # ties
        b = torch.randn(n, generator=generator).double()
        a[0] += 0.5
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert spearman(torch.ones(3), torch.arange(3.0)) != spearman(
        torch.ones(3), torch.ones(3)
    )  # nan
    assert spearman(torch.tensor([1.0]), torch.tensor([1.0])) != 1.0


def test_agreement_by_hand():
    found = agreement(torch.tensor([1.0, -2.0, 0.0, 4.0]), torch.tensor([2.0, -4.0, 1.0, -1.0]))
    assert found.n == 4
    assert found.sign == pytest.approx(2 / 3)  # the zero has no sign to agree with
    assert found.slope == pytest.approx((2 + 8 - 4) / (1 + 4 + 16))
    assert found.rank == pytest.approx(0.4)
    assert found.order == pytest.approx(scipy.stats.spearmanr([1, 2, 0, 4], [2, 4, 1, 1])[0])
    empty = agreement(torch.zeros(0), torch.zeros(0))
    assert empty.sign != empty.sign and empty.slope != empty.slope and empty.rank != empty.rank


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 10), (10, 10), (7, 30)])
def test_wilson_is_scipys(count, n):
    interval = scipy.stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
    found = wilson(count / n, n)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_the_stratified_total_is_unbiased_and_its_variance_right():
    """Every sample of a small population, written out."""
    first, second = torch.tensor([9.0, 5.0, 1.0]), torch.tensor([0.0, 1.0, 4.0, 2.0])
    totals, variances = [], []
    for a in itertools.combinations(first.tolist(), 2):
        for b in itertools.combinations(second.tolist(), 2):
            found = stratified_total([torch.tensor(a), torch.tensor(b)], [3, 4])
            totals.append(found.value)
            variances.append(found.variance)
    assert sum(totals) / len(totals) == pytest.approx(22.0)
    spread = torch.tensor(totals).var(correction=0)
    assert sum(variances) / len(variances) == pytest.approx(float(spread), rel=1e-5)
    everything = stratified_total([first, second], [3, 4])
    assert everything.interval() == (22.0, 22.0, 22.0)


@pytest.mark.parametrize("population", [1, 3, 20, 21, 64, 300, 5000])
@pytest.mark.parametrize(("k", "budget"), [(1, 0), (4, 1), (8, 8), (32, 32), (10, 90)])
def test_the_draw_is_a_stratified_sample(population, k, budget):
    ranks, stratum, sizes = draw(population, k, budget, 3)
    assert len(ranks) == len(stratum) == min(population, k + budget)
    assert len(set(ranks.tolist())) == len(ranks)
    assert ranks[: min(k, population)].tolist() == list(range(min(k, population)))
    assert int(sizes.sum()) == population
    edges = [0, *sizes.cumsum(0).tolist()]
    for h in range(len(sizes)):
        own = ranks[stratum == h]
        assert len(own) > 0 or budget == 0
        assert bool(((own >= edges[h]) & (own < edges[h + 1])).all())
        if h and len(own) < sizes[h]:
            assert len(own) >= min(2, budget)
    again = draw(population, k, budget, 3)
    assert torch.equal(ranks, again[0])


# ---------------------------------------------------------------- effects against plain hooks


@pytest.mark.parametrize("where", [None, sf.Tokens.last(2)], ids=["all", "last"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_effects_are_those_of_single_ablations(family, architecture, where):
    model, batch = build(family, F64), batch_of()
    sae = make_sae(architecture)
    attribute = sf.Attribute(sae, METRIC, where=where)
    nn = wrapped(model)
    scores = attribute(nn, RAGGED)
    found = sf.audit(attribute, nn, RAGGED, scores, k=4, budget=9, batch_size=5)
    real = batch["attention_mask"].bool()
    tokens = real if where is None else real & (torch.arange(real.shape[1]) >= real.shape[1] - 2)
    assert found.effects.abs().max() > 1e-3
    for key, row in zip(found.keys.tolist(), found.effects, strict=True):
        wanted = moved_alone(model, sae, key[1], batch, tokens)
        torch.testing.assert_close(row, wanted, atol=2e-5, rtol=1e-4)


def test_effects_with_a_baseline_move_each_token_to_its_own_value():
    model, batch = build("llama", F64), batch_of()
    sae, v = make_sae("standard"), unit(3).double()
    attribute = sf.Attribute(
        sae, METRIC, baseline=sf.Ablate(sf.Direction.at_sites(v.float(), sites=["resid_post.0"]))
    )
    scores = attribute(wrapped(model), RAGGED)
    found = sf.audit(attribute, wrapped(model), RAGGED, scores, k=3, budget=6)
    base = values_at(model, 1, batch, {0: lambda x: x - (x @ v)[..., None] * v / (v @ v)})
    tokens = batch["attention_mask"].bool()
    for key, row in zip(found.keys.tolist(), found.effects, strict=True):
        target = sae.encode(base, [key[1]])[..., 0]
        wanted = moved_alone(model, sae, key[1], batch, tokens, target)
        torch.testing.assert_close(row, wanted, atol=2e-5, rtol=1e-4)


def test_effects_at_several_sites_and_of_transcoders_and_the_error_term():
    model, nn = build("gemma3_text", F64), wrapped(build("gemma3_text", F64))
    sae, transcoder = make_sae("standard", layer=2), make_sae("transcoder", layer=1)
    error = sf.dictionaries.ErrorTerm(make_sae("standard", layer=0))
    latents = error.latents() | transcoder.latents() | sae.latents()
    attribute = sf.Attribute(latents, METRIC)
    scores = attribute(nn, RAGGED)
    found = sf.audit(attribute, nn, RAGGED, scores, k=20, budget=80)
    clean = measure(sf.run(nn, RAGGED).logits.double())
    seen = set()
    for one, row in zip(found.latents, found.effects, strict=True):
        seen.add(one.parts[0][0].name)
        with torch.no_grad(), sf.hooked(model, sf.Ablate(one)):
            after = measure(forward(model, batch_of())[:, -1])
        torch.testing.assert_close(row, after - clean, atol=3e-5, rtol=1e-4)
    assert len(seen) >= 2


@pytest.mark.parametrize("baseline", [None, "direction"])
def test_where_the_metric_is_linear_estimates_are_effects(baseline):
    """Sums over tokens meet effects, to 1e-4; means over tokens would be off by the length."""
    nn = wrapped(readable(over_tokens=True))
    sae = make_sae("jumprelu", layer=2)
    chosen = None if baseline is None else sf.Ablate(sf.Direction(unit(1), site="resid_post.1"))
    attribute = sf.Attribute(sae, sf.logit_diff(3, 8), baseline=chosen)
    scores = attribute(nn, RAGGED)
    found = sf.audit(attribute, nn, RAGGED, scores, budget=24)
    assert found.effects.abs().max() > 0.1
    torch.testing.assert_close(found.estimates, found.effects, atol=1e-4, rtol=1e-4)
    assert found.top.slope == pytest.approx(1, abs=1e-4)
    assert found.top.rank > 0.999 and found.top.sign == 1.0
    assert "The ranking holds among the top; sizes are right on the whole" in found.verdict
    # totals are means over tokens: the convention the docstring names
    keys, values, prompts = scores.totals(per="prompt")
    for key, value, prompt in zip(keys.tolist(), values, prompts.tolist(), strict=True):
        row = (found.keys == torch.tensor(key)).all(1).nonzero().flatten()
        if len(row):
            total = float(value) * int(scores.tokens[prompt])
            assert float(found.effects[row[0], prompt]) == pytest.approx(total, abs=1e-4)


def test_batches_do_not_matter():
    nn, sae = wrapped(build("gemma3_text")), make_sae("jumprelu")
    attribute = sf.Attribute(sae, METRIC)
    scores = attribute(nn, RAGGED)
    found = [
        sf.audit(attribute, nn, RAGGED, scores, budget=10, batch_size=size) for size in (1, 4, 64)
    ]
    for other in found[1:]:
        assert torch.equal(found[0].keys, other.keys)
        torch.testing.assert_close(found[0].effects, other.effects, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- what was missed


def linear():
    nn, sae = wrapped(readable(over_tokens=True)), make_sae("standard", layer=2)
    attribute = sf.Attribute(sae, sf.logit_diff(3, 8))
    return nn, attribute, attribute(nn, RAGGED)


def test_the_share_missed_covers_the_truth():
    """Against an audit of everything; the interval's own claim is 95 %."""
    nn, attribute, scores = linear()
    whole = sf.audit(attribute, nn, RAGGED, scores, k=8, budget=1000)
    sizes = whole.exact.abs()
    truth = float(sizes[8:].sum() / sizes.sum())
    assert whole.missed.value == pytest.approx(truth)
    assert whole.missed.high == pytest.approx(truth)
    pairs = (sizes[8:, None] > sizes[None, :8]).double().mean()
    assert whole.outranked.value == pytest.approx(float(pairs), abs=1e-9)
    covered = []
    for seed in range(30):
        found = sf.audit(attribute, nn, RAGGED, scores, k=8, budget=20, seed=seed)
        covered.append(found.missed.low <= truth <= found.missed.high)
    assert sum(covered) >= 25
    assert len({tuple(map(tuple, found.keys.tolist())) for found in (found, whole)}) == 2


def test_strata_weigh_as_much_as_they_hold():
    """By hand: a stratum of two, both stronger than the top, and one of eight, none stronger."""
    stratum = torch.tensor([0, 0, 1, 1, 2, 2])
    exact = torch.tensor([1.0, -1.0, 3.0, -3.0, 0.5, 0.5], dtype=F64)[:, None]
    keys = torch.stack([torch.zeros(6).long(), torch.arange(6)], 1)
    nothing = torch.zeros(1)
    sizes = torch.tensor([2, 2, 8])
    found = sf.validation.Audit((), keys, stratum, sizes, exact, exact, nothing, nothing, 0)
    assert found.outranked.value == pytest.approx(2 / 10)
    assert found.missed.value == pytest.approx((6 + 8 * 0.5) / (6 + 8 * 0.5 + 2))
    # Kish: (Σ w)² / Σ w² draws are worth as much as the four
    assert found.outranked == pytest.approx(wilson(0.2, 10**2 / (1 + 1 + 16 + 16)))


def test_scores_that_mislead_are_caught():
    nn, attribute, scores = linear()
    wrong = replace(scores, score=-scores.score)
    found = sf.audit(attribute, nn, RAGGED, wrong)
    assert found.top.sign == 0.0 and found.top.slope == pytest.approx(-1, abs=1e-4)
    assert "does NOT hold" in found.verdict
    shuffled = scores.score[torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))]
    found = sf.audit(attribute, nn, RAGGED, replace(scores, score=shuffled), k=10, budget=30)
    assert "does NOT hold" in found.verdict
    assert found.outranked.value > 0.15
    assert found.missed.low > 0.3


def test_without_a_tail_nothing_is_missed():
    nn, attribute, scores = linear()
    few = sf.Attribute(attribute.target.latents([3, 5, 17, 20]), attribute.metric)
    found = sf.audit(few, nn, RAGGED, few(nn, RAGGED), k=4, budget=8)
    assert found.missed == (0, 0, 0) and found.outranked == (0, 0, 0)
    assert found.tail.n == 0
    assert "tail" in repr(found)
    nothing_drawn = sf.audit(attribute, nn, RAGGED, scores, k=4, budget=4)
    assert nothing_drawn.missed.value != nothing_drawn.missed.value  # unknown, not zero
    assert nothing_drawn.outranked.high != nothing_drawn.outranked.high
    assert repr(nothing_drawn).count("unknown") >= 2


def test_one_screen_and_a_table():
    nn, attribute, scores = linear()
    found = sf.audit(attribute, nn, RAGGED, scores)
    lines = repr(found).splitlines()
    assert len(lines) <= 11 and max(map(len, lines)) <= 130
    table = found.to_pandas()
    assert list(table) == ["site", "latent", "stratum", "estimate", "exact", "standard_error"]
    torch.testing.assert_close(
        torch.tensor(table["standard_error"].to_numpy()), found.effects.std(1) / 3**0.5
    )
    single = sf.audit(attribute, nn, RAGGED[:1], attribute(nn, RAGGED[:1]))
    assert bool(single.error.isnan().all())


def test_the_baselines_own_token(monkeypatch):
    """BASELINE_TOP stands for the same token as in the attribution, at either baseline."""
    nn, sae = wrapped(build("llama")), make_sae("standard")
    metric = sf.logit_diff(sf.metrics.BASELINE_TOP, 7)
    for baseline in (None, sf.Clamp(sf.Direction(unit(2), site="resid_post.0"), add=30.0)):
        attribute = sf.Attribute(sae, metric, baseline=baseline)
        scores = attribute(nn, RAGGED)
        logits = sf.run(nn, RAGGED).logits
        assert not torch.allclose(scores.clean, logits.max(-1).values - logits[:, 7]), (
            "the baseline must change what is said"
        )
        sf.audit(attribute, nn, RAGGED, scores, budget=4)


# ---------------------------------------------------------------- refusals


def test_scores_of_something_else_are_refused():
    nn, attribute, scores = linear()
    with pytest.raises(sf.errors.PromptError, match="other prompts"):
        sf.audit(attribute, nn, RAGGED[:2], scores)
    with pytest.raises(sf.errors.PromptError, match="another order"):
        sf.audit(attribute, nn, RAGGED[::-1], scores)
    other = replace(attribute, metric=sf.metrics.logit(1))
    with pytest.raises(sf.errors.PromptError, match="another metric"):
        sf.audit(other, nn, RAGGED, scores)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 1},
        {"budget": 2.5},
        {"k": 0},
        {"k": 99},
        {"seed": -1},
        {"batch_size": 0},
        {"k": True},
    ],
    ids=str,
)
def test_bad_numbers_are_refused(options):
    nn, attribute, scores = linear()
    with pytest.raises(sf.SaefeatError, match=f"audit.*{next(iter(options))}"):
        sf.audit(attribute, nn, RAGGED, scores, **options)


def test_nothing_to_audit():
    nn, sae = wrapped(build("llama")), make_sae("standard")
    behind = sf.Ablate(sf.Direction(unit(2), site="resid_post.2"))  # no watched latent moves
    nothing = sf.Attribute(sae, METRIC, baseline=behind)
    scores = nothing(nn, RAGGED)
    assert len(scores) == 0
    with pytest.raises(sf.SaefeatError, match="something in it"):
        sf.audit(nothing, nn, RAGGED, scores)
    zero = sf.Attribute(sae, sf.metrics.custom(lambda logits: logits[:, 5] - logits[:, 5]))
    with pytest.raises(sf.SaefeatError, match="3 of 3 prompts degenerate"):
        sf.audit(zero, nn, RAGGED, zero(nn, RAGGED))


def test_directions_that_move_need_the_zero_baseline():
    nn, base = wrapped(build("llama")), sf.Ablate(sf.Direction(unit(2), site="resid_post.0"))
    for dictionary in (
        make_sae("standard", norm="layer_norm"),
        sf.dictionaries.ErrorTerm(make_sae("standard")),
    ):
        attribute = sf.Attribute(dictionary, METRIC, baseline=base)
        with pytest.raises(sf.SaefeatError, match="directions move"):
            sf.audit(attribute, nn, RAGGED, attribute(nn, RAGGED))
        still = sf.Attribute(dictionary, METRIC)
        sf.audit(still, nn, RAGGED, still(nn, RAGGED), budget=4)


def test_a_metric_that_is_not_finite_is_refused():
    nn, attribute, scores = linear()
    bad = replace(
        attribute, metric=sf.metrics.custom(lambda logits: logits[:, 0].abs().neg().log())
    )
    with pytest.raises(sf.SaefeatError, match="wanted a finite number"):
        sf.audit(bad, nn, RAGGED, scores)


def test_the_bar_can_be_shown(capsys):
    nn, attribute, scores = linear()
    sf.audit(attribute, nn, RAGGED, scores, budget=4)
    assert capsys.readouterr().err == ""
    sf.audit(attribute, nn, RAGGED, scores, budget=4, progress=True)
    assert "audit" in capsys.readouterr().err


# ---------------------------------------------------------------- what a sceptic would try


def test_students_quantile_is_the_published_one():
    for freedom, wanted in ((1, 12.7062), (2, 4.30265), (30, 2.04227), (float("inf"), 1.959964)):
        assert student(freedom) == pytest.approx(wanted, rel=1e-5)


def test_degrees_of_freedom_are_satterthwaites():
    a, b = torch.tensor([1.0, 4.0, 9.0], dtype=F64), torch.tensor([2.0, 2.5], dtype=F64)
    parts = [20**2 * (1 - 3 / 20) / 3 * float(a.var()), 7**2 * (1 - 2 / 7) / 2 * float(b.var())]
    found = stratified_total([a, b], [20, 7])
    assert found.value == pytest.approx(20 * 14 / 3 + 7 * 2.25) and found.seen == 18.5
    assert found.variance == pytest.approx(sum(parts))
    assert found.freedom == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1))
    low, high = found.interval()[1:]
    rest = found.value - found.seen
    spread = student(found.freedom) * sum(parts) ** 0.5 / rest
    assert high == pytest.approx(found.seen + rest * torch.tensor(spread).exp().item(), rel=1e-5)
    assert low == pytest.approx(found.seen + rest * torch.tensor(-spread).exp().item(), rel=1e-5)


def test_draws_that_show_no_spread_give_no_upper_end():
    """Four draws of 500 that did nothing do not show that the other 496 do nothing."""
    for values in (torch.zeros(4), torch.tensor([2.0])):
        found = stratified_total([values], [500]).interval()
        assert found.low == float(values.sum()) and found.high != found.high
        assert str(found).endswith("?]")


@pytest.mark.parametrize(
    ("noise", "budget", "least"), [(0.3, 64, 0.9), (1.5, 64, 0.85), (1.5, 16, 0.75), (1.5, 8, 0.7)]
)
def test_the_share_missed_is_honest_for_skewed_effects(noise, budget, least):
    """1,000 log-normal effects, estimates right to a factor; a normal interval falls to .56."""
    held = 0
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)
        exact, error = torch.randn(2, 1000, generator=generator, dtype=F64)
        exact = (1.5 * exact).exp()
        exact = exact[(exact * (noise * error).exp()).argsort(descending=True)]
        k = budget // 2
        ranks, stratum, sizes = draw(1000, k, budget - k, seed)
        samples = [exact[ranks[stratum == h]] for h in range(1, len(sizes))]
        found = stratified_total(samples, sizes[1:].tolist()).interval()
        held += found.low <= float(exact[k:].sum()) <= found.high
    assert held / 120 >= least


def hand_made(estimates, effects, **options) -> sf.validation.Audit:
    """An audit of the top alone, one prompt."""
    n = len(estimates)
    keys = torch.stack([torch.zeros(n).long(), torch.arange(n)], 1)
    columns = (torch.tensor(column, dtype=F64)[:, None] for column in (estimates, effects))
    nothing = torch.zeros(1)
    v = (sf.Neurons("resid_post.0", 4),)
    return sf.validation.Audit(
        v, keys, torch.zeros(n).long(), torch.tensor([n]), *columns, nothing + 1, nothing, 0,
        **options,
    )  # fmt: skip


def test_a_few_latents_are_no_ranking():
    numbers = [5.0, 4.0, 3.0, 2.0, 1.5, 1.2, 1.0]
    assert "With 6 latents" in hand_made(numbers[:6], numbers[:6]).verdict
    assert "The ranking holds among" in hand_made(numbers, numbers).verdict
    assert "nothing can be said" in hand_made(numbers[:2], numbers[:2]).verdict


def test_single_prompts_are_told_from_their_mean():
    """By hand: the mean agrees, and neither prompt does."""
    estimates = torch.tensor([[4.0, 2.0], [1.0, 3.0], [0.5, 0.5]], dtype=F64)
    effects = estimates.flip(1)
    keys = torch.stack([torch.zeros(3).long(), torch.arange(3)], 1)
    v, nothing = sf.Neurons("resid_post.0", 4), torch.ones(2)
    stratum, sizes = torch.zeros(3).long(), torch.tensor([3])
    found = sf.validation.Audit((v,), keys, stratum, sizes, estimates, effects, nothing, nothing, 0)
    assert found.top.rank == pytest.approx(1.0)
    assert [round(a.rank, 2) for a in found.by_prompt] == [0.5, 0.5]
    assert found.by_prompt[0] == agreement(estimates[:, 0], effects[:, 0])
    (row,) = [line.split() for line in repr(found).splitlines() if "by prompt" in line]
    slope = min(found.by_prompt[n].slope for n in range(2))
    assert row[2:] == ["3", "0.50", "0.50", "1.00", f"{slope:.2f}"]


def test_where_all_are_moved_nothing_is_in_doubt():
    nn, attribute, scores = linear()
    whole = sf.audit(attribute, nn, RAGGED, scores, k=8, budget=1000)
    assert whole.outranked.low == whole.outranked.value == whole.outranked.high


def test_scores_for_all_tokens_together_cannot_be_moved_token_by_token():
    """Position −1 is no token: the last column of the batch would be moved instead."""
    nn, chosen = wrapped(build("llama")), make_sae("standard").latents([3, 5, 17])
    for method in (sf.attribution.Exact(), sf.attribution.FiniteDifference()):
        attribute = sf.Attribute(chosen, METRIC, method=method)
        with pytest.raises(sf.SaefeatError, match="of whole prompts"):
            sf.audit(attribute, nn, RAGGED, attribute(nn, RAGGED), budget=3)
    by_token = sf.Attribute(chosen, METRIC, method=sf.attribution.Exact(per="token"))
    found = sf.audit(by_token, nn, RAGGED, by_token(nn, RAGGED), budget=3)
    assert found.effects.abs().max() > 1e-3


def test_a_baseline_that_only_the_scores_remember():
    nn, dictionary = wrapped(build("llama")), make_sae("standard", norm="layer_norm")
    base = sf.Ablate(sf.Direction(unit(2), site="resid_post.0"))
    scores = sf.Attribute(dictionary, METRIC, base)(nn, RAGGED)
    with pytest.raises(sf.SaefeatError, match="directions move"):
        sf.audit(sf.Attribute(dictionary, METRIC), nn, RAGGED, scores)


def test_other_texts_are_refused_where_the_metric_cannot_tell():
    """A divergence from the clean run is zero for any prompts."""
    nn, sae = wrapped(build("llama")), make_sae("standard")
    attribute = sf.Attribute(sae, sf.metrics.kl(), method=sf.IG(2, "midpoint"))
    scores = attribute(nn, RAGGED)
    with pytest.raises(sf.errors.PromptError, match="another order"):
        sf.audit(attribute, nn, RAGGED[::-1], scores, budget=2)


def test_a_metric_that_is_nearly_the_same_is_another():
    nn, attribute, scores = linear()
    near = replace(attribute, metric=sf.metrics.custom(lambda x: x[:, 3] - x[:, 8] + 0.05))
    with pytest.raises(sf.errors.PromptError, match="another metric"):
        sf.audit(near, nn, RAGGED, scores, budget=2)


def test_scores_that_are_not_finite_are_refused():
    nn, attribute, scores = linear()
    bad = replace(
        scores, score=torch.where(torch.arange(len(scores)) == 3, torch.nan, scores.score)
    )
    for call in (
        lambda: sf.audit(attribute, nn, RAGGED, bad),
        lambda: sf.validation.faithfulness(attribute, nn, RAGGED, bad),
        lambda: sf.validation.stability(bad, 3),
    ):
        with pytest.raises(sf.SaefeatError, match="1 that are not finite, the first of prompt 0"):
            call()


def test_what_keep_left_out_is_said():
    nn, sae = wrapped(build("llama")), make_sae("standard")
    attribute = sf.Attribute(sae, METRIC, keep=3)
    scores = attribute(nn, RAGGED)
    found = sf.audit(attribute, nn, RAGGED, scores, budget=6)
    left = scores.dropped[:, 1].sum()
    assert found.dropped == pytest.approx(float(left / (left + scores.score.abs().sum())))
    assert f"{found.dropped:.1%} of the scores' size was left out by keep=" in repr(found)
    whole = sf.Attribute(sae, METRIC)
    assert "keep=" not in repr(sf.audit(whole, nn, RAGGED, whole(nn, RAGGED), budget=6))


def test_effects_within_rounding_are_said():
    numbers = [5.0, 4.0, 0.003, 0.002]
    assert "2 of the 4 effects are smaller" in repr(hand_made(numbers, numbers, noise=0.01))
    assert "rounding" not in repr(hand_made(numbers, numbers, noise=1e-5))
    model = build("llama", torch.bfloat16)
    sae = make_sae("standard")
    attribute = sf.Attribute(sae, METRIC)
    scores = attribute(wrapped(model), RAGGED, batch_size=1)
    found = sf.audit(attribute, wrapped(model), RAGGED, scores, budget=20)
    clean = sf.metrics.measure(wrapped(model), RAGGED, METRIC)
    assert found.noise == pytest.approx(float((clean - scores.clean).abs().max()), abs=1e-6)


def test_each_site_has_its_gap_where_it_has_a_path():
    nn = wrapped(build("llama"))
    saes = sf.dictionaries.Dictionaries(
        [make_sae("standard", layer=0), make_sae("jumprelu", layer=2)]
    )
    attribute = sf.Attribute(saes, METRIC, method=sf.IG(3, "midpoint"), one_site=True)
    scores = attribute(nn, RAGGED)
    found = sf.audit(attribute, nn, RAGGED, scores, budget=4)
    share = scores.gap_by_site.abs().mean() / (scores.ends - scores.clean[:, None]).abs().mean()
    assert found.gap.shape == (3, 2)
    assert f"completeness gap: {share:.1%} of the metric's change" in repr(found)
    assert "each site on a path of its own" in repr(found)
    assert len(repr(found).splitlines()) <= 10


def test_scores_made_in_a_trace_have_no_gap():
    nn, sae = wrapped(build("llama")), make_sae("standard")
    attribute = sf.Attribute(sae, METRIC)
    with nn.trace(batch_of()):
        watching = attribute.watch(nn)
        scores = nnsight.save(watching.scores(nn.output.logits))
    found = sf.audit(attribute, nn, RAGGED, scores, budget=6)
    whole = sf.audit(attribute, nn, RAGGED, attribute(nn, RAGGED), budget=6)
    torch.testing.assert_close(found.effects, whole.effects, atol=1e-5, rtol=1e-5)
    assert "without a baseline run" in repr(found) and "nan" not in repr(found)


# ---------------------------------------------------------------- stability

MANY = [f"w{n} w{n + 1} w{2 * n} w{3 * n}"[: 8 + n % 3 * 3] for n in range(1, 9)]


def again(scores: sf.attribution.Attribution, drawn: list[int]) -> sf.attribution.Attribution:
    """The attribution that these prompts would have given."""
    pieces = [(scores.prompt == p).nonzero().flatten() for p in drawn]
    rows = torch.cat(pieces)
    numbers = torch.cat([torch.full((len(p),), n) for n, p in enumerate(pieces)])
    names = ("dictionary", "position", "latent", "score", "activation", "change")
    kept = {name: getattr(scores, name)[rows] for name in names}
    per = {name: getattr(scores, name)[drawn] for name in ("clean", "baseline", "tokens")}
    return replace(scores, prompt=numbers, **kept, **per)


def test_stability_is_that_of_prompts_drawn_again():
    nn, sae = wrapped(build("llama")), make_sae("jumprelu")
    scores = sf.Attribute(sae, METRIC)(nn, MANY)
    found = sf.validation.stability(scores, 5, samples=25, seed=4)
    best = scores.top(5)
    assert {i for one in found.latents for _, i in one} == {i for _, i in best}
    means = torch.tensor([score for _, score in scores.ranking(5)])
    torch.testing.assert_close(found.mean.float(), means, atol=1e-6, rtol=1e-5)
    members, overlaps, sampled = [], [], []
    for weights in resample(len(MANY), 25, 4):
        drawn = (weights * len(MANY)).round().long()
        one = again(scores, torch.arange(len(MANY)).repeat_interleave(drawn).tolist())
        top = {i for _, i in one.top(5)}
        members.append(top)
        ours = {i for _, i in best}
        overlaps.append(len(top & ours) / len(top | ours))
        sampled.append(one.scores_of(found.latents[0]))
    torch.testing.assert_close(found.overlap.double(), torch.tensor(overlaps).double())
    for one, share in zip(found.latents, found.inclusion, strict=True):
        index = next(iter(one))[1]
        assert float(share) == pytest.approx(sum(index in m for m in members) / 25)
    outside = {i for m in members for i in m if sum(i in other for other in members) >= 12.5}
    assert {int(i) for _, i in found.outsiders} == outside - {i for _, i in best}
    assert 0 < found.overlap.min() < 1, "the case must move"
    assert bool((found.low <= found.mean).all() and (found.mean <= found.high).all())
    values = torch.cat(sampled)
    assert float(found.low[0]) == pytest.approx(float(torch.quantile(values, 0.025)), abs=1e-5)


def test_stability_smaller_sets_and_its_views():
    nn, sae = wrapped(build("llama")), make_sae("standard")
    scores = sf.Attribute(sae.latents(range(6)), METRIC)(nn, MANY)
    found = sf.validation.stability(scores, 50, samples=10)
    assert 0 < len(found.keys) < 7
    assert len(found.core(0.0)) == len(found.keys)
    assert len(found.core(1.01)) == 0
    assert list(found.to_pandas()) == ["site", "latent", "mean", "low", "high", "inclusion"]
    assert len(repr(found).splitlines()) == 3
    assert torch.equal(found.overlap, sf.validation.stability(scores, 50, samples=10).overlap)


def test_stability_refusals():
    nn, sae = wrapped(readable()), sf.Neurons("resid_post.2", D)
    scores = sf.Attribute(sae.latents([3]), sf.metrics.custom(lambda x: x[:, 3] ** 2))(nn, RAGGED)
    with pytest.raises(sf.errors.LatentError, match="wrong sign"):
        sf.validation.stability(scores, 3)  # removing the one latent can only lower its square
    with pytest.raises(sf.SaefeatError, match="two prompts"):
        sf.validation.stability(sf.Attribute(sae, METRIC)(nn, RAGGED[:1]), 3)
    for options in ({"k": 0}, {"k": 3, "samples": 0}):
        with pytest.raises(sf.SaefeatError, match="integer from 1"):
            sf.validation.stability(scores, **options)
