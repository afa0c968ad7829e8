"""Attribution on the released server: the scores of a run here, or an error that says why not."""

from __future__ import annotations

import pytest
import torch
from cells import latents
from served import CHATS, ISOLATIONS, client

import saefeat as sf
from helpers import make_sae, unit

pytestmark = pytest.mark.ndif
METRIC = sf.logit_diff(5, 6)
PUSH = sf.Ablate(sf.Direction(unit(), site="resid_post.0"))
GRADIENTS = {"AtP": sf.attribution.AtP(), "IG": sf.IG(steps=3, rule="midpoint")}
FORWARD = {"Exact": sf.attribution.Exact(), "steps": sf.attribution.FiniteDifference()}


def saes() -> sf.dictionaries.Dictionaries:
    return sf.dictionaries.Dictionaries(make_sae("jumprelu", f"resid_post.{n}", n) for n in (0, 1))


def equal(here: sf.attribution.Attribution, there: sf.attribution.Attribution, atol: float) -> None:
    assert float(here.score.abs().max()) > 1e-3
    for name in ("prompt", "position", "latent"):
        assert torch.equal(getattr(here, name), getattr(there, name))
    for name in ("score", "activation", "change", "clean", "baseline"):
        mine, theirs = getattr(here, name), getattr(there, name)
        torch.testing.assert_close(theirs, mine, atol=atol, rtol=10 * atol)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("baseline", [None, PUSH], ids=["bare", "baseline"])
def test_gradients_beside_the_model(name, baseline, served_models, server):
    model = client(served_models["trusted", "float32"])
    attribute = sf.Attribute(saes(), METRIC, baseline=baseline, method=GRADIENTS[name])
    equal(attribute(model, CHATS), attribute(model, CHATS, on=server), 1e-6)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_do_not_cross_into_the_sandbox(name, served_models, server):
    """They are refused, with what to do instead: not zeros."""
    model = client(served_models["sandbox", "float32"])
    attribute = sf.Attribute(saes(), METRIC, method=GRADIENTS[name])
    with pytest.raises(sf.errors.GradientError, match=r"process of their own.*method=Exact\(\)"):
        attribute(model, CHATS, on=server)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_forward_passes_alone(isolation, name, served_models, server):
    """A finite difference is divided by its step, and with it what two logits differ by."""
    model = client(served_models[isolation, "float32"])
    attribute = sf.Attribute(latents(0), METRIC, method=FORWARD[name])
    equal(attribute(model, CHATS), attribute(model, CHATS, on=server), 1e-4)
