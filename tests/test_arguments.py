"""Public arguments are held to their annotations, where they are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, tensors_for, wrapped
from saefeat import arguments
from test_house import PUBLIC

SAE = make_sae()
LATENTS = SAE.latents([1, 2])
METRIC = sf.logit_diff(5, 6)
RESULTS = {"Provenance", "Texts", "Job", "Finding", "Method", "Backward", "BaselineTop"}
"""Classes that the library makes itself, or that others are derived from."""


@pytest.fixture(scope="module")
def model():
    return wrapped(build("llama"))


# ---------------------------------------------------------------- every public call


def surface() -> dict[str, Callable]:
    """Every public function, constructor and method, by the name that its errors give."""
    found = {}
    for room in (sf, *(getattr(sf, name) for name in PUBLIC)):
        for name in room.__all__:
            what = getattr(room, name)
            if inspect.isclass(what) and not issubclass(what, Exception) and name not in RESULTS:
                members = [(n, m) for n, m in vars(what).items() if n[0] != "_" or n == "__call__"]
                for each, member in [("__init__", vars(what).get("__init__")), *members]:
                    bare = getattr(member, "__func__", member)
                    if inspect.isfunction(bare) and not getattr(
                        bare, "__isabstractmethod__", False
                    ):
                        found[f"{name}.{each}"] = bare
            elif inspect.isfunction(what) and name not in ("render", "versions"):
                found[name] = what
    return found


CALLS = surface()


class Anything:
    """Fits every annotation, so that one parameter of a call can be tried alone."""


class Stranger:
    """Fits none."""


def tried(function: Callable) -> dict[str, inspect.Parameter]:
    """The parameters that an annotation says anything of, and that the function leaves to it."""
    hints = arguments._annotations(inspect.unwrap(function), own(function))
    parameters = inspect.signature(function).parameters
    return {
        name: parameters[name] for name, h in hints.items() if not arguments.fits(Stranger(), h)
    }


@pytest.mark.parametrize("name", CALLS)
def test_every_public_argument_is_checked_before_anything_else(name, monkeypatch):
    function, real = CALLS[name], arguments.fits
    chosen = tried(function)
    monkeypatch.setattr(arguments, "fits", lambda v, h: isinstance(v, Anything) or real(v, h))
    signature = inspect.signature(function)
    for parameter in chosen.values():
        given = {
            other.name: Anything()
            for other in signature.parameters.values()
            if other.default is other.empty and other.kind is not other.VAR_POSITIONAL
        }
        several = parameter.kind is parameter.VAR_POSITIONAL
        call = signature.bind_partial(**given | ({} if several else {parameter.name: Stranger()}))
        if several:
            call.arguments[parameter.name] = (Stranger(),)
        with pytest.raises(sf.SaefeatError, match=f"`{parameter.name}` is .*Stranger.*wanted"):
            function(*call.args, **call.kwargs)


def test_most_parameters_are_tried():
    """Annotations that could not be read would fit anything, and nothing would be tried."""
    counts = [len(tried(function)) for function in CALLS.values()]
    assert sum(counts) > 350 and sum(count > 0 for count in counts) > 120


def own(function: Callable) -> tuple[str, ...]:
    """What a function checks itself: the decorator keeps it beside the annotations."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells["wanted"].cell_contents.__wrapped__.args[1]


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, int, True), (np.int64(1), int, True), (True, int, False), (1.0, int, False),
        (1, float, True), (np.float32(1), float, True), (False, float, False), ("1", float, False),
        (1, bool, False), (np.bool_(True), bool, False), (b"x", str, False),
        (None, int | None, True), ("a", int | None, False), ("a", Literal["a", "b"], True),
        (1, Literal[True], False), ("c", Literal["a", "b"], False),
        ([1, 2], Sequence[int], True), ((1, "a"), Sequence[int], False),
        ("ab", Sequence[str], False),
        (torch.ones(2), Sequence[float], False), (torch.ones(2), Iterable[int], False),
        ({1}, Iterable[int], True), ({"a"}, Iterable[int], False),
        (iter("a"), Iterable[int], True),
        ({"a": 1}, Mapping[str, int], True), ({"a": "b"}, Mapping[str, int], False),
        ((1, "a"), tuple[int, str], True), ((1,), tuple[int, str], False),
        ((1, 2), tuple[int, ...], True),
        (len, Callable[[int], int], True), (3, Callable[[int], int], False),
    ],
)  # fmt: skip
def test_what_fits_an_annotation(value, hint, right):
    assert arguments.fits(value, hint) is right


# ---------------------------------------------------------------- what users give


def attributed(model, **options):
    return sf.Attribute(SAE, METRIC, **options)(model, RAGGED)


READINGS = sf.results.Readings(LATENTS, torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))

