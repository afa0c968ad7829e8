"""faithfulness against plain hooks, and against what is known of a linear metric."""

from __future__ import annotations

import pytest
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
    tokenizer,
    unit,
    wrapped,
)
from saefeat.validation.ranking import by_prompt, mass, matched_sets, random_sets, ranking

F64 = torch.float64
METRIC = sf.logit_diff([5, 9], 7)


def measure(logits: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits[:, [5, 9]], 1) - logits[:, 7]


def ablating(sae, latents, tokens, to=None):
    """x → x with these latents zero (or ``to`` [k]) at ``tokens`` [b, t]."""
    index = sorted(latents)

    def edit(x):
        wanted = 0.0 if to is None else to[index].double()
        step = (wanted - sae.encode(x, index)) @ sae.directions(index).to(x.dtype)
        return torch.where(tokens[..., None], x + step, x)

    return edit


def under(model, batch, edits) -> torch.Tensor:
    with raw_hooks(model, edits):
        return measure(forward(model, batch)[:, -1])


# ---------------------------------------------------------------- against plain hooks


@pytest.mark.parametrize("to", ["zero", "mean"])
@pytest.mark.parametrize("where", [None, sf.Tokens.last(2)], ids=["all", "last"])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_kept_removed_and_marginal_metrics(family, where, to):
    """Two sites, the later one read after the earlier one's ablation."""
    model, batch = build(family, F64), batch_of()
    saes = {1: make_sae("jumprelu", layer=1), 2: make_sae("standard", seed=1, layer=2)}
    attribute = sf.Attribute(sf.dictionaries.Dictionaries(saes.values()), METRIC, where=where)
    scores = attribute(wrapped(model), RAGGED)
    found = sf.validation.faithfulness(
        attribute, wrapped(model), RAGGED, scores, sizes=[1, 3, 6], controls=1, to=to
    )
    real = batch["attention_mask"].bool()
    tokens = real if where is None else real & (torch.arange(real.shape[1]) >= real.shape[1] - 2)
    means = {}
    for layer, sae in saes.items():
        held = []
        with raw_hooks(model, {layer: lambda x, held=held: held.append(x) or x}):
            forward(model, batch)
        f = torch.where(tokens[..., None], sae.encode(held[0]), 0.0)
        means[layer] = None if to == "zero" else (f.sum(1) / tokens.sum(1, keepdim=True)).mean(0)

    def without(latents) -> torch.Tensor:
        """``latents``: (layer, index) pairs."""
        edits = {
            layer: ablating(sae, {i for at, i in latents if at == layer}, tokens, means[layer])
            for layer, sae in saes.items()
        }
        return under(model, batch, edits)

    everything = {(layer, i) for layer, sae in saes.items() for i in range(sae.d_sae)}
    close = {"atol": 2e-5, "rtol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(found.empty, without(everything), **close)
    torch.testing.assert_close(found.clean, without(set()), **close)
    for of, sets in found.sets.items():
        for n, size in enumerate(found.sizes):
            chosen = {(d + 1, i) for d, i in sets[0, :size].tolist()}
            kept, removed = without(everything - chosen), without(chosen)
            torch.testing.assert_close(found.kept[of][n, 0], kept, **close)
            torch.testing.assert_close(found.removed[of][n, 0], removed, **close)
            if of != "top":
                continue
            left = {(site.layer, i) for site, i in found.latents(size)}
            assert left == chosen
            singles = [next(iter(one)) for one in found.latents(size).singles()]
            for (site, i), row in zip(singles, found.marginals[n], strict=True):
                wanted = without(everything - (chosen - {(site.layer, i)}))
                torch.testing.assert_close(row, wanted, **close)
    assert found.kept["top"].std() > 1e-3


def test_the_curves_are_the_definitions():
    nn, sae = wrapped(build("llama")), make_sae("standard")
    attribute = sf.Attribute(sae, METRIC)
    scores = attribute(nn, RAGGED)
    found = sf.validation.faithfulness(attribute, nn, RAGGED, scores, sizes=[2, 5], controls=3)
    whole = found.clean.mean() - found.empty.mean()
    for n in range(2):
        for of in ("top", "random", "matched"):
            kept = (found.kept[of][n].mean() - found.empty.mean()) / whole
            removed = (found.removed[of][n].mean() - found.empty.mean()) / whole
            assert found.curve("faithfulness", of)[n].value == pytest.approx(float(kept), abs=1e-5)
            assert found.curve("completeness", of)[n].value == pytest.approx(
                float(removed), abs=1e-5
            )
        steps = [
            abs(float((found.kept["top"][n, 0] - row).mean() / whole)) for row in found.marginals[n]
        ]
        assert found.curve("minimality")[n].value == pytest.approx(min(steps), abs=1e-5)
        for point in found.curve("faithfulness"):
            assert point.low <= point.value <= point.high


# ---------------------------------------------------------------- a metric of which all is known


def linear():
    nn, sae = wrapped(readable(over_tokens=True)), make_sae("standard", layer=2)
    attribute = sf.Attribute(sae, sf.logit_diff(3, 8))
    return nn, attribute, attribute(nn, RAGGED)


def test_where_effects_add_up_all_follows_from_the_scores():
    nn, attribute, scores = linear()
    found = sf.validation.faithfulness(attribute, nn, RAGGED, scores, sizes=[1, 4, 12], controls=2)
    ranked = ranking(scores, "test")
    loss = -by_prompt(scores, ranked.number, scores.score, len(ranked.keys)).mean(1)  # if removed
    whole = float(loss.sum())
    assert float((found.clean - found.empty).mean()) == pytest.approx(whole, abs=1e-3)
    top, rest = found.curve("faithfulness"), found.curve("completeness")
    for n, size in enumerate(found.sizes):
        share = float(loss[:size].sum()) / whole
        assert top[n].value == pytest.approx(share, abs=1e-3)
        assert rest[n].value == pytest.approx(1 - share, abs=1e-3)
        least = float(loss[:size].abs().min()) / abs(whole)
        assert found.curve("minimality")[n].value == pytest.approx(least, abs=1e-3)


def test_the_top_beats_its_controls():
    nn, attribute, scores = linear()
    found = sf.validation.faithfulness(attribute, nn, RAGGED, scores, sizes=[4], controls=4)
    moved = {
        of: (found.removed[of] - found.clean).abs().mean() for of in ("top", "random", "matched")
    }
    assert moved["top"] > 1.2 * max(moved["random"], moved["matched"])


def test_all_kept_is_clean():
    nn, attribute, _ = linear()
    few = sf.Attribute(attribute.target.latents([3, 5, 17]), attribute.metric)
    scores = few(nn, RAGGED)
    size = len(scores.latent.unique())
    found = sf.validation.faithfulness(few, nn, RAGGED, scores, sizes=[size], controls=0)
    assert set(found.sets) == {"top"}
    assert found.curve("faithfulness")[0].value == pytest.approx(1, abs=1e-6)
    assert found.curve("completeness")[0].value == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------- controls


def test_controls_are_of_equal_size_outside_the_top_and_drawn_anew():
    nn = wrapped(build("llama"))
    saes = sf.dictionaries.Dictionaries(
        [make_sae("jumprelu", layer=0), make_sae("standard", layer=1)]
    )
    scores = sf.Attribute(saes, METRIC)(nn, RAGGED)
    ranked = ranking(scores, "test")
    k = 10
    top = set(map(tuple, ranked.keys[:k].tolist()))
    moved = set(map(tuple, ranked.keys.tolist()))
    matched, random = matched_sets(scores, ranked, k, 3, 0), random_sets(ranked, k, 3, 0)
    for sets in (matched, random):
        assert sets.shape == (3, k, 2)
        for drawn in sets:
            keys = set(map(tuple, drawn.tolist()))
            assert len(keys) == k and not keys & top and keys <= moved
        assert len({str(drawn.tolist()) for drawn in sets}) == 3
    assert torch.equal(matched, matched_sets(scores, ranked, k, 3, 0))
    assert torch.equal(matched[..., 0], ranked.keys[:k, 0].expand(3, k))  # of the same dictionary

    size = dict(zip(map(tuple, ranked.keys.tolist()), mass(scores, ranked).log(), strict=True))

    def distance(sets) -> float:
        pairs = zip(
            sets.reshape(-1, 2).tolist(), ranked.keys[:k].repeat(3, 1).tolist(), strict=True
        )
        return float(sum(abs(size[tuple(a)] - size[tuple(b)]) for a, b in pairs))

    assert distance(matched) < 0.6 * distance(random)


def test_mass_is_what_a_latent_writes():
    nn, sae = wrapped(build("llama")), make_sae("standard")
    scores = sf.Attribute(sae, METRIC)(nn, RAGGED)
    ranked = ranking(scores, "test")
    reading = sf.run(nn, RAGGED, sf.Probe(sae)).readings[0]
    total = torch.where(reading.mask, reading.values, 0.0).sum((0, 1))
    wanted = total * sae.directions().norm(dim=1)
    torch.testing.assert_close(
        mass(scores, ranked).float(), wanted[ranked.keys[:, 1]], atol=1e-4, rtol=1e-4
    )


def test_how_nearly_controls_match_is_known():
    nn, sae = wrapped(build("llama")), make_sae("jumprelu")
    attribute = sf.Attribute(sae, METRIC)
    scores = attribute(nn, RAGGED)
    found = sf.validation.faithfulness(attribute, nn, RAGGED, scores, sizes=[2, 6], controls=3)
    reading = sf.run(nn, RAGGED, sf.Probe(sae)).readings[0]
    written = torch.where(reading.mask, reading.values, 0.0).sum((0, 1))
    written = written * sae.directions().norm(dim=1)
    for of in ("random", "matched"):
        for n, size in enumerate((2, 6)):
            control = written[found.sets[of][:, :size, 1]].sum(1).mean()
            top = written[found.sets["top"][0, :size, 1]].sum()
            assert found.balance(of)[n] == pytest.approx(float(control / top), rel=1e-4)
    assert found.balance("random")[1] < found.balance("matched")[1]
    assert f"matched {found.balance('matched')[1]:.2f}" in repr(found).splitlines()[-2]
    with pytest.raises(sf.SaefeatError, match=r"Faithfulness\.balance.*'other'"):
        found.balance("other")


def test_a_prompt_without_a_scored_token_has_no_part_in_the_mean():
    """w5 is in two of three prompts: the mean is theirs, not two thirds of it."""
    prompts = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w10 w5 w12 w13"]
    model, batch, sae = build("llama", F64), batch_of(prompts), make_sae("standard")
    word = tokenizer()("w5")["input_ids"][0]
    attribute = sf.Attribute(sae, METRIC, where=sf.Tokens.ids(word))
    scores = attribute(wrapped(model), prompts)
    found = sf.validation.faithfulness(
        attribute, wrapped(model), prompts, scores, sizes=[2], controls=0, to="mean"
    )
    held, tokens = [], batch["input_ids"] == word
    with raw_hooks(model, {1: lambda x: held.append(x) or x}):
        forward(model, batch)
    assert tokens.sum() == 2
    edits = {1: ablating(sae, set(range(sae.d_sae)), tokens, sae.encode(held[0][tokens]).mean(0))}
    torch.testing.assert_close(
        found.empty, under(model, batch, edits), atol=2e-5, rtol=1e-4, check_dtype=False
    )


# ---------------------------------------------------------------- the record


def test_views_of_the_record():
    nn, attribute, scores = linear()
    found = sf.validation.faithfulness(attribute, nn, RAGGED, scores, sizes=[1, 2, 4], controls=1)
    table = found.to_pandas()
    assert list(table) == ["size", "measure", "of", "value", "low", "high"]
    assert len(table) == 3 * (2 * 3 + 1)
    lines = repr(found).splitlines()
    assert len(lines) == 7 and max(map(len, lines)) <= 120
    assert "random" in lines[-2] and "matched" in lines[-2]
    assert found.latents(2) == found.latents(4) & found.latents(2)
    for size in (0, 5, 1.5):
        with pytest.raises(sf.SaefeatError, match=r"Faithfulness\.latents: `size`"):
            found.latents(size)
    figure = found.plot()
    assert [axes.get_title() for axes in figure.axes] == [
        "faithfulness",
        "completeness",
        "minimality",
    ]
    assert len(figure.axes[0].lines) == 4
    for measure, of in (("faith", "top"), ("minimality", "random"), ("faithfulness", "other")):
        with pytest.raises(sf.SaefeatError, match=r"Faithfulness\.curve"):
            found.curve(measure, of)


def test_one_prompt_has_no_interval():
    nn, attribute, _ = linear()
    found = sf.validation.faithfulness(
        attribute, nn, RAGGED[:1], attribute(nn, RAGGED[:1]), sizes=[2], controls=0
    )
    (point,) = found.curve("faithfulness")
    assert point.low != point.low and point.high != point.high and point.value == point.value


def test_default_sizes_leave_room_for_controls():
    nn, attribute, _ = linear()
    few = sf.Attribute(attribute.target.latents(range(16)), attribute.metric)
    scores = few(nn, RAGGED)
    moved = len(scores.latent.unique())
    found = sf.validation.faithfulness(few, nn, RAGGED, scores, controls=1)
    assert found.sizes == tuple(2**n for n in range(6) if 2**n <= moved // 2)


def test_the_bar_can_be_shown(capsys):
    nn, attribute, scores = linear()
    options = {"sizes": [1, 3], "controls": 2}
    sf.validation.faithfulness(attribute, nn, RAGGED, scores, **options)
    assert capsys.readouterr().err == ""
    sf.validation.faithfulness(attribute, nn, RAGGED, scores, **options, progress=True)
    assert "24/24" in capsys.readouterr().err  # it counts every set


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options",
    [
        {"sizes": []},
        {"sizes": [0]},
        {"sizes": [4, 2]},
        {"sizes": [2, 2]},
        {"sizes": [9999]},
        {"sizes": [1.5]},
        {"sizes": [45]},  # no room for controls
        {"controls": -1},
        {"to": "median"},
        {"seed": None},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    nn, attribute, scores = linear()
    with pytest.raises(sf.SaefeatError, match=f"faithfulness.*`{next(iter(options))}`"):
        sf.validation.faithfulness(attribute, nn, RAGGED, scores, **options)


def test_scores_of_something_else_are_refused():
    nn, attribute, scores = linear()
    with pytest.raises(sf.errors.PromptError, match="other prompts"):
        sf.validation.faithfulness(attribute, nn, RAGGED[:2], scores)
    again = sf.Attribute(make_sae("standard", layer=2), attribute.metric)
    with pytest.raises(sf.errors.LatentError, match="loaded again"):
        sf.validation.faithfulness(again, nn, RAGGED, scores)


def test_a_metric_the_latents_do_not_carry_is_refused():
    nn = wrapped(readable())
    still = sf.Direction(torch.eye(D)[:2], site="resid_post.2")
    attribute = sf.Attribute(still, sf.metrics.logit(9))
    scores = attribute(nn, RAGGED)
    with pytest.raises(sf.SaefeatError, match="degenerate"):
        sf.validation.faithfulness(attribute, nn, RAGGED, scores, sizes=[1], controls=0)


def test_prompts_that_cancel_are_told():
    """On a real model -3.3 and +4.2 left .5, and a faithfulness of 11."""
    v, one = sf.Neurons("resid_post.0", 4), torch.ones(1, 1, 2)

    def told(change):
        clean = torch.tensor(change)
        sets, moved = {"top": torch.zeros(1, 1, 2).long()}, {"top": one}
        numbers = clean, torch.zeros(2), moved, moved, (torch.zeros(1, 2),)
        return repr(sf.validation.Faithfulness((v,), (1,), sets, *numbers))

    assert "move by -3.3 to 4.2, and what is left in the mean, 0.45" in told([-3.3, 4.2])
    for change in ([3.3, 4.2], [-3.3, -4.2], [-1.0, 4.2]):
        assert "move by" not in told(change)


def test_a_baseline_ranks_and_ablation_stays_zero():
    """The sets are ranked by the attribution's baseline; what is ablated goes to zero."""
    model, batch, sae = build("llama", F64), batch_of(), make_sae("standard")
    base = sf.Ablate(sf.Direction(unit(3), site="resid_post.0"))
    attribute = sf.Attribute(sae, METRIC, baseline=base)
    scores = attribute(wrapped(model), RAGGED)
    found = sf.validation.faithfulness(
        attribute, wrapped(model), RAGGED, scores, sizes=[3], controls=0
    )
    edits = {1: ablating(sae, set(range(sae.d_sae)), batch["attention_mask"].bool())}
    torch.testing.assert_close(
        found.empty, under(model, batch, edits), atol=2e-5, rtol=1e-4, check_dtype=False
    )
