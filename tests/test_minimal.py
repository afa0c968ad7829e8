"""minimal_set and interactions where the truth is known, and against loops of single runs.

On ``readable`` models the first logits are the last layer's residual stream at the last token, so
a metric can read chosen neurons there, and only they matter.
"""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, readable, wrapped

SITE = "resid_post.2"


@pytest.fixture(scope="module")
def planted():
    """(model, neurons, the last residual stream [prompts, D])."""
    nn, neurons = wrapped(readable()), sf.Neurons(SITE, D)
    return nn, neurons, sf.run(nn, RAGGED).logits[:, :D]


def gone(x: torch.Tensor) -> torch.Tensor:
    """1 where a neuron has been ablated: clean values are never exactly zero."""
    return (x.abs() < 1e-9).double()


def reads(function, name="planted") -> sf.metrics.Metric:
    """A metric of which neurons are gone, with no gradient at all."""
    return sf.metrics.custom(lambda logits: function(gone(logits[:, :D])), name)


BOTH = reads(lambda g: g[:, 3] * g[:, 8])  # the effect needs both removed
EITHER = reads(lambda g: 1 - (1 - g[:, 3]) * (1 - g[:, 8]))
SUM = reads(lambda g: 2 * g[:, 3] + g[:, 8] + 0.1 * g[:, 11] - 0.5 * g[:, 20])


# ---------------------------------------------------------------- minimal sets


def test_the_planted_set_is_found(planted):
    nn, neurons, _ = planted
    start = neurons.latents([1, 3, 5, 8, 11, 20])
    found = sf.validation.minimal_set(nn, RAGGED, start, BOTH, holds=1.0)
    assert set(found.latents) == set(neurons.latents([3, 8]))
    assert [i for one in found.removed for _, i in one] == [1, 5, 11, 20]  # ties: the earlier
    assert found.metric.shape == (5, 3) and bool((found.metric == 1).all())
    assert bool((found.without == 0).all()) and bool((found.clean == 0).all())
    assert bool((found.held == 1).all())


def test_one_of_two_that_do_the_same_is_enough(planted):
    nn, neurons, _ = planted
    found = sf.validation.minimal_set(nn, RAGGED, neurons.latents([3, 5, 8]), EITHER, holds=0.5)
    assert set(found.latents) == set(neurons.latents([8]))


def test_what_hurts_least_goes_first(planted):
    nn, neurons, _ = planted
    start = neurons.latents([3, 8, 11, 20])
    found = sf.validation.minimal_set(nn, RAGGED, start, SUM, holds=1.9)
    assert [i for one in found.removed for _, i in one] == [20, 11, 8]
    torch.testing.assert_close(found.metric.mean(1), torch.tensor([2.6, 3.1, 3.0, 2.0]))
    assert set(found.latents) == set(neurons.latents([3]))
    stricter = sf.validation.minimal_set(nn, RAGGED, start, SUM, holds=2.5)
    assert set(stricter.latents) == set(neurons.latents([3, 8]))


def test_a_circuit_is_kept_within_the_rest(planted):
    """Acting by being kept: the metric stands as long as neurons 3 and 8 do."""
    nn, neurons, _ = planted
    stands = reads(lambda g: (1 - g[:, 3]) * (1 - g[:, 8]))
    start = neurons.latents([3, 5, 8, 9])
    found = sf.validation.minimal_set(nn, RAGGED, start, stands, holds=1.0, within=neurons)
    assert set(found.latents) == set(neurons.latents([3, 8]))
    with pytest.raises(sf.errors.LatentError, match="within"):
        sf.validation.minimal_set(nn, RAGGED, start, stands, within=neurons.latents([3, 5]))


def test_a_criterion_by_prompt_and_its_share(planted):
    nn, neurons, x = planted
    order = x[:, 4].argsort()
    middle = float(x[order[1:], 4].mean())  # between the two largest, in any precision
    # on the prompt with the largest neuron 4, only removing 8 helps; elsewhere removing 3 does
    special = sf.metrics.custom(
        lambda logits: (
            torch.where(logits[:, 4] > middle, gone(logits[:, 8]), gone(logits[:, 3])) - 0.5
        )
    )
    start = neurons.latents([3, 5, 8])
    everywhere = sf.validation.minimal_set(nn, RAGGED, start, special, holds=lambda m: m > 0)
    assert set(everywhere.latents) == set(neurons.latents([3, 8]))
    most = sf.validation.minimal_set(nn, RAGGED, start, special, holds=(lambda m: m > 0, 0.6))
    assert set(most.latents) == set(neurons.latents([3]))
    torch.testing.assert_close(most.held, torch.tensor([1, 1, 2 / 3]))


