"""Attribute remotely: the scores of a run here, or an error that says why and what else to do."""

from __future__ import annotations

import pytest
import torch
from nnsight import CONFIG

import saefeat as sf
from helpers import RAGGED, build, make_sae, unit, wrapped

METRIC = sf.logit_diff(5, 6)
PUSH = sf.Ablate(sf.Direction(unit(), site="resid_post.0"))


@pytest.fixture(scope="module", autouse=True)
def silent():
    before, CONFIG.APP.REMOTE_LOGGING = CONFIG.APP.REMOTE_LOGGING, False
    yield
    CONFIG.APP.REMOTE_LOGGING = before


@pytest.fixture(scope="module")
def model():
    return wrapped(build("gemma2"))


@pytest.fixture(scope="module")
def server(model):
    with sf.serve(model) as server:
        yield server


@pytest.fixture(scope="module")
def boundary(model):
    with sf.serve(model, copies=True) as server:
        yield server


def saes() -> sf.Dictionaries:
    return sf.Dictionaries(make_sae("jumprelu", f"resid_post.{n}", n) for n in (0, 1))


def few() -> sf.Latents:
    return saes().latents({0: [3, 4], 1: [5]})


CASES = {
    "atp": (saes, sf.AtP(), None),
    "ig": (saes, sf.IG(steps=3, rule="midpoint"), None),
    "baseline": (saes, sf.IG(steps=2), PUSH),
    "transcoder": (lambda: make_sae("transcoder"), sf.AtP(), None),
    "resid_mid": (lambda: make_sae("standard", "resid_mid.1"), sf.AtP(), None),
    "exact": (few, sf.Exact(), None),
    "steps": (few, sf.FiniteDifference(), PUSH),
}


def same(here: sf.Attribution, there: sf.Attribution) -> None:
    assert len(here.score) > 0
    for name in ("prompt", "position", "latent"):
        assert torch.equal(getattr(here, name), getattr(there, name))
    for name in ("score", "activation", "change", "clean", "baseline"):
        assert torch.allclose(getattr(here, name), getattr(there, name), atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_a_run_here(case, model, server):
    target, method, baseline = CASES[case]
    attribute = sf.Attribute(target(), METRIC, baseline=baseline, method=method)
    here = attribute(model, RAGGED)
    assert float(here.score.abs().max()) > 1e-3
    same(here, attribute(model, RAGGED, remote=server.url))


def test_any_metric_will_do(model, server):
    """A metric is differentiated at home, so closures over anything need not travel."""
    weights = torch.randn(100)
    own = sf.metric(lambda logits: torch.log_softmax(logits, -1) @ weights)
    attribute = sf.Attribute(saes(), own)
    same(attribute(model, RAGGED), attribute(model, RAGGED, remote=server.url))


def test_a_metric_at_a_site(model, server):
    own = sf.site_metric("resid_post.2", lambda x, _: x[:, -1].square().sum(-1))
    attribute = sf.Attribute(saes(), own)
    same(attribute(model, RAGGED), attribute(model, RAGGED, remote=server.url))


def test_local_requests(model):
    attribute = sf.Attribute(saes(), METRIC)
    same(attribute(model, RAGGED), attribute(model, RAGGED, remote="local"))


@pytest.mark.parametrize("method", [sf.AtP(), sf.IG(steps=2)], ids=repr)
def test_gradients_that_do_not_cross_are_an_error(method, model, boundary):
    """Not zeros, and not another method without a word."""
    attribute = sf.Attribute(saes(), METRIC, method=method)
    with pytest.raises(sf.GradientError, match=r"process of their own.*method=Exact\(\)"):
        attribute(model, RAGGED, remote=boundary.url)


@pytest.mark.parametrize("method", [sf.Exact(), sf.FiniteDifference()], ids=repr)
def test_gradient_free_methods_work_there(method, model, boundary):
    attribute = sf.Attribute(few(), METRIC, method=method)
    same(attribute(model, RAGGED), attribute(model, RAGGED, remote=boundary.url))


@pytest.mark.parametrize("how", [{"semantics": "through_sae"}, {"backward": sf.RelP()}])
def test_what_needs_modules_is_refused(how, model, server):
    sent = len(server.payloads)
    with pytest.raises(sf.SaefeatError, match="a model here"):
        sf.Attribute(saes(), METRIC, **how)(model, RAGGED, remote=server.url)
    assert len(server.payloads) == sent
