"""SAEs made of others': prefixes, unit norms, and a layout by two functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saefeat as sf
from helpers import (
    ARCHITECTURES,
    D_SAE,
    RAGGED,
    TRANSCODERS,
    D,
    build,
    make_sae,
    tensors_for,
    wrapped,
)
from test_dictionaries import lens_sae

SEPARATE = [a for a in (*ARCHITECTURES, *TRANSCODERS) if a not in ("topk", "abstopk")]
OPTIONS = {"standard": [{}, {"norm": "layer_norm"}, {"subtract_bias": False}, {"centered": True}]}
CASES = [(a, o) for a in SEPARATE for o in OPTIONS.get(a, [{}])]


# ------------------------------------------------------------------ prefixes


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_a_prefix_is_the_first_latents(architecture, options):
    sae = make_sae(architecture, **options)
    first, x = sae.prefix_of(17), torch.randn(2, 5, D)
    assert (first.d_sae, first.site, first.write_site) == (17, sae.site, sae.write_site)
    assert torch.allclose(first.encode(x), sae.encode(x)[..., :17], atol=1e-6)
    assert torch.equal(first.directions(), sae.directions()[:17])
    assert first.fingerprint() != sae.fingerprint()
    assert first.fingerprint([3]) == sae.fingerprint([3])
    sf.dictionaries.check_dictionary(first)
    with pytest.raises(sf.errors.LatentError, match=r"0\.\.16"):
        first.latents([17])


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
@pytest.mark.parametrize("file", [True, False])
def test_a_prefix_is_sae_lenss_with_the_first_latents(architecture, file, tmp_path):
    theirs = lens_sae(architecture)
    theirs.save_model(tmp_path)
    ours = sf.load_sae(tmp_path if file else theirs).prefix_of(9)
    x, cut = torch.randn(4, 16), {"W_enc": 1}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name != "b_dec":
                parameter.data = parameter.data.narrow(cut.get(name, 0), 0, 9)
        assert torch.allclose(ours.encode(x), theirs.encode(x), atol=1e-5)
        assert torch.allclose(ours.reconstruct(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("count", [0, D_SAE + 1, True, 3.0])
def test_a_prefix_of_no_such_width_is_refused(count):
    with pytest.raises(sf.errors.DictionaryError, match=r"SAE\.prefix_of: `count`"):
        make_sae("jumprelu").prefix_of(count)


# ------------------------------------------------------------------ unit norms


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_directions_have_length_one_and_edits_are_as_before(architecture, options):
    sae, x = make_sae(architecture, **options), torch.randn(2, 5, D)
    unit, norms = sae.fold_norms(), sae.directions().norm(dim=1)
    assert torch.allclose(unit.directions().norm(dim=1), torch.ones(D_SAE), atol=1e-6)
    assert torch.allclose(unit.encode(x), sae.encode(x) * norms, atol=1e-4)
    assert torch.allclose(unit.encode(x, [7, 3]), (sae.encode(x) * norms)[..., [7, 3]], atol=1e-4)
    assert torch.allclose(unit.reconstruct(x), sae.reconstruct(x), atol=1e-4)
    assert unit.fingerprint() != sae.fingerprint()
    assert unit.fingerprint([3]) != sae.fingerprint([3])
    sf.dictionaries.check_dictionary(unit)
    if options.get("centered"):
        return  # for models with LayerNorm
    model = wrapped(build("llama"))
    before, after = (
        sf.run(model, RAGGED, sf.Ablate(one.latents([3, 9, 20])), allow_unfired=True).logits
        for one in (sae, unit)
    )
    assert torch.allclose(before, after, atol=1e-5)


def test_a_latent_without_a_direction_stays_as_it_is():
    own = tensors_for("standard")
    own["W_dec"][5] = 0.0
    sae = sf.SAE.from_tensors(own, site="resid_post.1")
    unit, x = sae.fold_norms(), torch.randn(3, D)
    assert torch.equal(unit.encode(x, [5]), sae.encode(x, [5]))
    assert not unit.directions([5]).any()


def test_folding_is_an_option_of_loading(tmp_path):
    theirs = lens_sae("jumprelu")
    theirs.save_model(tmp_path)
    unit = sf.load_sae(tmp_path, fold_norms=True)
    assert unit.fingerprint() == sf.load_sae(theirs).fold_norms().fingerprint()
    assert torch.allclose(unit.directions().norm(dim=1), torch.ones(unit.d_sae), atol=1e-6)
    with pytest.raises(sf.errors.DictionaryError, match=r"SAE\.fold_norms: .*compete"):
        sf.load_sae(lens_sae("topk"), fold_norms=True)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_latents_that_compete_are_neither_cut_nor_scaled(architecture):
    for name in ("fold_norms", "prefix_of"):
        with pytest.raises(sf.errors.DictionaryError, match=f"SAE.{name}: .*compete"):
            getattr(make_sae(architecture), name)(*([3] if name == "prefix_of" else []))


# ------------------------------------------------------------------ a layout of one's own


def written(folder: Path, **about) -> Path:
    """A layout nobody knows: one file of settings, one of tensors with other names."""
    own = tensors_for("jumprelu")
    named = {
        "enc": own["W_enc"].T.contiguous(),
        "enc_b": own["b_enc"],
        "dec": own["W_dec"],
        "dec_b": own["b_dec"],
        "theta": own["threshold"],
    }
    save_file(named, folder / "coder.safetensors")
    (folder / "about.json").write_text(json.dumps({"layer": 1} | about))
    return folder


def declare(folder: Path) -> dict:
    about = json.loads((folder / "about.json").read_text())
    found = {
        "site": f"resid_post.{about['layer']}",
        "architecture": "jumprelu",
        "subtract_bias": True,
        **about,
    }
    return {name: value for name, value in found.items() if name != "layer" and value is not None}


def read(folder: Path) -> dict[str, torch.Tensor]:
    t = load_file(folder / "coder.safetensors")
    return {
        "W_enc": t["enc"].T,
        "b_enc": t["enc_b"],
        "W_dec": t["dec"],
        "b_dec": t["dec_b"],
        "threshold": t["theta"],
    }


def test_two_functions_are_a_layout(tmp_path):
    sae = sf.load_sae(written(tmp_path), layout=(declare, read))
    same = make_sae("jumprelu", "resid_post.1")
    assert sae.fingerprint() == same.fingerprint() and sae.name == tmp_path.name
    assert "declare" in str(sae.origin)
    assert sf.load_sae(tmp_path, layout=(declare, read), site="resid_post.2").site.layer == 2
    unit = sf.load_sae(tmp_path, layout=(declare, read), fold_norms=True)
    assert unit.fingerprint() == same.fold_norms().fingerprint()


@pytest.mark.parametrize(
    ("about", "layout", "said"),
    [
        ({}, declare, "two functions of the folder"),
        ({}, (declare,), "two functions of the folder"),
        ({"gain": 3}, (declare, read), "declares gain"),
        ({"subtract_bias": None}, (declare, read), "no subtract_bias"),
        ({"site": None}, (declare, read), "`site` is not declared"),
        ({"architecture": "standard"}, (declare, read), "threshold among the weights"),
    ],
)
def test_a_layout_that_leaves_something_open_is_refused(tmp_path, about, layout, said):
    with pytest.raises(sf.errors.DictionaryError, match=said):
        sf.load_sae(written(tmp_path, **about), layout=layout)
