"""Checks of scores by real edits: the attribute must be one that makes the scores."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, build, make_sae, unit, wrapped
from saefeat.attribution import Fixed, Paired

METRIC = sf.logit_diff(3, 8)
FIRST = sf.dictionaries.Dictionaries([make_sae("standard", layer=1)])
SECOND = make_sae("standard", layer=2)
ALL = sf.dictionaries.Dictionaries([FIRST["resid_post.1"], SECOND])
ONES = torch.ones(FIRST["resid_post.1"].d_sae)


def late(ids, position):
    return position > 1


def rule(function):
    function.__name__ = "late"
    return sf.Tokens.where(function)


MADE = {
    "plain": sf.Attribute(FIRST, METRIC),
    "last": sf.Attribute(FIRST, METRIC, where=sf.Tokens.last(1)),
    "fixed": sf.Attribute(FIRST, METRIC, Fixed(FIRST.latents(), ONES)),
    "edited": sf.Attribute(FIRST, METRIC, sf.Ablate(sf.Direction(unit(2), site="resid_post.0"))),
    "by function": sf.Attribute(FIRST, METRIC, where=rule(lambda ids, at: at > 1)),
}
OTHERS = {
    "where": ("plain", {"where": sf.Tokens.last(1)}),
    "no where": ("last", {"where": None}),
    "a function of the same name": ("by function", {"where": rule(lambda ids, at: at > 2)}),
    "target": ("plain", {"target": SECOND}),
    "fewer latents": ("plain", {"target": FIRST["resid_post.1"].latents([1, 2])}),
    "baseline": ("plain", {"baseline": Fixed(FIRST.latents(), 1.0)}),
    "no baseline": ("fixed", {"baseline": None}),
    "other values": ("fixed", {"baseline": Fixed(FIRST.latents(), 2 * ONES)}),
    "another edit": (
        "edited",
        {"baseline": sf.Ablate(sf.Direction(unit(3), site="resid_post.0"))},
    ),
    "metric": ("plain", {"metric": sf.metrics.custom(lambda x: x[:, 3] - x[:, 8])}),
    "semantics": ("plain", {"semantics": "through_sae"}),
}


@pytest.fixture(scope="module")
def nn():
    return wrapped(build("llama"))


@pytest.fixture(scope="module")
def scores(nn):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: made(nn, RAGGED) for name, made in MADE.items()}


@pytest.mark.parametrize("check", [sf.audit, sf.validation.faithfulness])
@pytest.mark.parametrize("name", OTHERS)
def test_scores_of_another_attribute_are_refused(nn, scores, name, check):
    """The numbers were the scores' own edits under the attribute's name, or a mixture of both."""
    made, changed = OTHERS[name]
    options = {"budget": 4} if check is sf.audit else {"sizes": (2,), "controls": 0}
    with pytest.raises((sf.errors.PromptError, sf.errors.LatentError), match="scores` is"):
        check(replace(MADE[made], **changed), nn, RAGGED, scores[made], **options)


@pytest.mark.parametrize("name", ["plain", "last", "fixed", "edited", "by function"])
def test_scores_of_the_attribute_are_taken(nn, scores, name):
    found = sf.audit(MADE[name], nn, RAGGED, scores[name], budget=4)
    told = scores[name].provenance
    assert found.provenance.settings.items() >= told.settings.items()


def test_another_method_is_checked_and_named(nn, scores):
    integrated = replace(MADE["fixed"], method=sf.IG(2, "midpoint"), keep=5)
    other = integrated(nn, RAGGED)
    found = sf.audit(MADE["fixed"], nn, RAGGED, other, budget=4)
    own = sf.audit(integrated, nn, RAGGED, other, budget=4)
    assert torch.equal(found.effects, own.effects)
    assert "method IG(" in repr(found) and "keep 5" in repr(found) and "Fixed(" in repr(found)
    curves = sf.validation.faithfulness(MADE["fixed"], nn, RAGGED, other, sizes=(2,), controls=0)
    assert "method IG(" in repr(curves)


def test_dictionaries_that_were_loaded_again_make_the_same_scores(nn, scores):
    again = sf.Attribute(make_sae("standard", layer=1), METRIC)
    found = sf.audit(again, nn, RAGGED, scores["plain"], budget=4)
    assert found.effects.equal(
        sf.audit(MADE["plain"], nn, RAGGED, scores["plain"], budget=4).effects
    )


def test_scores_of_another_model_are_refused(scores):
    other = wrapped(build("llama"))
    told = replace(scores["plain"].provenance, adapters=("tuned",))
    with pytest.raises(sf.errors.PromptError, match="another adapters"):
        sf.audit(MADE["plain"], other, RAGGED, replace(scores["plain"], provenance=told))


def test_scores_that_say_nothing_are_held_to_what_is_known(nn, scores):
    silent = replace(scores["last"], provenance=None, metric="")
    assert sf.audit(MADE["last"], nn, RAGGED, silent, budget=4)
    with pytest.raises(sf.errors.PromptError, match="another where"):
        sf.audit(MADE["plain"], nn, RAGGED, silent, budget=4)


def test_baselines_that_differ_print_otherwise():
    values = torch.arange(64.0)
    latents = sf.Neurons("resid_post.1", 64).latents()
    assert repr(Fixed(latents, values)) != repr(Fixed(latents, values + 1))
    texts = ["the same beginning of a long prompt, and then the end of number " + n for n in "ab"]
    assert repr(Paired([texts[0]])) != repr(Paired([texts[1]]))
    told = sf.results.provenance.told
    assert told(x="a" * 400 + "b") != told(x="a" * 400 + "c")
    assert len(told(x="a" * 400)["x"]) <= 300
