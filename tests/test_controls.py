"""Controls: as many, as long, as active, not the same, and the same at every draw of a seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, tensors_for, wrapped
from saefeat.dictionaries.contract import check_dictionary
from saefeat.dictionaries.weights import InMemory

WIDE = 400


def uneven(site: str = "resid_post.1", seed: int = 0) -> sf.SAE:
    """Latents whose decoder norms and firing differ a hundredfold."""
    tensors = tensors_for("standard", seed, WIDE)
    generator = torch.Generator().manual_seed(seed)
    tensors["W_dec"] *= 10 ** (2 * torch.rand(WIDE, 1, generator=generator) - 1)
    tensors["b_enc"] -= 3 * torch.rand(WIDE, generator=generator)
    return sf.SAE(InMemory(tensors), site=site, name=f"uneven-{seed}")


@pytest.fixture(scope="module")
def model():
    return wrapped(build("llama"))


def read(model, sae) -> sf.results.Readings:
    texts = [" ".join(f"w{(7 * i + j) % 90}" for j in range(12)) for i in range(6)]
    return sf.run(model, texts, sf.Probe(sae)).readings[0]


def ratio(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.maximum(a / b, b / a).max())


@pytest.mark.parametrize("seed", range(3))
def test_controls_are_as_long_and_as_active(model, seed):
    sae = uneven()
    readings = read(model, sae)
    busy = readings.active().topk(60).indices[::6]
    chosen = sae.latents(busy)
    control = sf.controls.matched(chosen, readings, seed=seed, within=2.0)
    others = torch.tensor(control.parts[0][1])
    assert len(control) == len(chosen) == len(set(others.tolist())) and not len(control & chosen)
    norms = sae.directions().norm(dim=1)
    for statistic in (norms, readings.active(), readings.mean()):
        assert ratio(statistic[busy], statistic[others]) <= 2.0 + 1e-6
    plain = torch.tensor(sae.latents().sample(10, seed=seed).parts[0][1])
    assert ratio(norms[busy], norms[plain]) > 4  # what drawing from all of them gives


def test_a_seed_draws_the_same_and_seeds_differ(model):
    sae = uneven()
    readings = read(model, sae)
    chosen = sae.latents(readings.active().topk(60).indices[::6])
    draws = [sf.controls.matched(chosen, readings, seed=seed).parts for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and draws[0] != draws[2] != draws[3]


def test_several_sites_and_statistics_of_ones_own():
    a, b = uneven("resid_post.1"), uneven("resid_post.2", 1)
    chosen = a.latents([3, 40]) | b.latents([7])
    generator = torch.Generator().manual_seed(0)
    rates = {at: torch.rand(WIDE, generator=generator) + 0.1 for at in ("resid_post.1", b.site)}
    control = sf.controls.matched(chosen, rates, seed=0, within=3.0)
    assert [
        (basis is own, len(ix)) for (basis, ix), own in zip(control.parts, (a, b), strict=True)
    ] == [
        (True, 2),
        (True, 1),
    ]
    for (basis, indices), (_, own) in zip(control.parts, chosen.parts, strict=True):
        rate = rates["resid_post.1" if basis is a else b.site]
        assert ratio(rate[list(indices)], rate[list(own)]) <= 3.0 + 1e-6
        norms = basis.directions().norm(dim=1)
        assert ratio(norms[list(indices)], norms[list(own)]) <= 3.0 + 1e-6


def test_every_candidate_is_drawn():
    """Uniformly among what fits: over many seeds, all of it."""
    norms = torch.tensor([1.0, 1.1, 0.9, 5.0, 1.2, 0.2])
    tensors = tensors_for("standard", 0, 6)
    tensors["W_dec"] = torch.eye(6, D) * norms[:, None]
    sae = sf.SAE(InMemory(tensors), site="resid_post.1")
    drawn = [
        sf.controls.matched(sae.latents([0]), seed=s, within=1.5).parts[0][1][0] for s in range(200)
    ]
    assert set(drawn) == {1, 2, 4}
    assert min(drawn.count(i) for i in (1, 2, 4)) > 35


def test_dead_latents_match_dead_latents_alone():
    tensors = tensors_for("standard", 0, 6)
    sae = sf.SAE(InMemory(tensors), site="resid_post.1")
    rate = {"resid_post.1": torch.tensor([0.0, 0.5, 0.0, 0.5, 0.5, 0.6])}
    got = {
        sf.controls.matched(sae.latents([0]), rate, seed=s, within=9.0).parts[0][1][0]
        for s in range(9)
    }
    assert got == {2}
    got = {
        sf.controls.matched(sae.latents([1]), rate, seed=s, within=9.0).parts[0][1][0]
        for s in range(40)
    }
    assert got == {3, 4, 5}


@settings(max_examples=30, deadline=None)
@given(picked=st.sets(st.integers(0, WIDE - 1), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_any_selection(picked, seed):
    sae = uneven()
    try:
        control = sf.controls.matched(sae.latents(sorted(picked)), seed=seed, within=1.5)
    except sf.errors.LatentError as error:
        assert "no other like it" in str(error)
        return
    others = control.parts[0][1]
    assert len(set(others)) == len(picked) and not picked & set(others)
    norms = sae.directions().norm(dim=1)
    assert ratio(norms[sorted(picked)], norms[list(others)]) <= 1.5 + 1e-6


def test_what_has_no_match_is_named(model):
    sae = uneven()
    with pytest.raises(sf.errors.LatentError, match=r"no other like it.*within=2"):
        sf.controls.matched(sae.latents([3, 4, 5]), seed=0, within=1.0)
    with pytest.raises(sf.errors.LatentError, match="no statistic was given"):
        sf.controls.matched(sae.latents([3]), read(model, uneven("resid_post.0")), seed=0)
    with pytest.raises(sf.errors.LatentError, match="one number a latent"):
        sf.controls.matched(sae.latents([3]), {"resid_post.1": torch.ones(3)}, seed=0)
    with pytest.raises(sf.errors.LatentError, match="at least 1"):
        sf.controls.matched(sae.latents([3]), seed=0, within=0.5)
    with pytest.raises(sf.errors.LatentError, match="at least one latent"):
        sf.controls.matched(sf.Latents(()), seed=0)


# ---------------------------------------------------------------- random directions


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "transcoder"])
def test_random_directions_keep_the_contract_and_the_activations(architecture):
    sae = make_sae(architecture)
    control = sf.controls.random_directions(sae.latents([3, 7, 40]), seed=5)
    dictionary = control.parts[0][0]
    check_dictionary(dictionary)
    x = torch.randn(2, 5, D)
    assert torch.equal(dictionary.encode(x), sae.encode(x))
    new, old = dictionary.directions(), sae.directions()
    torch.testing.assert_close(new.norm(dim=1), old.norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(new, old)
    assert cosine.abs().max() < 0.8 and cosine.abs().mean() < 0.25
    again = sf.controls.random_directions(sae.latents([7]), seed=5).parts[0][0]
    assert torch.equal(again.directions([7]), dictionary.directions([7]))
    other = sf.controls.random_directions(sae.latents([7]), seed=6).parts[0][0]
    assert not torch.allclose(other.directions([7]), dictionary.directions([7]))
    assert dictionary.fingerprint() != sae.fingerprint() != other.fingerprint()


def test_one_latent_moves_the_site_as_far_elsewhere(model):
    sae, look = make_sae("jumprelu"), sf.Probe(sf.Neurons("resid_post.1", D))
    moved = []
    for chosen in (sae.latents([9]), sf.controls.random_directions(sae.latents([9]), seed=0)):
        out = sf.run(model, RAGGED, look | sf.Clamp(chosen, 3.0) | look)
        before, after = (r.values[r.mask[..., 0]] for r in out.readings)
        moved.append(after - before)
    lengths = [step.norm(dim=-1) for step in moved]
    torch.testing.assert_close(*lengths, atol=1e-4, rtol=1e-4)
    assert lengths[0].min() > 0.1 and (moved[0] - moved[1]).norm(dim=-1).min() > 0.1


def test_a_random_direction():
    v = sf.Direction.random(D, site="resid_post.1", seed=3)
    again, other = (sf.Direction.random(D, site="resid_post.1", seed=s) for s in (3, 4))
    assert torch.equal(v.vectors, again.vectors) and not torch.allclose(v.vectors, other.vectors)
    assert v.vectors.norm() == pytest.approx(1.0) and v.name == "random-3"
    plane = sf.Direction.random(D, site="resid_post.1", seed=3, k=2)
    torch.testing.assert_close(plane.vectors @ plane.vectors.T, torch.eye(2), atol=1e-6, rtol=0)
    for bad in ({"width": 0}, {"width": 4, "k": 5}, {"width": 4, "k": 0}):
        with pytest.raises(sf.errors.DictionaryError):
            sf.Direction.random(site="resid_post.1", seed=0, **bad)


def test_random_directions_are_uniform_on_the_sphere():
    rows = torch.cat(
        [sf.Direction.random(3, site="resid_post.0", seed=s).vectors for s in range(400)]
    )
    assert rows.mean(0).abs().max() < 0.12
    torch.testing.assert_close(rows.T @ rows / 400, torch.eye(3) / 3, atol=0.07, rtol=0)


def test_random_directions_of_several_dictionaries_are_draws_of_their_own():
    """By latent alone, latent 3 of every layer had one direction: ten controls were one."""
    twins = [make_sae(site=f"resid_post.{layer}") for layer in (0, 1)]  # one SAE at two sites
    saes = [*twins, make_sae(seed=1), make_sae("jumprelu", seed=2), make_sae("topk", seed=3)]
    drawn = [
        sf.controls.random_directions(sae.latents([3]), seed=0).parts[0][0].directions([3])[0]
        for sae in saes
    ]
    cosine = torch.nn.functional.cosine_similarity
    for n, one in enumerate(drawn):
        for other in drawn[:n]:
            assert cosine(one, other, dim=0).abs() < 0.9
    again = sf.controls.random_directions(make_sae().latents([5, 3]), seed=0)
    assert torch.equal(again.parts[0][0].directions([3])[0], drawn[1]), "by content, not by object"


def test_random_directions_of_an_excerpt_are_the_dictionarys(tmp_path):
    sae = make_sae("jumprelu")
    path = sf.save(sf.Ablate(sae.latents([3, 8])), tmp_path / "edit.safetensors")
    held = sf.load(path).parts()[0].latents
    rows = [
        sf.controls.random_directions(latents, seed=2).parts[0][0].directions([8])
        for latents in (held, sae.latents([8]))
    ]
    assert torch.equal(*rows)
