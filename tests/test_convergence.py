"""Integrated gradients say whether they converged, and adapt their nodes when asked to."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import saefeat as sf
from helpers import PAD, RAGGED, D, batch_of, blocks_of, build, make_sae, plant_sinks, unit, wrapped
from saefeat.attribution.quadrature import POINTS, in_panels, left_out

METRIC = sf.logit_diff([5, 9], 7)
SITES = [f"resid_post.{n}" for n in range(3)]
Convergence = sf.attribution.Convergence
Attribution = sf.attribution.Attribution


def neurons(*layers: int) -> sf.dictionaries.Dictionaries:
    return sf.dictionaries.Dictionaries([sf.Neurons(SITES[n], D) for n in layers])


def quiet(job: sf.Attribute, *args, **options) -> Attribution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sf.errors.ConvergenceWarning)
        return job(*args, **options)


@pytest.fixture(scope="module")
def model():
    return wrapped(build("llama"))


# ---------------------------------------------------------------- rules


def test_left_out_is_the_same_rule_at_half_the_nodes():
    """The left rule at 2N nodes holds that at N; the difference is what is lost."""
    f = np.exp
    x = np.arange(8) / 8
    half = f(np.arange(4) / 4).mean()
    lost = left_out(x, np.full(8, 1 / 8), "left")
    assert abs(lost[0] @ f(x) - (f(x).mean() - half)) < 1e-12


@pytest.mark.parametrize(("rule", "degree"), [("left", 0), ("midpoint", 1), ("gauss", 3)])
def test_nothing_is_lost_of_what_a_rule_takes_a_function_to_be(rule, degree):
    nodes = sf.IG(8, rule).nodes()
    x, w = np.array(nodes).T
    lost = left_out(x, w, rule)
    assert lost.shape == (2, 8)
    assert np.abs(lost @ x**degree).max() < 1e-12
    assert np.abs(lost @ np.sin(40 * x)).max() > 1e-2
    assert left_out([0.5], [1.0], rule).shape == (0, 1)


def test_given_nodes_integrate_what_their_rule_promises():
    for rule, degree in (("left", 0), ("midpoint", 1), ("gauss", 11)):
        x, w = np.array(sf.IG(6, rule).nodes()).T
        assert abs(w @ x**degree - 1 / (degree + 1)) < 1e-12


def test_every_node_is_left_out_once():
    x, w = np.array(sf.IG(7, "midpoint").nodes()).T
    lost = left_out(x, w, "midpoint")
    assert (lost[0, 1::2] > 0).all() and (lost[1, 0::2] > 0).all()


def test_panels_are_gauss_and_kronrod():
    x, kronrod, gauss = np.array(POINTS).T
    for power in range(12):
        exact = 1 / (power + 1)
        assert abs(kronrod @ x**power - exact) < 1e-12
        assert power > 5 or abs(gauss @ x**power - exact) < 1e-12
    assert abs(sum(weight for _, weight in in_panels()) - 1) < 1e-12


# ---------------------------------------------------------------- what is said


def test_a_smooth_path_converges(model):
    """Held against 256 Gauss nodes: the verdict's error is above the true one, and small."""
    sae = make_sae("jumprelu")
    dense = sf.Attribute(sae, METRIC, method=sf.IG(256, "gauss"))(model, RAGGED)
    found = sf.Attribute(sae, METRIC, method=sf.IG(8, "midpoint"))(model, RAGGED)
    said = found.convergence
    assert said.verdict == "converged" and said.share < 0.1
    assert said.nodes.tolist() == [8, 8, 8] and not len(said.unsettled)
    off = torch.zeros(3).index_add_(0, found.prompt, found.score - dense.score).abs()
    assert (off <= said.error[:, 0] + 1e-5).all()
    torch.testing.assert_close(said.gap[:, 0], found.gap, atol=1e-4, rtol=1e-3)
    assert "integration converged: with 8 nodes" in repr(found)


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "with a sink"])
@pytest.mark.parametrize(
    "method", [sf.IG(8), sf.IG(8, "midpoint"), sf.IG(8, "gauss"), sf.IG(32, "midpoint")], ids=repr
)
def test_emptied_sites_are_told(sinks, method):
    """Three sites in a row at zero: the norms behind each divide by what little is left."""
    bare = plant_sinks(build("llama")) if sinks else build("llama")
    job = sf.Attribute(neurons(0, 1, 2), METRIC, method=method)
    with pytest.warns(sf.errors.ConvergenceWarning, match="baseline=Paired") as caught:
        found = job(wrapped(bare), RAGGED)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert found.convergence.verdict == "not converged"
    assert found.convergence.unsettled.tolist() == [0, 1, 2]
    assert "integration not converged" in repr(found) and "integration not" in found.to_html()
    assert SITES[found.convergence.worst] in repr(found).split("integration")[1]