WAYS = [
    pytest.param(where, kept, id=f"{name}-{kept}", marks=pytest.mark.slow if name == "all" else ())
    for name, where in {"all": None, "last": sf.Tokens.last(1)}.items()
    for kept in (False, True)
]


@pytest.mark.parametrize(("where", "kept"), WAYS)
def test_greedy_pruning_written_out(where, kept):
    """Two sites of a random model, one run a candidate."""
    nn = wrapped(build("llama"))
    saes = sf.dictionaries.Dictionaries(
        [make_sae("jumprelu", layer=0), make_sae("standard", layer=2)]
    )
    metric = sf.logit_diff([5, 9], 7)
    top = sf.Attribute(saes, metric)(nn, RAGGED).top(7)
    whole = saes.latents({0: range(48), 2: range(48)})

    def scorer(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, [5, 9]].logsumexp(-1) - logits[:, 7]

    def value(chosen: sf.Latents) -> torch.Tensor:
        ablated = whole - chosen if kept else chosen
        edit = sf.Ablate(ablated, where=where) if len(ablated) else None
        return scorer(sf.run(nn, RAGGED, edit).logits)

    bounds = sorted([float(value(top).mean()), float(value(sf.Latents(())).mean())])
    sign = 1.0 if float(value(top).mean()) == bounds[1] else -1.0
    signed = metric if sign > 0 else sf.metrics.custom(lambda logits: -scorer(logits))
    limit = sign * (0.6 * float(value(top).mean()) + 0.4 * float(value(sf.Latents(())).mean()))
    left, removed = top, []
    while True:
        options = [
            (sign * float(value(left - one).mean()), -n) for n, one in enumerate(left.singles())
        ]
        best = max(options)
        if best[0] < limit:
            break
        removed.append(left.singles()[-best[1]])
        left = left - removed[-1]
    found = sf.validation.minimal_set(
        nn, RAGGED, top, signed, holds=limit, where=where,
        within=whole if kept else None, batch_size=8,
    )  # fmt: skip
    assert found.latents == left
    assert list(found.removed) == removed
    torch.testing.assert_close(found.metric[-1], sign * value(left), atol=1e-4, rtol=1e-4)
    assert removed, "the case must drop something"


def test_views_of_the_record(planted):
    nn, neurons, _ = planted
    found = sf.validation.minimal_set(nn, RAGGED, neurons.latents([1, 3, 8]), BOTH, holds=1.0)
    assert len(repr(found).splitlines()) == 3
    table = found.to_pandas()
    assert list(table) == ["site", "latent", "metric", "held"]
    assert len(table) == 2 and table["latent"].tolist()[1] == 1


def test_what_cannot_be_pruned_is_refused(planted):
    nn, neurons, _ = planted
    start = neurons.latents([1, 5])
    with pytest.raises(sf.SaefeatError, match="a set that suffices"):
        sf.validation.minimal_set(nn, RAGGED, start, BOTH, holds=1.0)
    with pytest.raises(sf.SaefeatError, match="no latents at all"):
        sf.validation.minimal_set(nn, RAGGED, start, BOTH, holds=0.0)
    with pytest.raises(sf.errors.LatentError, match="at least one latent"):
        sf.validation.minimal_set(nn, RAGGED, sf.Latents(()), BOTH)
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(sf.SaefeatError, match=f"`holds` is a pair with {share}"):
            sf.validation.minimal_set(nn, RAGGED, start, BOTH, holds=(lambda m: m > 0, share))
    for bad in (lambda m: bool((m > 0).all()), lambda m: m, lambda m: m[:1] > 0):
        with pytest.raises(sf.SaefeatError, match="one a prompt"):
            sf.validation.minimal_set(nn, RAGGED, start, BOTH, holds=bad)
    with pytest.raises(sf.SaefeatError, match="BASELINE_TOP"):
        sf.validation.minimal_set(nn, RAGGED, start, sf.logit_diff(sf.metrics.BASELINE_TOP, 3))
    with pytest.raises(sf.errors.FiringError):
        sf.validation.minimal_set(nn, RAGGED, start, BOTH, where=sf.Tokens.ids(2))


