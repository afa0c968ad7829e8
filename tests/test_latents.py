"""Selections: set algebra against Python's sets, order, errors; what the verbs refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saefeat as sf
from helpers import D_SAE, LAYERS, RAGGED, D, build, make_sae, unit, wrapped

SAES = sf.dictionaries.Dictionaries(make_sae(layer=layer, seed=layer) for layer in range(LAYERS))
choices = st.dictionaries(
    st.integers(0, LAYERS - 1),
    st.lists(st.integers(0, D_SAE - 1), unique=True, max_size=6),
    max_size=LAYERS,
)


def pairs(latents: sf.Latents) -> list[tuple[int, int]]:
    return [(site.layer, index) for site, index in latents]


def flat(choice: dict) -> list[tuple[int, int]]:
    return [(layer, index) for layer, indices in choice.items() for index in indices]


# ---------------------------------------------------------------- algebra


@given(one=choices, two=choices)
def test_algebra_is_that_of_sets(one, two):
    a, b = SAES.latents(one), SAES.latents(two)
    x, y = set(flat(one)), set(flat(two))
    for found, wanted in ((a | b, x | y), (a & b, x & y), (a - b, x - y)):
        assert set(pairs(found)) == wanted
        assert len(found) == len(pairs(found)) == len(wanted)
    assert (a | b) - b == a - b
    assert len((a - b) & b) == 0
    assert set(pairs(a)) == x and set(pairs(b)) == y, "operands are left as they were"


@given(one=choices, two=choices)
def test_union_keeps_the_order_of_its_parts(one, two):
    union = SAES.latents(one) | SAES.latents(two)
    for layer in range(LAYERS):
        first, second = one.get(layer, []), two.get(layer, [])
        wanted = first + [index for index in second if index not in first]
        assert [index for at, index in pairs(union) if at == layer] == wanted
    layers = [layer for part in (one, two) for layer in part if part[layer]]
    assert [site.layer for site in union.sites] == list(dict.fromkeys(layers))


@given(choice=choices)
def test_iteration_and_to_dict_are_in_the_order_given(choice):
    latents = SAES.latents(choice)
    assert pairs(latents) == flat(choice)
    wanted = {f"resid_post.{layer}": indices for layer, indices in choice.items() if indices}
    assert latents.to_dict() == wanted


def test_values_meet_latents_in_iteration_order():
    """Per-latent values are read in the order of iteration, also over several dictionaries."""
    latents = SAES.latents({2: [7, 3], 0: [40]})
    values = torch.tensor([1.0, 2.0, 3.0])
    step = sf.Clamp(latents, values) | sf.Probe(latents)
    model = build("llama")
    seen = {}
    for layer in (0, 2):
        model.model.layers[layer].register_forward_hook(
            lambda m, a, out, layer=layer: seen.__setitem__(layer, out)
        )
    with torch.no_grad(), sf.hooked(model, step) as log:
        model(torch.randint(4, 90, (2, 5)))
    (reading,) = step.readings(log)
    assert reading.values.shape == (2, 5, 3)
    for layer, columns, indices in ((2, [0, 1], [7, 3]), (0, [2], [40])):
        x = seen[layer]
        f = SAES[layer].encode(x, indices)
        moved = x + (values[columns] - f) @ SAES[layer].directions(indices)
        wanted = SAES[layer].encode(moved, indices)
        torch.testing.assert_close(reading.values[..., columns], wanted, atol=1e-4, rtol=1e-4)


@given(
    selections=st.lists(choices, min_size=1, max_size=4),
)
def test_stack_says_who_holds_what(selections):
    chosen = [SAES.latents(choice) for choice in selections]
    union, member = sf.values.per_prompt(chosen)
    assert set(pairs(union)) == {pair for choice in selections for pair in flat(choice)}
    assert member.shape == (len(chosen), len(union)) and member.dtype == torch.bool
    for row, choice in zip(member.tolist(), selections, strict=True):
        held = {pair for pair, yes in zip(pairs(union), row, strict=True) if yes}
        assert held == set(flat(choice))


def test_two_dictionaries_of_one_site_stay_apart():
    a, b = make_sae(seed=1), make_sae(seed=2)
    both = a.latents([3]) | b.latents([3])
    assert len(both) == 2 and both.sites == (a.site,)
    assert (both - a.latents([3])) == b.latents([3])


# ---------------------------------------------------------------- repr, sample


def test_repr_shows_what_is_selected():
    assert repr(SAES.latents({1: [5, 2], 0: [7]})) == (
        "Latents(3: resid_post.1 [5, 2], resid_post.0 [7])"
    )
    assert repr(SAES[0].latents([])) == "Latents(0)"
    assert repr(SAES[0].latents(range(9))) == (
        "Latents(9: resid_post.0 [0, 1, 2, 3, 4, ... 9 in all])"
    )
    many = sf.Direction.at_sites(unit(), sites=[f"resid_post.{n}" for n in range(9)]).latents()
    assert repr(many).endswith("resid_post.5 [0], and 3 more sites)")


@given(choice=choices, seed=st.integers(0, 99), data=st.data())
def test_samples_are_subsets_and_depend_on_the_seed_alone(choice, seed, data):
    latents = SAES.latents(choice)
    n = data.draw(st.integers(0, len(latents)))
    found = latents.sample(n, seed=seed)
    assert len(found) == n and len(found - latents) == 0
    assert found == latents.sample(n, seed=seed)


def test_samples_differ_between_seeds_and_reach_every_site():
    every = SAES.latents()
    samples = [every.sample(20, seed=seed) for seed in range(20)]
    assert len({repr(sample.to_dict()) for sample in samples}) == 20
    assert all(len(sample.sites) > 1 for sample in samples)
    counts = [sum(len(s & SAES[n].latents()) for s in samples) for n in range(LAYERS)]
    assert min(counts) > 80, "400 draws from three equal parts"


def test_a_sample_larger_than_its_source():
    with pytest.raises(sf.errors.LatentError, match="at most 2"):
        SAES[0].latents([1, 2]).sample(3, seed=0)


# ---------------------------------------------------------------- bad indices


@pytest.mark.parametrize(
    "indices",
    [
        [-1],
        [0, D_SAE],
        [3, 3],
        [True],
        [1.0],
        ["1"],
        [None],
        torch.tensor([-1]),
        torch.tensor([0.5]),
        torch.tensor([2, 2]),
        torch.ones(D_SAE, dtype=torch.bool),
    ],
    ids=str,
)
def test_bad_indices(indices):
    """Latent index negative, out of range, or from another width."""
    with pytest.raises(sf.errors.LatentError) as caught:
        SAES[1].latents(indices)
    assert "resid_post.1" in str(caught.value) and f"0..{D_SAE - 1}" in str(caught.value)
    with pytest.raises(sf.errors.LatentError):
        SAES.latents({1: indices})


@pytest.mark.parametrize("indices", [3, torch.tensor(3), torch.tensor([[1, 2]])], ids=str)
def test_indices_that_are_no_flat_list(indices):
    with pytest.raises(sf.errors.LatentError):
        SAES[1].latents(indices)


@pytest.mark.parametrize(
    ("indices", "cause"),
    [
        (42, "one number"),
        ("42", "one number or a word"),
        ([True, False], "a mask"),
        (np.ones(D_SAE, dtype=bool), "a mask"),
        ([1.5], "no whole number"),
        ([-1], "from the end"),
        ([D_SAE], "another width"),
    ],
    ids=str,
)
def test_bad_indices_have_a_cause_of_their_own(indices, cause):
    with pytest.raises(sf.errors.LatentError, match=f"cause: .*{cause}"):
        SAES[1].latents(indices)


def test_numpy_indices_are_whole_numbers():
    assert list(SAES[1].latents(np.array([4, 2]))) == list(SAES[1].latents([4, 2]))


def test_an_unknown_site():
    with pytest.raises(sf.errors.SiteError, match="no dictionary there"):
        SAES.latents({7: [1]})


# ---------------------------------------------------------------- verbs


VERBS = {
    "Ablate": sf.Ablate,
    "Probe": sf.Probe,
    "Clamp": lambda latents: sf.Clamp(latents, 1.0),
    "When": sf.When,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "subject", [SAES[0].latents([]), [1, 2], None, "resid_post.0", SAES.at("mlp_out")], ids=repr
)
def test_verbs_refuse_what_selects_nothing(verb, subject):
    with pytest.raises(sf.errors.LatentError) as caught:
        VERBS[verb](subject)
    text = str(caught.value)
    assert verb in text and "at least one latent" in text and "Try: " in text


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_take_latents_dictionaries_and_mappings(verb):
    assert VERBS[verb](SAES[1]).latents == SAES[1].latents()
    assert VERBS[verb](SAES).latents == SAES.latents()
    chosen = SAES.latents({1: [2]})
    assert VERBS[verb](chosen).latents is chosen


ONE = sf.Direction(torch.ones(D), site="resid_post.1")
REPRS = {
    "Ablate(ONE)": lambda: sf.Ablate(ONE),
    "Ablate(ONE, to=2.5)": lambda: sf.Ablate(ONE, to=2.5),
    "Ablate(ONE, where=Tokens.last(2))": lambda: sf.Ablate(ONE, where=sf.Tokens.last(2)),
    "Clamp(ONE, value=4.0)": lambda: sf.Clamp(ONE, 4.0),
    "Clamp(ONE, scale=-1.0, low=0.0, active_only=True)": lambda: sf.Clamp(
        ONE, scale=-1.0, low=0.0, active_only=True
    ),
    "Clamp(ONE, add=1.5, where=~Tokens.first(1))": lambda: sf.Clamp(
        ONE, add=1.5, where=~sf.Tokens.first(1)
    ),
    "Clamp(ONE, low=-1.0, high=1.0)": lambda: sf.Clamp(ONE, low=-1.0, high=1.0),
    "Probe(ONE)": lambda: sf.Probe(ONE),
    "Probe(ONE, where=Tokens.prompt(), reduce='max')": lambda: sf.Probe(
        ONE, where=sf.Tokens.prompt(), reduce="max"
    ),
}


@pytest.mark.parametrize("text", REPRS)
def test_a_verb_prints_the_call_that_makes_it(text):
    """And the call, with the selection named, makes one that does the same."""
    step = REPRS[text]()
    assert repr(step) == text.replace("ONE", "Latents(1: resid_post.1 [0])")
    names = {"ONE": ONE, **{n: getattr(sf, n) for n in ("Ablate", "Clamp", "Probe", "Tokens")}}
    again = eval(text, names)
    assert repr(again) == repr(step) and again == step


@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, 16777217.0])
def test_numbers_are_kept_as_they_were_given(value):
    """repr is the constructor call, and a float64 model is clamped at the value asked for."""
    assert sf.Clamp(ONE, value).value == value
    assert sf.Ablate(ONE, to=value).to == value


def test_chains_flatten_and_print():
    a, b, c = sf.Ablate(ONE), sf.Probe(ONE), sf.Clamp(ONE, 1.0)
    assert ((a | b) | c).parts() == (a | (b | c)).parts() == (a, b, c)
    assert repr(a | b) == f"{a!r} | {b!r}"
    assert repr(sf.verbs.base.Chain(())) == "Chain(())" and sf.verbs.base.Chain(()).parts() == ()
    assert (sf.verbs.base.Chain(()) | a).parts() == (a,)


def test_verbs_are_frozen():
    for step in (sf.Ablate(ONE), sf.Clamp(ONE, 1.0), sf.Probe(ONE)):
        with pytest.raises(AttributeError):
            step.where = None


def test_equality_of_verbs_with_values():
    chosen = SAES[1].latents([2, 3])
    make = lambda: sf.Clamp(chosen, torch.tensor([1.0, 2.0]))  # noqa: E731
    assert make() == make()


@pytest.mark.parametrize(
    "make",
    [
        lambda ls: sf.Clamp(ls),
        lambda ls: sf.Clamp(ls, 1.0, scale=2.0),
        lambda ls: sf.Clamp(ls, 1.0, add=2.0),
        lambda ls: sf.Clamp(ls, scale=1.0, add=2.0),
        lambda ls: sf.Clamp(ls, 0.0, add=0.0),
        lambda ls: sf.Clamp(ls, active_only=True),
    ],
)
def test_clamp_takes_exactly_one_change(make):
    with pytest.raises(sf.errors.LatentError, match="Clamp"):
        make(SAES[1].latents([2, 3]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["value", "scale", "add", "low", "high", "to"])
def test_values_that_are_not_finite(name, bad):
    chosen = SAES[1].latents([2, 3])
    verb = sf.Ablate if name == "to" else sf.Clamp
    for value in (bad, torch.tensor([1.0, bad])):
        with pytest.raises(sf.errors.LatentError, match="finite"):
            verb(chosen, **{name: value})


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (3, 3), (0, 2), (2, 2, 2)])
@pytest.mark.parametrize("name", ["value", "scale", "add", "to"])
def test_values_of_another_length(name, shape):
    chosen = SAES[1].latents([2, 3])
    verb = sf.Ablate if name == "to" else sf.Clamp
    with pytest.raises(sf.errors.LatentError) as caught:
        verb(chosen, **{name: torch.ones(shape)})
    assert str(shape) in str(caught.value) and "[2]" in str(caught.value)


def test_ablate_to_a_word_it_does_not_know():
    with pytest.raises(sf.errors.LatentError, match="read them with a Probe"):
        sf.Ablate(ONE, to="mean")


def test_probe_with_an_unknown_reduction():
    with pytest.raises(sf.errors.LatentError, match="'median'"):
        sf.Probe(ONE, reduce="median")


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (torch.tensor([0.0, 1.0]), None),
        (None, torch.tensor([0.5, 1.0])),
        (torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0])),
        (torch.tensor([0.0, 1.0]), 2.0),
    ],
)
def test_bounds_may_differ_by_latent(low, high):
    chosen = SAES[1].latents([2, 3])
    step = sf.Clamp(chosen, 5.0, low=low, high=high) | sf.Clamp(chosen, -5.0, low=low, high=high)
    out = sf.run(wrapped(build("llama")), RAGGED, step)
    assert all(row.changed > 0 for row in out.receipt.rows)


def test_values_of_a_verb_follow_nothing():
    """A tensor changed after the verb was made must not change the verb."""
    chosen = SAES[1].latents([2, 3])
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    step = sf.Clamp(chosen, values)
    assert not step.value.requires_grad


def test_a_verb_is_not_an_alias_of_its_values():
    chosen = SAES[1].latents([2, 3])
    values = torch.tensor([1.0, 2.0])
    step = sf.Clamp(chosen, values)
    values.zero_()
    assert step.value.tolist() == [1.0, 2.0]
