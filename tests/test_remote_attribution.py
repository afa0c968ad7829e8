"""Attribute remotely: the scores of a run here, or an error that says why and what else to do."""

from __future__ import annotations

import pytest
import torch
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend

import loopback
import saefeat as sf
from helpers import RAGGED, build, make_sae, unit, wrapped
from saefeat.remote import Server

METRIC = sf.logit_diff(5, 6)
PUSH = sf.Ablate(sf.Direction(unit(), site="resid_post.0"))


pytestmark = pytest.mark.usefixtures("silent")


@pytest.fixture(scope="module")
def model():
    return wrapped(build("gemma2"))


@pytest.fixture(scope="module")
def boundary(model):
    with loopback.serve(model, sandbox=True, fresh=False) as server:
        yield server


def saes() -> sf.dictionaries.Dictionaries:
    return sf.dictionaries.Dictionaries(make_sae("jumprelu", f"resid_post.{n}", n) for n in (0, 1))


def few() -> sf.Latents:
    return saes().latents({0: [3, 4], 1: [5]})


EXACT = sf.attribution.Exact()
CASES = {
    "atp": (saes, sf.attribution.AtP(), None),
    "ig": (saes, sf.IG(steps=3, rule="midpoint"), None),
    "baseline": (saes, sf.IG(steps=2), PUSH),
    "transcoder": (lambda: make_sae("transcoder"), sf.attribution.AtP(), None),
    "resid_mid": (lambda: make_sae("standard", "resid_mid.1"), sf.attribution.AtP(), None),
    "exact": (few, sf.attribution.Exact(), None),
    "steps": (few, sf.attribution.FiniteDifference(), PUSH),
}


def same(here: sf.attribution.Attribution, there: sf.attribution.Attribution) -> None:
    assert len(here.score) > 0
    for name in ("prompt", "position", "latent"):
        assert torch.equal(getattr(here, name), getattr(there, name))
    for name in ("score", "activation", "change", "clean", "baseline"):
        assert torch.allclose(getattr(here, name), getattr(there, name), atol=1e-4)


# the other cases differ from these here, and take another half a minute there
FIRST = ("atp", "resid_mid", "exact")
LATER = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in FIRST]


@pytest.mark.parametrize("case", [*FIRST, *LATER])
def test_scores_are_those_of_a_run_here(case, model, server):
    target, method, baseline = CASES[case]
    attribute = sf.Attribute(target(), METRIC, baseline=baseline, method=method)
    here = attribute(model, RAGGED)
    assert float(here.score.abs().max()) > 1e-3
    same(here, attribute(model, RAGGED, on=Server(server.url)))


def test_any_metric_will_do(model, server):
    """A metric is differentiated at home, so closures over anything need not travel."""
    weights = torch.randn(100)
    own = sf.metrics.custom(lambda logits: torch.log_softmax(logits, -1) @ weights)
    attribute = sf.Attribute(saes(), own)
    same(attribute(model, RAGGED), attribute(model, RAGGED, on=Server(server.url)))


def test_a_metric_at_a_site(model, server):
    own = sf.metrics.at_site("resid_post.2", lambda x, _: x[:, -1].square().sum(-1))
    attribute = sf.Attribute(saes(), own)
    same(attribute(model, RAGGED), attribute(model, RAGGED, on=Server(server.url)))


@pytest.mark.parametrize("where", ["server", "local"])
@pytest.mark.parametrize(
    "metric",
    [
        sf.metrics.at_site("resid_post.2", lambda x, _: x[:, -1].square().sum(-1)),
        sf.metrics.activation(make_sae("jumprelu", "resid_post.2").latents([7, 42])),
    ],
    ids=["at_site", "activation"],
)
def test_a_metric_at_a_site_of_moved_latents(metric, where, model, server):
    """Each of the passes that share a request has the site of its own."""
    attribute = sf.Attribute(few(), metric, method=EXACT)
    on = Server("local" if where == "local" else server.url)
    how = {"steps_at_once": 1, "batch_size": 2}
    same(attribute(model, RAGGED, **how), attribute(model, RAGGED, on=on, **how))


def test_local_requests(model):
    attribute = sf.Attribute(saes(), METRIC)
    same(attribute(model, RAGGED), attribute(model, RAGGED, on=Server("local")))


@pytest.mark.parametrize("method", [sf.attribution.AtP(), sf.IG(steps=2)], ids=repr)
def test_gradients_that_do_not_cross_are_an_error(method, model, boundary):
    """Not zeros, and not another method without a word."""
    attribute = sf.Attribute(saes(), METRIC, method=method)
    with pytest.raises(sf.errors.GradientError, match=r"process of their own.*method=Exact\(\)"):
        attribute(model, RAGGED, on=Server(boundary.url))