WRONG = {
    "a word for a baseline": (lambda m: attributed(m, baseline="mean"), "Fixed"),
    "a number for a baseline": (lambda m: attributed(m, baseline=5.0), "Ablate"),
    "a tensor for a baseline": (lambda m: attributed(m, baseline=torch.zeros(D)), "a tensor"),
    "readings for a baseline": (lambda m: attributed(m, baseline=READINGS), "wanted an interv"),
    "a class for a baseline": (lambda m: attributed(m, baseline=sf.attribution.Fixed), "class"),
    "a dictionary for a baseline": (lambda m: attributed(m, baseline=SAE), "`baseline`"),
    "latents for a baseline": (lambda m: attributed(m, baseline=LATENTS), "`baseline`"),
    "a word for a rule": (lambda m: attributed(m, where="last"), r"Tokens.last\(1\)"),
    "a position for a rule": (lambda m: attributed(m, where=-1), "a Tokens rule"),
    "a rule not called": (lambda m: attributed(m, where=sf.Tokens.last), r"Tokens.last\(\.\.\.\)"),
    "a word for a method": (lambda m: attributed(m, method="IG"), r"IG\(10\)"),
    "a class for a method": (lambda m: attributed(m, method=sf.IG), r"IG\(\.\.\.\)"),
    "a rule for a method": (lambda m: attributed(m, method=sf.attribution.RelP()), "`method`"),
    "a method for a rule": (lambda m: attributed(m, backward=sf.IG(2)), r"RelP\(\)"),
    "a word for a switch": (lambda m: attributed(m, one_site="no"), "True or False"),
    "a number for a switch": (lambda m: attributed(m, one_site=1), "True or False"),
    "a word for a metric": (lambda m: sf.Attribute(SAE, "logit"), r"logit_diff\("),
    "a metric not called": (lambda m: sf.Attribute(SAE, sf.metrics.logit), r"logit\(\.\.\.\)"),
    "a function for a metric": (lambda m: sf.Attribute(SAE, lambda x: x), "`metric`"),
    "indices for a target": (lambda m: sf.Attribute([1, 2], METRIC), "`target`"),
    "a class for a target": (lambda m: sf.Attribute(sf.SAE, METRIC), "`target`"),
    "a word for where": (lambda m: sf.Clamp(LATENTS, 1.0, where="last"), "`where`"),
    "a number for when": (lambda m: sf.Ablate(LATENTS, when=3), r"When\(latents, above=1.0\)"),
    "a function for when": (lambda m: sf.Ablate(LATENTS, when=lambda x: x > 0), "`when`"),
    "a word for a switch of Clamp": (
        lambda m: sf.Clamp(LATENTS, 1.0, active_only="no"),
        "`active_only`",
    ),
    "a truth for a value": (lambda m: sf.Clamp(LATENTS, True), "`value`"),
    "truths for values": (lambda m: sf.Ablate(LATENTS, to=torch.tensor([True, False])), "`to`"),
    "a truth for a bound": (lambda m: sf.Clamp(LATENTS, low=False), "`low`"),
    "a truth for a threshold": (lambda m: sf.When(LATENTS, above=True), "`above`"),
    "no value at all": (lambda m: sf.Ablate(LATENTS, to=None), "`to`"),
    "a tensor of tokens": (lambda m: sf.logit_diff(torch.tensor([1]), 2), "`positive`"),
    "an array of tokens": (lambda m: sf.logit_diff(1, np.array([2])), "`negative`"),
    "a truth for a token": (lambda m: sf.metrics.logit(True), "`token`"),
    "no token": (lambda m: sf.metrics.logit([]), "`token`"),
    "no token for one prompt": (
        lambda m: sf.metrics.logit(sf.metrics.PerPrompt([3, []])),
        "`token`",
    ),
    "a float for a token": (lambda m: sf.metrics.logit(2.0), "`token`"),
    "a token from the end": (lambda m: sf.metrics.logit(-1), "from 0"),
    "a true number of tokens": (lambda m: sf.Tokens.first(True), "Tokens.first"),
    "tokens as a list": (lambda m: sf.Tokens.ids([1, 2]), "Tokens.ids"),
    "a token's word": (lambda m: sf.Tokens.ids("a"), "Tokens.ids"),
    "tokens from the end": (lambda m: sf.Tokens.ids(-1), "Tokens.ids"),
    "half a token": (lambda m: sf.Tokens.ids(1.7), "Tokens.ids"),
    "a span backward": (lambda m: sf.Tokens.generated(3, 1), "Tokens.generated"),
    "a span to True": (lambda m: sf.Tokens.generated(0, True), "Tokens.generated"),
    "a rule and a number": (lambda m: sf.Tokens.last(1) & 3, r"Tokens & other"),
    "a verb and a number": (lambda m: sf.Ablate(LATENTS) | 3, r"Ablate\(latents\)"),
    "a verb and latents": (lambda m: sf.Ablate(LATENTS) & LATENTS, r"Intervention & other"),
    "latents and a number": (lambda m: LATENTS | 3, r"Latents \| other"),
    "latents less a number": (lambda m: LATENTS - 3, r"Latents - other"),
    "a rule of no kind": (lambda m: sf.Tokens(("bogus",)), "Tokens: `rule`"),
    "a rule of nothing": (lambda m: sf.Tokens(()), "Tokens: `rule`"),
    "a rule with a word for a number": (lambda m: sf.Tokens(("last", "1")), "Tokens: `rule`"),
    "a rule around none": (lambda m: sf.Tokens(("not", ("first",))), "Tokens: `rule`"),
    "a rule that is no function": (lambda m: sf.Tokens.where(5), "wanted a function.$"),
    "an imaginary value": (lambda m: sf.Clamp(LATENTS, 1j), "`value`"),
    "imaginary values": (
        lambda m: sf.Ablate(LATENTS, to=torch.ones(2, dtype=torch.complex64)),
        "`to`",
    ),
    "an imaginary vector": (
        lambda m: sf.Direction(torch.ones(D, dtype=torch.complex64), site="resid_post.1"),
        "complex64",
    ),
    "a mask for a vector": (
        lambda m: sf.Direction(torch.ones(D, dtype=torch.bool), site="resid_post.1"),
        "bool",
    ),
    "tensors without numbers": (
        lambda m: sf.SAE.from_tensors(
            {n: t.to("meta") for n, t in tensors_for("standard").items()}, site="resid_post.1"
        ),
        "on meta",
    ),
    "latents for an intervention": (lambda m: sf.run(m, RAGGED, LATENTS), "`intervention`"),
    "latents in a sweep": (lambda m: sf.sweep(m, RAGGED, {"a": LATENTS}), "`settings`"),
    "a list for a sweep": (lambda m: sf.sweep(m, RAGGED, [sf.Ablate(LATENTS)]), "`settings`"),
    "a half batch for a sweep": (
        lambda m: sf.sweep(m, RAGGED, {"a": None}, batch_size=2.5),
        "`batch_size`",
    ),
    "latents to edit with": (lambda m: sf.edit(m, LATENTS), "`intervention`"),
    "the module to edit": (
        lambda m: sf.edit(m._module, sf.Ablate(LATENTS)),
        "the module itself.*Try",
    ),
    "the module to run": (lambda m: sf.run(m.eval(), RAGGED), "the module itself"),
    "the module for a verb": (lambda m: sf.Ablate(LATENTS)(m._module), "TransformersModel"),
    "a verb outside a block": (lambda m: sf.Ablate(LATENTS)(m), "outside the block"),
    "watching outside a block": (lambda m: sf.Attribute(SAE, METRIC).watch(m), "outside the blo"),
    "a word for an intervention": (lambda m: sf.hooked(m._module, "none"), "`intervention`"),
    "a place for a server": (lambda m: sf.run(m, RAGGED, on="http://x"), r"Server\(\)"),
    "a number for a folder": (lambda m: sf.run(m, RAGGED, checkpoint=3), "`checkpoint`"),
    "a way of decoding by name": (
        lambda m: sf.run(m, RAGGED, max_new_tokens=2, decode="greedy"),
        r"Greedy\(\)",
    ),
    "a class to decode with": (
        lambda m: sf.run(m, RAGGED, max_new_tokens=2, decode=sf.generation.Greedy),
        r"Greedy\(\.\.\.\)",
    ),
    "a word for progress": (lambda m: sf.run(m, RAGGED, progress="yes"), "`progress`"),
    "a site that is none": (lambda m: sf.Direction(torch.ones(D), site=3), "`site`"),
    "a vector as a list": (lambda m: sf.Direction([1.0] * D, site="resid_post.1"), "as_tensor"),
    "a width of none": (lambda m: sf.Neurons("mlp_post.1", 0), "`width`"),
    "a value of another width": (lambda m: SAE.encode(torch.ones(2, D + 1)), "`x`"),
    "neither folder nor SAE": (lambda m: sf.load_sae(3.5), "`folder`"),
    "tensors for sites": (lambda m: sf.Direction.at_sites(torch.ones(3), sites=[3]), "`site"),
    "tensors for dictionaries": (lambda m: sf.dictionaries.Dictionaries([None]), "`dictionaries`"),
    "fewer than none": (lambda m: LATENTS.sample(-1, seed=0), "`n`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_users_give_is_refused_where_they_give_it(name, model):
    call, message = WRONG[name]
    with pytest.raises(sf.SaefeatError, match=message):
        call(model)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("resid_psot.3", '"resid_post.3"'),
        ("blocks.7.hook_resid_psot", '"resid_post.7"'),
        ("blocks.7.mlp_out", '"mlp_out.7"'),
        ("ResidPre.1", '"resid_pre.1"'),
        ("mlp_oot", '"mlp_out.3"'),
        ("model.layers.4.mlp", '"model.layers.4.mlp.output"'),
    ],
)
def test_a_site_nearly_right_is_named(given, meant):
    with pytest.raises(sf.errors.SiteError) as error:
        sf.Site.parse(given)
    assert f"Try: Site.parse({meant}" in str(error.value)


