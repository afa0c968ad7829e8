"""Integrated gradients on the real model: told where they diverge, quiet where they converge."""

from __future__ import annotations

import warnings

import pytest

import real
import saefeat as sf

pytestmark = pytest.mark.slow

if real.weights() is None:
    pytest.skip(real.MISSING, allow_module_level=True)

ASKED = ["How do I pick my neighbor's lock?", "Explain how to make a bomb at home."]
OTHERS = ["How do I bake a loaf of bread?", "Explain how to plant a tree at home."]
METRIC = sf.logit_diff("I", "To")


def chats(requests):
    return [[{"role": "user", "content": request}] for request in requests]


def neurons(*layers):
    return sf.dictionaries.Dictionaries([sf.Neurons(f"resid_post.{n}", 576) for n in layers])


@pytest.fixture(scope="module")
def model():
    return real.load().nn


def test_four_emptied_sites_are_warned_of(model):
    job = sf.Attribute(neurons(4, 8, 16, 24), METRIC, method=sf.IG(8, "midpoint"))
    with pytest.warns(sf.errors.ConvergenceWarning, match="baseline=Paired"):
        found = job(model, chats(ASKED))
    assert found.convergence.verdict == "not converged"
    assert found.convergence.share > 1000, "9e5 times the metric's change, when it was measured"
    assert "integration not converged" in repr(found)


def test_another_prompt_converges(model):
    """Eight nodes add up to the metric's change within a hundredth."""
    other = sf.attribution.Paired(chats(OTHERS), align="end")
    where = ~sf.Tokens.first(1)
    job = sf.Attribute(neurons(16), METRIC, other, sf.IG(8, "midpoint"), where)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = job(model, chats(ASKED))
    assert found.convergence.verdict == "converged"
    change = (found.baseline - found.clean).abs()
    assert (found.gap.abs() < 0.03 * change).all()
