"""Numbers that are no numbers are refused where they are read, with dictionary and latent."""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import ARCHITECTURES, D_SAE, D, batch_of, build, make_sae, tensors_for, wrapped
from saefeat.dictionaries.weights import InMemory

REFUSED = sf.errors.DictionaryError


def broken(architecture: str, name: str, at: tuple[int, ...], value: float, **options) -> sf.SAE:
    tensors = tensors_for(architecture)
    tensors[name][at] = value
    options |= {"k": 7} if "topk" in architecture else {}
    weights = InMemory(tensors)
    return sf.SAE(weights, architecture=architecture, site="resid_post.1", name="x", **options)


CASES = [
    *((a, "W_dec", (5, 3)) for a in ARCHITECTURES),
    *((a, "W_enc", (3, 5)) for a in ARCHITECTURES),
    ("standard", "b_enc", (5,)),
    ("jumprelu", "threshold", (5,)),
    ("gated", "r_mag", (5,)),
    ("gated", "b_gate", (5,)),
    ("gated", "b_mag", (5,)),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("architecture", "name", "at"), CASES)
def test_a_number_that_is_none_is_refused_with_its_latent(architecture, name, at, value):
    if (name, value) == ("r_mag", float("-inf")):
        pytest.skip("its gain is 0, which is a number")
    sae, x = broken(architecture, name, at, value), torch.randn(2, 4, D)
    nn = wrapped(build("llama"))
    for use in (
        lambda: sae.encode(x),
        lambda: sae.encode(x, [2, 5]),
        lambda: sae.reconstruct(x),
        lambda: sf.run(nn, batch_of(), sf.Ablate(sae.latents([9, 5]))),
        lambda: sf.run(nn, batch_of(), sf.Probe(sae.latents([9, 5]))),
    ):
        with pytest.raises(REFUSED, match=r"'x' at resid_post.1: .* of latent 5,.*Try:"):
            use()
    if "topk" not in architecture or name == "W_dec":  # other latents are read alone
        assert sf.run(nn, batch_of(), sf.Ablate(sae.latents([9, 4]))).logits.isfinite().all()


def test_directions_alone_are_looked_at_too():
    with pytest.raises(REFUSED, match="`directions` has nan, of latent 5"):
        broken("standard", "W_dec", (5, 3), float("nan")).directions([1, 5])


def test_a_decoder_bias_counts_where_it_is_used():
    sae = broken("standard", "b_dec", (3,), float("nan"), subtract_bias=False)
    assert sae.encode(torch.randn(2, D)).isfinite().all()
    with pytest.raises(REFUSED, match="decoder_bias"):
        sae.reconstruct(torch.randn(2, D))


def test_numbers_that_only_their_sum_overflows_are_numbers():
    sae = broken("standard", "W_dec", (5, slice(None)), 3e38)
    assert sae.directions([5]).isfinite().all() and not sae.directions([5]).sum().isfinite()


def test_a_dictionary_of_ones_own_is_held_to_it():
    class Mine(sf.dictionaries.Dictionary):
        def __init__(self) -> None:
            self.site = self.write_site = sf.Site("resid_post", 1)
            self.d_in = self.d_out = self.d_sae = D
            self.name = "mine"

        def columns(self, indices):
            eye = torch.eye(D)
            eye[6, 6] = float("nan")
            encoder, rows = eye[:, indices], eye[indices]
            return {
                "activation": "identity", "encoder": encoder, "bias": torch.zeros(len(indices)),
                "directions": rows, "norm": "none",
            }  # fmt: skip

    assert Mine().encode(torch.ones(D), [1, 2]).tolist() == [1, 1]
    with pytest.raises(REFUSED, match=r"'mine' at resid_post.1: .* of latent 6"):
        Mine().encode(torch.ones(D), [4, 6])


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_a_zero_decoder_row_is_a_zero_direction(architecture):
    """Divided by its own length it would be 0/0, and every logit NaN behind an edit."""
    dead = broken(architecture, "W_dec", (5, slice(None)), 0.0, rescale=True)
    plain = make_sae(architecture, rescale=True)
    x = torch.randn(3, 4, D)
    assert not dead.directions([5]).any() and not dead.encode(x, [5]).any()
    assert torch.equal(dead.directions([4, 6]), plain.directions([4, 6]))
    assert dead.reconstruct(x).isfinite().all()
    nn = wrapped(build("llama"))
    bare, out = sf.run(nn, batch_of()), sf.run(nn, batch_of(), sf.Clamp(dead.latents([5]), 3.0))
    assert torch.equal(out.logits, bare.logits)
    others = sf.run(nn, batch_of(), sf.Ablate(dead.latents(range(D_SAE))))
    assert others.logits.isfinite().all()
