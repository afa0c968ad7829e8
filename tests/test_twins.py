"""A dictionary that was loaded or made twice is one dictionary, wherever its latents meet."""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, tensors_for, unit, wrapped
from saefeat.dictionaries.twins import BLOCK, twins
from saefeat.studies.refusal import tiny

SITE = "resid_post.1"


def loaded():
    return sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")[1]


def of(architecture="standard", name="sae", site=SITE, **changed):
    """An SAE from tensors of its own, some of them changed."""
    tensors = {key: value.clone() for key, value in tensors_for(architecture).items()}
    k = 6 if architecture == "topk" else None
    return sf.SAE.from_tensors(
        tensors | changed, architecture=architecture, site=site, k=k, name=name
    )


def excerpt(tmp_path):
    """The latents of a file, which holds no SAE."""
    path = sf.save(sf.Ablate(loaded().latents([3, 8])), tmp_path / "edit.safetensors")
    return sf.load(path).parts()[0].latents.parts[0][0]


def unlike():
    sae = loaded()
    sae.excluded = "special"
    return sae


PAIRS = {
    "a folder": lambda _: (loaded(), loaded()),
    "a folder and its excerpt": lambda tmp: (excerpt(tmp), loaded()),
    "other tokens skipped": lambda _: (unlike(), loaded()),
    "tensors": lambda _: (of("jumprelu"), of("jumprelu", name="another")),
    "topk": lambda _: (of("topk"), of("topk")),
    "gated": lambda _: (of("gated"), of("gated")),
    "a direction": lambda _: tuple(sf.Direction(unit(3), site=SITE) for _ in range(2)),
    "a direction of another length": lambda _: (
        sf.Direction(unit(3), site=SITE),
        sf.Direction(7 * unit(3), site=SITE, name="long"),
    ),
    "neurons": lambda _: (sf.Neurons(SITE, D), sf.Neurons(SITE, D)),
    "a function": lambda _: tuple(
        sf.dictionaries.Function(torch.relu, torch.eye(D), site=SITE, width=D) for _ in range(2)
    ),
    "an error term": lambda _: (loaded().error(), loaded().error()),
}


@pytest.mark.parametrize("name", PAIRS)
def test_one_latent_of_two_objects_is_edited_once(name, tmp_path):
    one, other = (basis.latents([3] if basis.d_sae > 3 else [0]) for basis in PAIRS[name](tmp_path))
    with pytest.raises(sf.errors.LatentError, match="has a latent that an earlier part edits"):
        sf.Clamp(one, 4.0) & sf.Clamp(other, 1.0)
    with pytest.raises(sf.errors.LatentError, match="each latent once"):
        sf.Ablate(one | other)
    assert sf.Clamp(one, 4.0) & sf.Probe(other), "reading is no edit"
    assert sf.Clamp(one, 4.0) | sf.Clamp(other, 1.0), "a chain reads again"


OTHERS = {
    "latents": lambda: (loaded().latents([3]), loaded().latents([8])),
    "weights": lambda: (
        of(W_enc=1.01 * tensors_for("standard")["W_enc"]).latents([3]),
        of().latents([3]),
    ),
    "a threshold": lambda: (
        of("jumprelu", threshold=tensors_for("jumprelu")["threshold"] + 0.1).latents([3]),
        of("jumprelu").latents([3]),
    ),
    "an encoder": lambda: tuple(
        sf.dictionaries.Function(f, torch.eye(D), site=SITE, width=D).latents([3])
        for f in (torch.relu, torch.tanh)
    ),
    "a site": lambda: (of(site="resid_post.0").latents([3]), of().latents([3])),
    "random directions": lambda: (
        loaded().latents([3]),
        sf.controls.random_directions(loaded().latents([3]), seed=0),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_two_dictionaries_are_two(name):
    one, other = OTHERS[name]()
    assert sf.Clamp(one, 4.0) & sf.Clamp(other, 1.0)
    assert len(sf.Ablate(one | other).latents) == 2


def test_two_objects_of_sae_lens_with_one_name_are_two():
    """Their origin is "memory" and the name that they share."""
    one, other = of(), of(W_dec=-tensors_for("standard")["W_dec"])
    one.origin = other.origin = loaded().origin
    assert sf.Ablate(one.latents([3]) | other.latents([3]))
    clean = sf.run(wrapped(build("llama")), RAGGED, sf.Probe(one)).readings[0]
    with pytest.raises(sf.errors.LatentError, match="without latent 3"):
        sf.Ablate(other.latents([3]), to=sf.values.Patch(clean))


def test_latents_that_compete_for_one_dictionarys_places():
    one, other = of("topk"), of("topk")
    with pytest.raises(sf.errors.LatentError, match="selected anew"):
        sf.Ablate(one.latents([3]).reselect()) & sf.Clamp(other.latents([8]), 1.0)
    with pytest.raises(sf.errors.LatentError, match="selected anew"):
        sf.Clamp(other.latents([8]), 1.0) & sf.Ablate(one.latents([3]).reselect())
    third = of("topk", W_enc=-tensors_for("topk")["W_enc"])
    assert sf.Ablate(one.latents([3]).reselect()) & sf.Clamp(third.latents([8]), 1.0)


def test_readings_of_one_object_are_those_of_the_other():
    model = wrapped(build("llama"))
    one, other = make_sae("jumprelu"), make_sae("jumprelu")
    clean = sf.run(model, RAGGED, sf.Probe(one.latents([9, 3]))).readings[0]
    edits = [
        sf.Clamp(basis.latents([3, 9]), sf.values.Patch(clean), add=None) for basis in (one, other)
    ]
    push = sf.Clamp(sf.Direction(unit(9), site="resid_post.0"), add=5.0)
    first, second = (sf.run(model, RAGGED, push | edit).logits for edit in edits)
    assert torch.equal(first, second)


def test_a_difference_behind_the_first_block_is_seen():
    wide = {"W_enc": torch.randn(8, BLOCK + 9), "b_enc": torch.zeros(BLOCK + 9)}
    wide |= {"W_dec": torch.randn(BLOCK + 9, 8), "b_dec": torch.zeros(8)}
    bias = wide["b_enc"].clone()
    bias[-1] = 1.0
    one, other = (sf.SAE.from_tensors(t, site=SITE) for t in (wide, wide | {"b_enc": bias}))
    assert twins(one, other, range(BLOCK + 8)) and not twins(one, other, range(BLOCK + 9))