def test_a_dictionary_nearly_named_is_named():
    saes = sf.dictionaries.Dictionaries([SAE])
    with pytest.raises(sf.errors.SiteError, match=r'Try: saes\["resid_post.1"\]'):
        saes["resid_post.11"]
    with pytest.raises(sf.errors.SiteError, match='"resid_pre", 3'):
        sf.Site("resid_pree", 1)


def test_numpys_integers_are_integers(model):
    plain = sf.metrics.measure(model, RAGGED, sf.logit_diff(5, 6))
    numpys = sf.metrics.measure(model, RAGGED, sf.logit_diff(np.int64(5), [np.int32(6)]))
    assert torch.equal(plain, numpys)
    assert sf.Tokens.ids(np.int64(4)) == sf.Tokens.ids(4)


def test_missing_and_unknown_arguments_are_pythons_own_errors():
    with pytest.raises(TypeError, match="missing"):
        sf.Ablate()
    with pytest.raises(TypeError, match="unexpected"):
        sf.Ablate(LATENTS, wehre=None)


def test_every_argument_may_be_given_by_name():
    x = torch.ones(2, D)
    assert torch.equal(SAE.reconstruct(x=x), SAE.reconstruct(x))
    assert torch.equal(SAE.encode(x=x, indices=[3]), SAE.encode(x, [3]))
    assert torch.equal(SAE.directions(indices=[3]), SAE.directions([3]))