def test_one_latent_is_left_where_rounding_would_take_the_last(planted):
    """A criterion on the edge: no latents fail it once, and pass it when they are tried again."""
    nn, neurons, _ = planted
    answers = iter([True, False])

    def holds(m):
        return torch.full_like(m, next(answers, True), dtype=torch.bool)

    found = sf.validation.minimal_set(nn, RAGGED, neurons.latents([3, 8]), BOTH, holds=holds)
    assert len(found.latents) == 1


def test_the_bar_can_be_shown(planted, capsys):
    nn, neurons, _ = planted
    sf.validation.minimal_set(nn, RAGGED, neurons.latents([1, 3, 8]), BOTH, holds=1.0)
    sf.validation.interactions(nn, RAGGED, neurons.latents([1, 3]), BOTH)
    assert capsys.readouterr().err == ""
    sf.validation.minimal_set(
        nn, RAGGED, neurons.latents([1, 3, 8]), BOTH, holds=1.0, progress=True
    )
    sf.validation.interactions(nn, RAGGED, neurons.latents([1, 3]), BOTH, progress=True)
    shown = capsys.readouterr().err
    assert "minimal_set" in shown and "interactions" in shown


# ---------------------------------------------------------------- interactions


@pytest.mark.parametrize(
    ("metric", "pair"),
    [(BOTH, 1.0), (EITHER, -1.0), (SUM, 0.0)],
    ids=["both", "either", "sum"],
)
def test_planted_interactions(planted, metric, pair):
    nn, neurons, _ = planted
    found = sf.validation.interactions(nn, RAGGED, neurons.latents([8, 1, 3]), metric)
    wanted = torch.zeros(3, 3)
    wanted[0, 2] = wanted[2, 0] = pair
    torch.testing.assert_close(found.values, wanted, atol=1e-6, rtol=0)
    if pair:
        ((latents, value),) = found.top(1)
        assert set(latents) == set(neurons.latents([3, 8])) and value == pair


def test_an_and_and_an_or_of_what_supports_a_metric(planted):
    """The signs that the docstring names, on products and maxima of real values."""
    nn, neurons, x = planted
    a, b = x[:, 3].abs(), x[:, 8].abs()
    chosen = neurons.latents([3, 8])
    product = sf.metrics.custom(lambda logits: (logits[:, 3] * logits[:, 8]).abs())
    found = sf.validation.interactions(nn, RAGGED, chosen, product).by_prompt[0, 1]
    torch.testing.assert_close(found, a * b, atol=1e-5, rtol=1e-4)
    largest = sf.metrics.custom(
        lambda logits: torch.maximum(logits[:, 3].abs(), logits[:, 8].abs())
    )
    found = sf.validation.interactions(nn, RAGGED, chosen, largest).by_prompt[0, 1]
    torch.testing.assert_close(found, -torch.minimum(a, b), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", [None, sf.Tokens.last(2)], ids=["all", "last"])
def test_interactions_are_those_of_single_runs(where):
    nn, metric = wrapped(build("llama")), sf.logit_diff(5, 7)
    first, last = make_sae("standard", layer=0), make_sae("jumprelu", layer=2)
    chosen = first.latents([3, 11]) | last.latents([5, 7])
    found = sf.validation.interactions(nn, RAGGED, chosen, metric, where=where, batch_size=7)

    def value(latents) -> torch.Tensor:
        edit = sf.Ablate(latents, where=where) if len(latents) else None
        logits = sf.run(nn, RAGGED, edit).logits
        return logits[:, 5] - logits[:, 7]

    one, clean = chosen.singles(), value(sf.Latents(()))
    assert found.by_prompt.abs().max() > 1e-4
    for i in range(4):
        torch.testing.assert_close(found.alone[i], value(one[i]), atol=1e-5, rtol=1e-5)
        for j in range(4):
            wanted = value(one[i] | one[j]) - value(one[i]) - value(one[j]) + clean
            wanted = torch.zeros(3) if i == j else wanted
            torch.testing.assert_close(found.by_prompt[i, j], wanted, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(
                found.pairs[i, j], value(one[i] | one[j]), atol=2e-5, rtol=1e-5
            )
    assert found.to_pandas().shape == (4, 4)
    with pytest.raises(sf.SaefeatError, match=r"Interactions\.top: `n`"):
        found.top(-1)
    assert len(repr(found).splitlines()) == 7


def test_one_latent_has_no_interactions(planted):
    nn, neurons, _ = planted
    with pytest.raises(sf.errors.LatentError, match="at least 2"):
        sf.validation.interactions(nn, RAGGED, neurons.latents([3]), SUM)
