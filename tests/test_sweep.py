"""sweep: each setting side by side in one batch gives what it gives alone."""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, wrapped

NEW = 5


def settings() -> dict:
    """Edits of every kind at once: rules, conditions, per-prompt values, transcoders, probes."""
    sae, other = make_sae(layer=1), make_sae("topk", layer=2)
    v = sf.Direction(torch.ones(D), site="resid_post.1")
    latents = sae.latents([3, 9, 11])
    when = sf.When(make_sae(layer=0).latents([1, 4]), above=0.6, hold=True)
    per_prompt = torch.arange(9.0).reshape(3, 3)
    return {
        "bare": None,
        "ablate": sf.Ablate(latents) | sf.Probe(other.latents([0, 5])),
        ("clamp", 2.0): sf.Clamp(latents, 2.0, where=sf.Tokens.last(2) | sf.Tokens.generated()),
        "per prompt": sf.Clamp(latents, per_prompt) | sf.Probe(latents, reduce="max"),
        "held": sf.Clamp(v, add=3.0, when=when) | sf.Probe(v),
        "transcoder": sf.Clamp(make_sae("transcoder", layer=1).latents([2, 7]), 4.0),
        "mid": sf.Ablate(sf.Direction(torch.ones(D), site="resid_mid.1")),
        "neurons": sf.Probe(sf.Neurons("resid_post.2", D), reduce="mean"),
    }


def same(a: sf.results.Run, b: sf.results.Run) -> None:
    assert a.completions == b.completions and a.texts == b.texts and a.prompts == b.prompts
    assert torch.allclose(a.logits, b.logits, atol=1e-4)
    assert len(a.readings) == len(b.readings)
    for mine, theirs in zip(a.readings, b.readings, strict=True):
        assert torch.equal(mine.mask, theirs.mask)
        if theirs.starts is not None:
            assert torch.equal(mine.starts, theirs.starts)
        assert torch.allclose(mine.values[mine.mask], theirs.values[mine.mask], atol=1e-4)
    for mine, theirs in zip(a.receipt.rows, b.receipt.rows, strict=True):
        assert (mine.edit, mine.tokens, mine.changed) == (
            theirs.edit,
            theirs.tokens,
            theirs.changed,
        )
        assert mine.largest == pytest.approx(theirs.largest, abs=1e-4)
    assert a.receipt.passes == b.receipt.passes


LATER = [pytest.param(size, marks=pytest.mark.slow) for size in (2, 9)]


@pytest.mark.parametrize("batch_size", [1, 5, 100, *LATER])
@pytest.mark.parametrize("new", [0, NEW])
def test_every_setting_gives_what_run_gives(batch_size, new):
    model = wrapped(build())
    found = sf.sweep(model, RAGGED, settings(), max_new_tokens=new, batch_size=batch_size)
    assert list(found) == list(settings())
    for name, edits in settings().items():
        alone = sf.run(
            model, RAGGED, edits, max_new_tokens=new, batch_size=min(batch_size, len(RAGGED))
        )
        same(found[name], alone)


def test_a_setting_that_stops_early_is_not_padded_by_one_that_goes_on():
    plain = build()
    first = sf.run(wrapped(plain), RAGGED[:1], max_new_tokens=NEW).completions[0]
    plain.generation_config.eos_token_id = first[1]
    model = wrapped(plain)
    edits = {"bare": sf.Probe(sf.Neurons("resid_post.2", D)), "ablate": settings()["ablate"]}
    found = sf.sweep(model, RAGGED[:1], edits, max_new_tokens=NEW)
    assert len(found["bare"].completions[0]) == 2 < len(found["ablate"].completions[0])
    for name, edit in edits.items():
        same(found[name], sf.run(model, RAGGED[:1], edit, max_new_tokens=NEW))


def test_errors_name_the_setting():
    model = wrapped(build())
    never = sf.Ablate(make_sae().latents([1]), where=sf.Tokens.ids(99))
    with pytest.raises(sf.errors.LatentError, match="empty"):
        sf.sweep(model, RAGGED, {})
    with pytest.raises(sf.errors.FiringError, match="'never'"):
        sf.sweep(model, RAGGED, {"bare": None, "never": never})
    wrong = sf.Clamp(make_sae().latents([1]), torch.ones(2, 1))
    with pytest.raises(sf.errors.LatentError, match="values for 2 prompts"):
        sf.sweep(model, RAGGED, {"wrong": wrong})