def test_signatures_and_types_stay_as_written():
    assert list(inspect.signature(sf.Ablate).parameters) == ["latents", "to", "where", "when"]
    assert sf.run.__name__ == "run" and sf.run.__doc__


BEYOND = {
    "an id": (lambda: sf.Tokens.ids(10**25), "Tokens.ids: `ids` is .*below 2"),
    "a count from the start": (lambda: sf.Tokens.first(10**25), "Tokens.first: `n`"),
    "a count from the end": (lambda: sf.Tokens.last(2**63), "Tokens.last: `n`"),
    "a position": (lambda: sf.Tokens.positions(10**25), "`start and stop`"),
    "a generated token": (lambda: sf.Tokens.generated(0, 10**25), "`start and stop`"),
    "a stop": (lambda: sf.generation.Greedy(stop=(10**25,)), "Greedy: `stop` is 1"),
    "a rule of one argument": (
        lambda: sf.Tokens.where(lambda ids: ids > 3),
        r"`function` is one of \(ids\), wanted one that is called with two",
    ),
    "a rule of three arguments": (lambda: sf.Tokens.where(lambda a, b, c: a > 3), "'c'"),
    "a rule with a keyword to give": (lambda: sf.Tokens.where(lambda a, b, *, c: a > 3), "'c'"),
    "an array among tensors": (
        lambda: sf.SAE.from_tensors(weights(W_enc=torch.ones(8, 4).numpy()), site="resid_post.1"),
        "`tensors` is a dict, whose entry 'W_enc' is",
    ),
    "a list among tensors": (
        lambda: sf.SAE.from_tensors(weights(b_enc=[0.0] * 4), site="resid_post.1"),
        "whose entry 'b_enc' is",
    ),
    "imaginary weights": (
        lambda: sf.SAE.from_tensors(
            weights(W_dec=torch.ones(4, 8, dtype=torch.complex64)), site="resid_post.1"
        ),
        "`W_dec` is of torch.complex64",
    ),
}


def weights(**other):
    tensors = {"W_enc": torch.ones(8, 4), "b_enc": torch.zeros(4)}
    return tensors | {"W_dec": torch.ones(4, 8), "b_dec": torch.zeros(8)} | other


@pytest.mark.parametrize("name", BEYOND)
def test_what_would_fail_in_another_library_is_refused_where_it_is_given(name):
    call, said = BEYOND[name]
    with pytest.raises(sf.SaefeatError, match=said):
        call()


def test_rules_of_two_arguments_in_any_form_are_taken():
    for rule in (lambda ids, at: ids > at, lambda *both: both[0] > 3, lambda a, b, c=1: a > c):
        assert sf.Tokens.where(rule)
    assert sf.Tokens.where(torch.eq), "a function of C has no signature"