@pytest.mark.parametrize(
    "method",
    [
        sf.attribution.Exact(),
        pytest.param(sf.attribution.FiniteDifference(), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_gradient_free_methods_work_there(method, model, boundary):
    attribute = sf.Attribute(few(), METRIC, method=method)
    same(attribute(model, RAGGED), attribute(model, RAGGED, on=Server(boundary.url)))


@pytest.mark.parametrize(("limit", "requests"), [(64 << 20, 1), (5_000, 2)])
def test_passes_of_moved_latents_share_a_request(limit, requests, model, server):
    """A sandboxed request starts an interpreter: beside the two ends of the path, one for all."""
    attribute, sent = sf.Attribute(few(), METRIC, method=EXACT), len(server.payloads)
    there = attribute(model, RAGGED, on=Server(server.url, payload_limit=limit), steps_at_once=1)
    assert len(server.payloads) - sent == 2 + requests
    same(attribute(model, RAGGED), there)


@pytest.mark.parametrize("how", [{"semantics": "through_sae"}, {"backward": sf.attribution.RelP()}])
def test_what_needs_modules_is_refused(how, model, server):
    sent = len(server.payloads)
    with pytest.raises(sf.SaefeatError, match="a model here"):
        sf.Attribute(saes(), METRIC, **how)(model, RAGGED, on=Server(server.url))
    assert len(server.payloads) == sent


def test_refusals_say_what_to_use(model):
    with pytest.raises(sf.SaefeatError, match=r"semantics='pass_through'.*Exact\(\)"):
        sf.Attribute(saes(), METRIC, semantics="through_sae")(model, RAGGED, on=Server("local"))
    with pytest.raises(sf.SaefeatError, match=r"backward=None.*Exact\(\)"):
        sf.Attribute(saes(), METRIC, backward=sf.attribution.RelP())(
            model, RAGGED, on=Server("local")
        )


@pytest.mark.slow  # it starts an interpreter; test_remote runs a model without weights
def test_a_skeleton_is_attributed_on_a_server(tmp_path):
    full = wrapped(build("llama"))
    full._module.save_pretrained(tmp_path)
    full.tokenizer.save_pretrained(tmp_path)
    bare = TransformersModel(str(tmp_path), tokenizer=full.tokenizer, task="text-generation")
    attribute = sf.Attribute(saes(), METRIC, baseline=PUSH, method=sf.IG(steps=2))
    with loopback.serve(tmp_path) as own:
        there = attribute(bare, RAGGED, on=Server(own.url))
    assert next(bare._module.parameters()).is_meta
    same(attribute(full, RAGGED), there)


def test_a_job_is_weighed_before_it_is_sent(model, server):
    """Targets of a path are whole values at whole sites: they weigh more than any edit."""
    sent = len(server.payloads)
    attribute = sf.Attribute(saes(), METRIC, method=sf.IG(steps=2))
    with pytest.raises(sf.errors.RemoteError, match=r"Attribute: `payload_limit` is 100 bytes"):
        attribute(model, RAGGED, on=Server(server.url, payload_limit=100))
    assert len(server.payloads) == sent


def test_a_baseline_of_functions_a_server_lacks_is_refused(model, server):
    import safetensors.torch

    def with_stranger(x):
        return x[..., :2] * len(safetensors.torch.__name__)

    own = sf.dictionaries.Function(with_stranger, torch.randn(2, 32), site="resid_post.0", width=32)
    attribute = sf.Attribute(saes(), METRIC, baseline=sf.Ablate(own))
    with pytest.raises(sf.errors.RemoteError, match="in need of safetensors"):
        attribute(model, RAGGED, on=Server(server.url))


def fewer_places(found):
    if "made" in found:
        found["made"][0][0]["kept"].popitem()


def fewer_tokens(found):
    if "made" in found:
        kept = found["made"][0][0]["kept"]
        kept[0] = kept[0][:, 1:]


def fewer_logits(found):
    if "made" in found:
        log, logits, there = found["made"][0]
        found["made"][0] = log, logits[1:], there


def fewer_passes(found):
    if "made" in found:
        found["made"].pop()


def another_form(found):
    if "made" in found:
        found["made"] = found["made"][0]


def nowhere(found):
    if "made" in found:
        found["made"][0] = *found["made"][0][:2], {}


def fewer_gradients(found):
    if "found" in found:
        found["found"].popitem()


CHANGES = [
    *(fewer_places, fewer_tokens, fewer_logits, fewer_passes, another_form, nowhere),
    fewer_gradients,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_that_does_not_fit_is_refused(change, model, server, monkeypatch):
    plain = RemoteBackend.finalize

    def finalize(self, content):
        found = plain(self, content)
        change(found)
        return found

    monkeypatch.setattr(RemoteBackend, "finalize", finalize)
    with pytest.raises(sf.errors.RemoteError, match="a server whose result has"):
        sf.Attribute(saes(), METRIC)(model, RAGGED, on=Server(server.url))


@pytest.mark.slow
def test_a_checkpoint_of_a_server_is_not_one_of_a_run_here(model, server, tmp_path):
    """The weights here say nothing of the server's."""
    attribute, options = sf.Attribute(saes(), METRIC), {"batch_size": 2, "checkpoint": tmp_path}
    there = attribute(model, RAGGED, on=Server(server.url), **options)
    sent = len(server.payloads)
    same(there, attribute(model, RAGGED, on=Server(server.url), **options))
    assert len(server.payloads) == sent
    with pytest.raises(sf.errors.CheckpointError, match="another job"):
        attribute(model, RAGGED, **options)
