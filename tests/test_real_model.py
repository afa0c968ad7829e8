"""The contract's core on a real chat model (``tests/real.py``), against plain hooks on it.

What a tiny model cannot show: position 0 is an attention sink, BOS, EOS and pad stand inside every
prompt, and the answers are sentences. ``make real`` runs these tests alone.
"""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from real import BLANK, CHATS, END, TEXTS, D, dictionary, load, logits, residual

pytestmark = pytest.mark.slow
LAYER = 16
SITE = f"resid_post.{LAYER}"
ATOL = 2e-3  # of logits up to 30, from float32 sums in another order


@pytest.fixture(scope="module")
def real():
    return load()


@pytest.fixture(scope="module")
def values(real):
    """{layer: [n, d]}: the residual stream of the texts, first tokens left out."""
    found = {8: [], LAYER: []}
    for text in TEXTS:
        for layer, x in residual(real.bare, real.ids(text), list(found)).items():
            found[layer].append(x[1:])
    return {layer: torch.cat(rows) for layer, rows in found.items()}


@pytest.fixture(scope="module")
def saes(values):
    return {layer: dictionary(x, layer) for layer, x in values.items()}


@pytest.fixture(scope="module")
def prompts(real):
    """The chats' ids by the tokenizer's own template; the last is cut behind its content."""
    ids = [real.ids(chat) for chat in CHATS[:3]]
    closed = real.ids(CHATS[3], opened=False)
    assert closed[-2:] == [END, BLANK]
    return [*ids, closed[:-2]]


def unit(seed=0):
    v = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def by_hand(sae, x):
    """[t, latents]: a TopK SAE's activations, from its tensors."""
    w = {name: sae._weights.read(name) for name in ("W_enc", "b_dec")}
    before = (x - w["b_dec"]) @ w["W_enc"]
    top = before.topk(sae.k, dim=-1)
    return torch.zeros_like(before).scatter(-1, top.indices, top.values.relu())


def moved(sae, latents, change, where):
    """A hook: ``change(f)`` of these latents at the columns ``where(t, prompt)``."""

    def hook(x, prompt=None):
        f = by_hand(sae, x[0])[:, latents]
        step = (change(f) - f) @ sae._weights.read("W_dec")[latents]
        chosen = torch.zeros(x.shape[1], dtype=torch.bool)
        chosen[where(x.shape[1], prompt or x.shape[1])] = True
        return x + chosen[None, :, None] * step

    return hook


def everywhere(t, prompt):
    return slice(None)


RULES = {
    "all": (None, everywhere),
    "not first": (~sf.Tokens.first(1), lambda t, p: slice(1, None)),
    "first": (sf.Tokens.first(1), lambda t, p: slice(0, 1)),
    "last": (sf.Tokens.last(1), lambda t, p: slice(p - 1, p)),
    "last two": (sf.Tokens.last(2), lambda t, p: slice(p - 2, p)),
    "prompt": (sf.Tokens.prompt(), lambda t, p: slice(0, p)),
    "generated": (sf.Tokens.generated(), lambda t, p: slice(p, None)),
    "second generated": (sf.Tokens.generated(1, 2), lambda t, p: slice(p + 1, p + 2)),
    "positions": (sf.Tokens.positions(5, 9), lambda t, p: slice(5, 9)),
}
CHOSEN = [3, 17, 40, 99]
CHANGES = {
    "ablate": (sf.Ablate, {}, lambda f: 0 * f),
    "set": (sf.Clamp, {"value": 60.0}, lambda f: 0 * f + 60),
    "add": (sf.Clamp, {"add": 25.0}, lambda f: f + 25),
    "scale": (sf.Clamp, {"scale": -2.0}, lambda f: -2 * f),
    "bound": (sf.Clamp, {"low": 10.0, "high": 30.0}, lambda f: f.clamp(10, 30)),
    "active": (
        sf.Clamp,
        {"value": 60.0, "active_only": True},
        lambda f: torch.where(f != 0, 60.0, f),
    ),
}


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize("change", CHANGES)
def test_edits_of_a_padded_batch_are_those_of_plain_hooks_on_single_prompts(
    real, saes, prompts, change
):
    verb, arguments, function = CHANGES[change]
    sae = saes[LAYER]
    for rule, where in (RULES["all"], RULES["not first"], RULES["last two"]):
        step = verb(sae.latents(CHOSEN), **arguments, where=rule)
        out = sf.run(real.nn, CHATS, step, allow_unfired=True)
        assert [list(ids) for ids in out.prompts] == prompts
        for ids, found in zip(prompts, out.logits, strict=True):
            wanted = logits(real.bare, ids, {LAYER: moved(sae, CHOSEN, function, where)})[-1]
            torch.testing.assert_close(found, wanted, atol=ATOL, rtol=1e-4)
