"""When: an edit acts only at tokens where other latents say so."""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, wrapped

PUSH = 3.0
NEW = 5


def setup(hold: bool):
    """Push one direction at layer 2 where latents of layer 0 are above a threshold."""
    sae, v = make_sae(layer=0), sf.Direction(torch.ones(D), site="resid_post.2")
    chosen = sae.latents([1, 4])
    when = sf.When(chosen, above=0.6, hold=hold)
    after = sf.Neurons("resid_post.2", D)
    edits = sf.Probe(chosen) | sf.Probe(after) | sf.Clamp(v, add=PUSH, when=when) | sf.Probe(after)
    return edits


def met(out: sf.results.Run, hold: bool) -> torch.Tensor:
    """[b, t]: where the condition holds, from what the probe read."""
    hit = (out.readings[0].values > 0.6).any(-1) & out.readings[0].mask[..., 0]
    return hit.int().cummax(1).values.bool() if hold else hit


@pytest.mark.parametrize("hold", [False, True])
def test_the_edit_acts_exactly_where_the_condition_is_met_at_every_step(hold):
    out = sf.run(wrapped(build()), RAGGED, setup(hold), max_new_tokens=NEW)
    moved = (out.readings[2].values - out.readings[1].values).abs().amax(-1) > 0
    real = out.readings[0].mask[..., 0]
    expected = met(out, hold)
    assert 0 < int(expected[real].sum()) < int(real.sum())  # met somewhere, not everywhere
    assert torch.equal(moved & real, expected & real)
    assert out.receipt.rows[0].tokens == int((expected & real).sum())


def test_holding_outlasts_the_pass_in_which_the_condition_was_met():
    """A generated token at which the condition is not met any more is still edited."""
    out = sf.run(wrapped(build()), RAGGED, setup(hold=True), max_new_tokens=NEW)
    width = max(len(p) for p in out.prompts)
    now = (out.readings[0].values > 0.6).any(-1)[:, width:]
    held = met(out, hold=True)[:, width:]
    assert bool((held & ~now).any())


@pytest.mark.parametrize("hold", [False, True])
def test_a_batch_equals_its_prompts_alone_and_hooks_equal_tracing(hold):
    edits, model = setup(hold), build()
    traced = wrapped(model)
    together = sf.run(traced, RAGGED, edits, max_new_tokens=NEW)
    alone = [sf.run(traced, [p], edits, max_new_tokens=NEW).completions[0] for p in RAGGED]
    assert list(together.completions) == alone
    batch = sf.text.prompts.encode_prompts(traced.tokenizer, RAGGED)
    with sf.hooked(model, edits) as log:
        tokens = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert tuple(map(tuple, tokens[:, -NEW:].tolist())) == together.completions
    assert edits.receipt(log) == together.receipt


def test_any_of_several_dictionaries_meets_the_condition():
    """A threshold nothing reaches, and one everything does: the union is everywhere."""
    a, b = make_sae(layer=0, seed=1), make_sae(layer=1, seed=2)
    never = sf.When(a.latents([0]), above=1e6)
    v = sf.Direction(torch.ones(D), site="resid_post.2")
    traced = wrapped(build())
    quiet = sf.run(traced, RAGGED, sf.Clamp(v, add=1.0, when=never), allow_unfired=True)
    assert quiet.receipt.rows[0].tokens == 0
    both = sf.When(a.latents([0]) | b.latents(), above=0.3)
    out = sf.run(traced, RAGGED, sf.Clamp(v, add=1.0, when=both) | sf.Probe(b))
    expected = (out.readings[0].values > 0.3).any(-1) & out.readings[0].mask[..., 0]
    assert out.receipt.rows[0].tokens >= int(expected.sum()) > 0


def test_a_condition_that_is_known_too_late_is_refused():
    late = sf.When(make_sae(layer=2).latents([0]))
    edit = sf.Ablate(make_sae(layer=1).latents([0]), when=late)
    with pytest.raises(sf.errors.SiteError, match=r"resid_post\.2.*no later than resid_post\.1"):
        sf.run(wrapped(build()), RAGGED, edit)


def test_a_condition_at_the_edits_own_site_reads_what_earlier_edits_left():
    sae = make_sae(layer=1)
    off = sf.Direction(sae.directions([3])[0], site="resid_post.1")
    clear = sf.Ablate(sae.latents())  # nothing is active any more but what re-encodes
    traced = wrapped(build())
    plain = sf.run(traced, RAGGED, sf.Clamp(off, add=1.0, when=sf.When(sae.latents([3, 5, 6]))))
    after = sf.Clamp(off, add=1.0, when=sf.When(sae.latents([3, 5, 6])))
    chained = sf.run(
        traced, RAGGED, sf.verbs.base.Chain((*clear.parts(), *after.parts())), allow_unfired=True
    )
    assert chained.receipt.rows[1].tokens != plain.receipt.rows[0].tokens
