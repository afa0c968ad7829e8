"""Attribution inside a trace of the user's own, invoke by invoke."""

from __future__ import annotations

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, hook_count, make_sae, unit, wrapped

METRIC = sf.logit_diff([5, 9], 7)
FIELDS = ("prompt", "dictionary", "position", "latent", "score", "activation", "change", "clean")


def two_saes():
    return sf.dictionaries.Dictionaries([make_sae(layer=0), make_sae("transcoder", layer=1)])


def same(found, wanted, rows=None):
    """Equal scores; ``rows`` are the prompts of ``wanted`` that ``found`` holds."""
    rows = list(range(len(wanted.tokens))) if rows is None else rows
    assert found.tokens.tolist() == [wanted.tokens[row].item() for row in rows]
    for number, row in enumerate(rows):
        ours, theirs = found.prompt == number, wanted.prompt == row
        for name in ("dictionary", "position", "latent"):
            assert torch.equal(getattr(found, name)[ours], getattr(wanted, name)[theirs])
        for name in ("score", "activation", "change"):
            torch.testing.assert_close(
                getattr(found, name)[ours], getattr(wanted, name)[theirs], atol=1e-5, rtol=1e-3
            )
        torch.testing.assert_close(found.clean[number], wanted.clean[row], atol=1e-5, rtol=1e-5)
    assert found.score.abs().max() > 1e-3


@pytest.mark.parametrize("how", [{}, {"semantics": "through_sae"}, {"keep": 3}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_scores_of_the_attributes_own_metric(how, frozen):
    model, saes = build("gemma2"), two_saes()
    model.requires_grad_(not frozen)
    nn, job = wrapped(model), sf.Attribute(saes, METRIC, **how)
    with nn.trace(RAGGED):
        watching = job.watch(nn)
        scores = nnsight.save(watching.scores(nn.output.logits))
    same(scores, job(nn, RAGGED))
    assert torch.isnan(scores.baseline).all() and not scores.degenerate.any()
    assert hook_count(model) == 0 and not scores.score.requires_grad


def test_any_metric_of_the_block_and_several():
    nn, saes = wrapped(build("llama")), two_saes()
    job = sf.Attribute(saes, METRIC)
    with nn.trace(RAGGED):
        watching = job.watch(nn)
        late = nn.model.layers[2].output[:, -1] @ unit(4)
        logits = nn.output.logits[:, -1]
        projected = nnsight.save(watching.scores(late))
        spread = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        entropy = nnsight.save(watching.scores(spread))
        own = nnsight.save(watching.scores(nn.output.logits))
    v = sf.Direction(unit(4), site="resid_post.2")
    same(projected, sf.Attribute(saes, sf.metrics.activation(v))(nn, RAGGED))
    plain = sf.metrics.custom(lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1))
    same(entropy, sf.Attribute(saes, plain)(nn, RAGGED))
    same(own, job(nn, RAGGED))


def test_each_invoke_has_its_own():
    """Reads of an invoke are views outside the graph: what is watched must be inside it."""
    nn, saes = wrapped(build("llama")), two_saes()
    first, second = sf.Attribute(saes, METRIC), sf.Attribute(saes, sf.metrics.logit(30))
    with nn.trace() as tracer:
        with tracer.invoke(RAGGED[:1]):
            watching = first.watch(nn)
            one = nnsight.save(watching.scores(nn.output.logits))
        with tracer.invoke(RAGGED[1:]):
            watching = second.watch(nn)
            two = nnsight.save(watching.scores(nn.output.logits))
    same(one, first(nn, RAGGED), [0])
    same(two, second(nn, RAGGED), [1, 2])


def test_behind_edits_of_the_same_invoke():
    nn, saes = wrapped(build("llama")), two_saes()
    edit = sf.Clamp(sf.Direction(unit(3), site="resid_post.0"), add=2.0)
    job = sf.Attribute(saes, METRIC)
    with nn.trace(RAGGED):
        watching = job.watch(nn, edit)
        scores = nnsight.save(watching.scores(nn.output.logits))
    edited = sf.edit(nn, edit)
    same(scores, job(edited, RAGGED))
    plain = job(nn, RAGGED)
    assert (plain.clean - scores.clean).abs().max() > 1e-2


def test_fixed_values_and_where():
    nn, sae = wrapped(build("llama")), make_sae()
    job = sf.Attribute(sae, METRIC, sf.attribution.Fixed(sae, 0.3), where=sf.Tokens.last(2))
    with nn.trace(RAGGED):
        watching = job.watch(nn)
        scores = nnsight.save(watching.scores(nn.output.logits))
    same(scores, job(nn, RAGGED))
    assert scores.tokens.tolist() == [2, 2, 2]


def test_the_blocks_own_graph_goes_on():
    """What lies before the first watched site keeps its gradient."""
    nn = wrapped(build("llama"))
    job = sf.Attribute(sf.Neurons("resid_post.1", D), METRIC)
    with nn.trace(RAGGED):
        watching = job.watch(nn)
        nnsight.save(watching.scores(nn.output.logits))
        weight = nn._module.model.embed_tokens.weight
        (slope,) = torch.autograd.grad(nn.output.logits.sum(), weight)
        slope = nnsight.save(slope)
    assert slope.abs().max() > 1e-3


def test_what_takes_other_passes_is_refused():
    nn, sae = wrapped(build("llama")), make_sae()
    jobs = {
        "method": sf.Attribute(sae, METRIC, method=sf.IG(2)),
        "baseline": sf.Attribute(sae, METRIC, sf.Ablate(sae)),
        "backward": sf.Attribute(sae, METRIC, backward=sf.attribution.RelP()),
        "one_site": sf.Attribute(sae, METRIC, one_site=True),
        "metric": sf.Attribute(sae, sf.metrics.log_prob([5, 6])),
    }
    for name, job in jobs.items():
        with pytest.raises(sf.SaefeatError, match=f"`{name}`.*outside the trace"), nn.trace(RAGGED):
            job.watch(nn)
    with pytest.raises(sf.SaefeatError, match="BASELINE_TOP"), nn.trace(RAGGED):
        watching = sf.Attribute(sae, sf.metrics.logit(sf.metrics.BASELINE_TOP)).watch(nn)
        watching.scores(nn.output.logits)


def test_values_without_a_gradient_at_the_sites():
    nn, sae = wrapped(build("llama")), make_sae()
    job = sf.Attribute(sae, METRIC)
    wrong = {
        "argmax": lambda logits: logits[:, -1].argmax(-1).float(),
        "mean": lambda logits: logits[:, -1, 5].mean(),
        "elsewhere": lambda logits: torch.ones(3, requires_grad=True) * 2,
    }
    for function in wrong.values():
        refused = pytest.raises(sf.errors.GradientError, match="one differentiable number")
        with refused, nn.trace(RAGGED):
            watching = job.watch(nn)
            watching.scores(function(nn.output.logits))
    with (
        pytest.raises(sf.errors.GradientError, match="enable_grad"),
        torch.no_grad(),
        nn.trace(RAGGED),
    ):
        job.watch(nn)
    refused = pytest.raises(sf.errors.GradientError, match="generation")
    with refused, nn.generate(RAGGED, max_new_tokens=2):
        job.watch(nn)