def test_a_baseline_on_the_models_ground_does_not_warn(model):
    other = sf.attribution.Paired([p.replace("w", "w1") for p in RAGGED])
    job = sf.Attribute(neurons(0, 1, 2), METRIC, other, sf.IG(32, "midpoint"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert job(model, RAGGED).convergence.verdict == "converged"


def test_few_nodes_say_nothing(model):
    pair = sf.dictionaries.Dictionaries([make_sae("jumprelu", s, n) for n, s in enumerate(SITES)])
    for steps in (1, 2, 4):
        found = sf.Attribute(pair, METRIC, method=sf.IG(steps))(model, RAGGED)
        assert found.convergence.verdict.startswith(f"unknown: {steps} node")
        assert f"integration unknown: {steps} node" in repr(found)
    assert sf.Attribute(pair, METRIC)(model, RAGGED).convergence is None


def test_few_nodes_are_held_against_the_known_change(model):
    """With one site the slopes must add up to the metric's change, however few the nodes."""
    sae = make_sae("jumprelu")
    exact = sf.Attribute(sae, METRIC, method=sf.IG(2, "gauss"))(model, RAGGED)
    assert exact.convergence.verdict == "converged"
    coarse = sf.Attribute(sae, METRIC, method=sf.IG(2))(model, RAGGED)
    assert coarse.convergence.verdict == "not converged"
    error = coarse.gap.abs() / (coarse.baseline - coarse.clean).abs()
    torch.testing.assert_close(coarse.convergence.shares, error, atol=1e-3, rtol=1e-2)


def test_each_site_alone_has_a_gap_of_its_own(model):
    job = sf.Attribute(neurons(0, 2), METRIC, method=sf.IG(8, "midpoint"), one_site=True)
    found = quiet(job, model, RAGGED)
    torch.testing.assert_close(found.convergence.gap, found.gap_by_site, atol=1e-3, rtol=1e-3)


def test_no_gap_is_claimed_where_the_paths_end_was_not_run(model):
    push = sf.Ablate(sf.Direction(unit(), site=SITES[0]))
    for how in (
        {"baseline": push},
        {"baseline": sf.attribution.Paired([p.replace("w", "w1") for p in RAGGED])},
        {"semantics": "through_sae"},
        {"backward": sf.attribution.RelP()},
        {"backward": sf.attribution.GradDrop()},
    ):
        job = sf.Attribute(make_sae("jumprelu"), METRIC, method=sf.IG(8, "midpoint"), **how)
        said = quiet(job, model, RAGGED).convergence
        assert said.gap.isnan().all() and not said.error.isnan().any(), how


def test_tokens_that_are_not_scored_do_not_count(model):
    """The left rule at two nodes loses, without its second, what one node is off by: by token."""
    other = sf.attribution.Paired([p.replace("w", "w1") for p in RAGGED])
    job = sf.Attribute(neurons(1), METRIC, other, sf.IG(2), sf.Tokens.last(2))
    two, one = job(model, RAGGED), replace(job, method=sf.IG(1))(model, RAGGED)
    lost = torch.zeros(3, 6)
    for found, sign in ((two, 1), (one, -1)):
        lost.index_put_((found.prompt, found.position), sign * found.score, accumulate=True)
    assert (lost != 0).sum() == 6
    disagreement = two.convergence.disagreement[:, 0]
    torch.testing.assert_close(disagreement, lost.abs().sum(1), atol=1e-5, rtol=1e-3)


def test_two_ends_that_are_alike_do_not_make_an_error_of_rounding():
    """The metric goes far on its way and comes back: a tenth of that is what counts."""
    one = torch.ones(1, 1)
    from saefeat.attribution.convergence import held_against

    assert held_against(torch.tensor(0.0), torch.tensor(5.0)) == 0.5
    still = Convergence(torch.tensor([8]), 0 * one, 0 * one, 0 * one, 0.1)
    assert still.verdict == "converged" and still.share == 0.0


def test_one_prompt_may_be_off_among_many_that_are_not():
    moved = torch.ones(4, 1)
    lost = torch.tensor([[0.01], [0.2], [0.01], [0.01]])
    said = Convergence(torch.full((4,), 8), moved, lost, torch.full((4, 1), torch.nan), 0.1)
    assert said.verdict == "converged" and said.unsettled.tolist() == [1]
    worse = replace(said, disagreement=10 * lost)
    assert worse.verdict == "not converged" and worse.unsettled.tolist() == [1]


# ---------------------------------------------------------------- kept and joined


def same(one: Convergence, other: Convergence) -> None:
    assert one.tolerance == other.tolerance and one.verdict == other.verdict
    for name in ("nodes", "moved", "disagreement", "gap"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), atol=1e-4, rtol=1e-3, equal_nan=True
        )


@pytest.mark.parametrize(
    "method", [sf.IG(8, "midpoint"), sf.IG(28, "gauss", tolerance=0.02)], ids=repr
)
def test_the_verdict_is_kept(method, model, tmp_path):
    """By batch, by checkpoint, by file, and back."""
    job = sf.Attribute(neurons(0, 1, 2), METRIC, method=method)
    whole = quiet(job, model, RAGGED)
    same(quiet(job, model, RAGGED, batch_size=1).convergence, whole.convergence)
    folder = tmp_path / "job"
    first = quiet(job, model, RAGGED, batch_size=2, checkpoint=folder)
    (folder / "batch-000001.safetensors").unlink()
    again = quiet(job, model, RAGGED, batch_size=2, checkpoint=folder)
    same(again.convergence, first.convergence)
    with pytest.warns(sf.errors.ConvergenceWarning):  # a job that is resumed warns as well
        job(model, RAGGED, batch_size=2, checkpoint=folder)
    back = Attribution.load(whole.save(tmp_path / "scores.safetensors"))
    assert repr(back) == repr(whole) and repr(back.convergence) == repr(whole.convergence)
    for name in ("nodes", "moved", "disagreement", "gap"):
        one, other = getattr(back.convergence, name), getattr(whole.convergence, name)
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


def test_a_file_whose_verdict_does_not_fit_is_refused(model, tmp_path):
    found = quiet(sf.Attribute(neurons(0), METRIC, method=sf.IG(8)), model, RAGGED)
    said = found.convergence
    for wrong in (
        replace(said, nodes=said.nodes[:2]),
        replace(said, moved=said.moved[:, 0]),
        replace(said, gap=said.gap.long()),
        replace(said, tolerance=2.0),
    ):
        path = replace(found, convergence=wrong).save(tmp_path / "scores.safetensors")
        with pytest.raises(sf.errors.FileError, match="convergence"):
            Attribution.load(path)
    assert "convergence.gap" in load_file(found.save(tmp_path / "right.safetensors"))


def test_in_a_trace_one_node_says_nothing(model):
    import nnsight

    for method, verdict in ((sf.IG(1), "unknown: 1 node"), (sf.attribution.AtP(), None)):
        job = sf.Attribute(make_sae("jumprelu"), METRIC, method=method)
        with model.trace(RAGGED[0]):
            scores = nnsight.save(job.watch(model).scores(model.output.logits))
        if verdict is None:
            assert scores.convergence is None
        else:
            assert scores.convergence.verdict.startswith(verdict)


# ---------------------------------------------------------------- adaptive nodes


NEAR = 0.02
"""Nearly nothing is left of a site whose neurons are all at this."""


def slope(plain, batch, layer, alpha):
    """[b, t, d] float64: by a plain hook, the metric's gradient with a site moved toward NEAR."""
    kept = []

    def move(_, __, out):
        x = out[0] if isinstance(out, tuple) else out
        kept.append((x + alpha * (NEAR - x)).detach().requires_grad_())
        return (kept[0], *out[1:]) if isinstance(out, tuple) else kept[0]

    handle = blocks_of(plain)[layer].register_forward_hook(move)
    last = plain(**batch).logits[:, -1]
    handle.remove()
    metric = last[:, [5, 9]].logsumexp(-1) - last[:, 7]
    return torch.autograd.grad(metric.sum(), kept[0])[0]


def dense(prompts, layer, count):
    """[b, t, d]: Gauss-Legendre on panels that halve toward the rough end, in float64."""
    plain, batch = build("llama", torch.float64), batch_of(prompts)
    clean = []
    handle = blocks_of(plain)[layer].register_forward_hook(
        lambda _, __, out: clean.append((out[0] if isinstance(out, tuple) else out).detach())
    )
    plain(**batch)
    handle.remove()
    edges = [0.0, *(1 - 0.5**n for n in range(1, 12)), 1.0]
    points, weights = np.polynomial.legendre.leggauss(count)
    total = torch.zeros_like(clean[0])
    for start, stop in pairwise(edges):
        for point, weight in zip(points, weights, strict=True):
            alpha = start + (stop - start) * (point + 1) / 2
            total += (stop - start) * weight / 2 * slope(plain, batch, layer, alpha)
    real = batch["attention_mask"].bool()[..., None]
    return ((NEAR - clean[0]) * total * real).detach()


def laid_out(found, prompts):
    pads = batch_of(prompts)["attention_mask"]
    out = torch.zeros(*pads.shape, D, dtype=torch.float64)
    column = found.position + (pads.shape[1] - pads.sum(1))[found.prompt]
    out[found.prompt, column, found.latent] = found.score.double()
    return out


def test_adaptive_nodes_reach_their_tolerance(model):
    """Against a dense quadrature of plain hooks in float64, where eight nodes are far off."""
    wanted = dense(RAGGED, 1, 12)
    change = wanted.sum((1, 2)).abs()

    def off(found):
        return (laid_out(found, RAGGED) - wanted).sum(-1).abs().sum(1) / change

    target = neurons(1)
    near = sf.attribution.Fixed(target.latents(), NEAR)
    eight = sf.Attribute(target, METRIC, near, sf.IG(8, "midpoint"))(model, RAGGED)
    assert (off(eight) > 0.3).all()
    for tolerance in (0.3, 0.05):
        method = sf.IG(512, "gauss", tolerance=tolerance)
        found = quiet(sf.Attribute(target, METRIC, near, method), model, RAGGED)
        said = found.convergence
        assert said.verdict == "converged" and said.tolerance == tolerance
        assert (off(found) < tolerance).all() and (said.shares <= tolerance).all()
        assert ((said.nodes > 14) & (said.nodes <= 512)).all()


def test_a_smooth_path_needs_the_first_nodes_alone(model):
    sae = make_sae("jumprelu")
    found = sf.Attribute(sae, METRIC, method=sf.IG(512, "gauss", tolerance=0.05))(model, RAGGED)
    assert found.convergence.nodes.tolist() == [14, 14, 14]
    exact = sf.Attribute(sae, METRIC, method=sf.IG(32, "gauss"))(model, RAGGED)
    torch.testing.assert_close(found.score, exact.score, atol=1e-4, rtol=1e-3)


def test_nodes_that_are_spent_are_said(model):
    job = sf.Attribute(neurons(0, 1, 2), METRIC, method=sf.IG(42, "gauss", tolerance=0.01))
    with pytest.warns(sf.errors.ConvergenceWarning, match="at most 1.0% of it wanted"):
        found = job(model, RAGGED)
    assert found.convergence.verdict == "not converged"
    assert found.convergence.nodes.tolist() == [42, 42, 42]


@pytest.mark.parametrize("one_site", [False, True])
def test_adaptive_nodes_are_each_prompts_own(one_site, model):
    """Batched, one by one, and however many nodes share a pass."""
    saes = neurons(1, 2)
    near = sf.attribution.Fixed(saes.latents(), 10 * NEAR)
    method = sf.IG(256, "gauss", tolerance=0.2)
    job = sf.Attribute(saes, METRIC, near, method, ~sf.Tokens.ids(PAD), one_site=one_site)
    whole = quiet(job, model, RAGGED)
    for options in ({"batch_size": 1}, {"steps_at_once": 1}, {"steps_at_once": 5}):
        found = quiet(job, model, RAGGED, **options)
        assert torch.equal(found.convergence.nodes, whole.convergence.nodes)
        for one, other in zip(found.totals(per="prompt"), whole.totals(per="prompt"), strict=True):
            torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-2)
    assert (whole.convergence.shares <= 0.2).all()


