"""Attribution of a model split over devices: every way gives what it gives on one.

Every operation that would mix devices on a machine that has them is an error here (``pretend``).
"""

from __future__ import annotations

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, wrapped
from pretend import HERE, THERE, TwoDevices
from test_attribution_equal import METRIC, WAYS, job_for

F32 = torch.float32


def split(mode: TwoDevices) -> torch.nn.Module:
    """A llama whose last two blocks lie on another device than the rest, as device_map has it."""
    model = build("llama")
    mode.put(model, HERE)
    for block in model.model.layers[1:]:
        mode.put(block, THERE)
        block.register_forward_pre_hook(mode.bring(THERE), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(mode.bring(HERE), with_kwargs=True)
    return model


def same(found: sf.attribution.Attribution, wanted: sf.attribution.Attribution) -> None:
    for name in ("prompt", "dictionary", "position", "latent"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    for name in ("score", "change", "clean", "ends", "dropped"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert found.score.abs().max() > 1e-3


def require_split(job: sf.Attribute) -> None:
    wanted = job(wrapped(build("llama")), RAGGED)
    with TwoDevices() as mode:
        model = split(mode)
        found = job(wrapped(model), RAGGED)
        assert found.score.device == torch.device("cpu")
    same(found, wanted)


@pytest.mark.parametrize("way", WAYS)
def test_every_way(way):
    require_split(job_for(WAYS[way], [0, 1, 2], F32))


@pytest.mark.parametrize("how", [{}, {"semantics": "through_sae"}, {"method": sf.IG(2)}], ids=str)
def test_a_transcoder_that_writes_on_another_device(how):
    across = make_sae("transcoder", "mlp_norm.0", write_site="mlp_out.1")
    require_split(
        sf.Attribute(sf.dictionaries.Dictionaries([make_sae(layer=2), across]), METRIC, **how)
    )


def test_a_metric_of_a_site_on_another_device():
    metric = sf.metrics.at_site("resid_post.2", lambda x, mask: (x[..., 3] * mask).sum(1))
    require_split(sf.Attribute(make_sae(layer=0), metric))


def test_in_a_trace():
    job, wanted = sf.Attribute(make_sae(layer=1), METRIC, keep=5), None
    wanted = job(wrapped(build("llama")), RAGGED)
    with TwoDevices() as mode:
        nn = wrapped(split(mode))
        with nn.trace(RAGGED):
            found = nnsight.save(job.watch(nn).scores(nn.output.logits))
    same(found, wanted)
    assert found.texts == wanted.texts


def test_the_pretended_devices_are_kept_apart():
    """The mode itself: what would be an error on two GPUs is one here."""
    with TwoDevices() as mode:
        a, b = torch.ones(3, 4, device=HERE), torch.ones(3, 4).to(THERE)
        assert a.device == HERE and (b + 1).device == THERE and (a * 2.0).device == HERE
        for mixed in (
            lambda: a + b,
            lambda: a @ b.T,
            lambda: a[b > 0],
            lambda: torch.cat([a, b]),
            lambda: torch.where(a > 0, b, 0.0),
        ):
            with pytest.raises(RuntimeError, match="mps:0 and mps:1"):
                mixed()
        assert (a + b.to(a)).device == HERE and b.cpu().device.type == "cpu"
        nn = wrapped(split(mode))
        with nn.trace(RAGGED):
            late = nnsight.save(nn.model.layers[2].output)
        assert late.device == THERE and late.shape[-1] == D
