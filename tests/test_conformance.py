"""The contract of a dictionary, held against all of the library's and against broken ones."""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import ARCHITECTURES, RAGGED, TRANSCODERS, D, build, make_sae, wrapped
from saefeat.dictionaries.contract import check_dictionary

SITE = "resid_post.1"


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *TRANSCODERS])
def test_every_sae_architecture_keeps_the_contract(architecture):
    check_dictionary(make_sae(architecture))


@pytest.mark.parametrize(
    "dictionary",
    [
        sf.Direction(torch.arange(1.0, D + 1), site=SITE),
        sf.Direction(torch.eye(D)[:3], site=SITE),
        sf.Neurons(SITE, D),
        make_sae().error(),
        sf.dictionaries.Function(torch.square, torch.eye(D), site=SITE, width=D),
    ],
    ids=lambda d: d.name,
)
def test_every_other_dictionary_keeps_the_contract(dictionary):
    check_dictionary(dictionary)


class Counter:
    """An encoder with state: every call answers differently."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * self.calls


class Viewing(sf.dictionaries.Dictionary):
    """Hands out views of its whole matrix."""

    def __init__(self) -> None:
        self.site = self.write_site = sf.Site.parse(SITE)
        self.d_in = self.d_out = self.d_sae = D
        self.name = "viewing"
        self._rows = torch.eye(D)

    def columns(self, indices):
        start, stop = int(indices.min()), int(indices.max()) + 1
        consecutive = torch.equal(indices, torch.arange(start, stop))
        rows = self._rows[start:stop] if consecutive else self._rows[indices]
        return {
            "activation": "identity",
            "encoder": self._rows.T[:, indices].contiguous(),
            "bias": torch.zeros(len(indices)),
            "directions": rows if consecutive else self._rows.expand(2, D, D)[0][indices.sort()[0]],
            "norm": "none",
        }

    def fingerprint(self) -> str:
        return "viewing"


@pytest.mark.parametrize(
    ("encode", "promise"),
    [
        (Counter(), "state"),
        (lambda x: x.cumsum(-2), "mix positions"),
        (lambda x: x.mul_(2), "state|untouched"),
        (lambda x: x[..., :3].repeat(1, 1, 20)[..., : D - 1], "encode|index"),
    ],
)
def test_broken_encoders_are_named(encode, promise):
    broken = sf.dictionaries.Function(encode, torch.eye(D), site=SITE, width=D)
    with pytest.raises((sf.errors.DictionaryError, IndexError), match=promise):
        check_dictionary(broken)


def test_directions_out_of_order_are_named():
    with pytest.raises(sf.errors.DictionaryError, match="directions"):
        check_dictionary(Viewing())


def test_a_generic_dictionary_edits_like_the_sae_it_wraps():
    sae, traced = make_sae(), wrapped(build())
    same = sf.dictionaries.Function(sae.encode, sae.directions(), site=SITE, width=D)
    a = sf.run(traced, RAGGED, sf.Clamp(sae.latents([2, 9]), 3.0), max_new_tokens=4)
    b = sf.run(traced, RAGGED, sf.Clamp(same.latents([2, 9]), 3.0), max_new_tokens=4)
    torch.testing.assert_close(a.logits, b.logits)
    assert a.completions == b.completions


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_ablating_the_error_leaves_the_reconstruction(architecture, norm):
    sae = make_sae(architecture, norm=norm)
    after = sf.Probe(sf.Neurons(SITE, D))
    out = sf.run(wrapped(build()), RAGGED, after | sf.Ablate(sae.error()) | after)
    mask = out.readings[0].mask[..., 0]
    before, left = out.readings[0].values[mask], out.readings[1].values[mask]
    torch.testing.assert_close(left, sae.reconstruct(before), atol=1e-5, rtol=1e-5)
    assert (left - before).abs().max() > 0.1


def test_latents_and_error_together_are_the_whole_value():
    """Zeroing every latent and the error leaves the decoder's bias alone."""
    sae = make_sae("jumprelu")
    probe = sf.Probe(sf.Neurons(SITE, D))
    both = sf.Ablate(sae.error()) | probe
    bare = sf.run(wrapped(build()), RAGGED, both).readings[0]
    mask = bare.mask[..., 0]
    f = sf.run(wrapped(build()), RAGGED, sf.Probe(sae)).readings[0].values[mask]
    explained = f @ sae.directions() + sae._weights.read("b_dec")
    torch.testing.assert_close(bare.values[mask], explained, atol=1e-5, rtol=1e-5)


def test_a_transcoder_has_no_error_term_at_one_site():
    with pytest.raises(sf.errors.DictionaryError, match="transcoder"):
        make_sae("transcoder").error()