@pytest.mark.slow
def test_adaptive_nodes_with_backward_rules(model):
    for rule in (sf.attribution.RelP(), sf.attribution.GradDrop()):
        asked = {"backward": rule}
        method = sf.IG(56, "gauss", tolerance=0.05)
        found = sf.Attribute(make_sae("jumprelu"), METRIC, method=method, **asked)(model, RAGGED)
        exact = sf.Attribute(make_sae("jumprelu"), METRIC, method=sf.IG(32, "gauss"), **asked)
        wanted = exact(model, RAGGED)
        torch.testing.assert_close(found.score, wanted.score, atol=3e-3, rtol=3e-2)


@pytest.mark.parametrize(
    ("steps", "rule", "tolerance"),
    [
        (64, "left", 0.1),
        (10, "gauss", 0.1),
        *((64, "gauss", wrong) for wrong in (0.0, 2, True, float("nan"), "0.1")),
    ],
)
def test_a_tolerance_that_is_none(steps, rule, tolerance):
    with pytest.raises(sf.SaefeatError, match="IG: `tolerance` is"):
        sf.IG(steps, rule, tolerance=tolerance)


def test_a_tolerance_is_in_the_repr():
    method = sf.IG(64, "gauss", tolerance=0.1)
    assert eval(repr(method), {"IG": sf.IG}) == method
    assert repr(sf.IG(64, "gauss")) == "IG(steps=64, rule='gauss')"


def test_in_a_trace_nodes_cannot_adapt(model):
    job = sf.Attribute(make_sae("jumprelu"), METRIC, method=sf.IG(64, "gauss", tolerance=0.1))
    with pytest.raises(sf.SaefeatError, match="a trace is one pass"), model.trace(RAGGED[0]):
        job.watch(model)
