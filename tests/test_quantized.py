"""Weights that are kept as integers: edits, gradients, identity.

Layers of bitsandbytes, GPTQ and the like need a GPU; what stands in for them here has their
interface: packed integers under the libraries' names, a forward that multiplies by what they stand
for, and no weight of the usual shape. Where torchao is installed its tensors are held to the same.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import saefeat as sf
from helpers import RAGGED, D, batch_of, build, forward, make_sae, raw_hooks, unit, wrapped
from saefeat.files.hashing import weights
from saefeat.results.provenance import model_identity

V = sf.Direction(unit(5), site="resid_post.1")
PUSH = sf.Clamp(V, 40.0)
READ = PUSH | sf.Probe(sf.Neurons("z.2", D)) | sf.Probe(sf.Neurons("mlp_post.2", 64))
LATENTS = make_sae().latents([1, 2, 3])
ATP = sf.Attribute(LATENTS, sf.logit_diff(5, 6), method=sf.attribution.AtP())
REAL = batch_of()["attention_mask"].bool()


def by_hand(x):
    """The same as PUSH, for hooks that know nothing of saefeat."""
    return x + (40.0 - x @ unit(5))[..., None] * unit(5)


# ---------------------------------------------------------------- layers with packed weights


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of two 4-bit numbers each, [out, in / 2], and a scale for each row, [out, 1]."""
    scale = weight.abs().amax(1, keepdim=True) / 7
    whole = (weight / scale).round().clamp(-8, 7).to(torch.int8) + 8
    return (whole[:, ::2] | (whole[:, 1::2] << 4)).to(torch.uint8), scale


def unpacked(bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    halves = torch.stack([bits & 15, bits >> 4], -1).flatten(-2)
    return (halves.float() - 8) * scale


class Linear4bit(nn.Linear):
    """As bitsandbytes': an nn.Linear with a weight [n / 2, 1], whose scales hang on the weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        bits, scale = packed(layer.weight.data)
        self.weight = nn.Parameter(bits.reshape(-1, 1), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(absmax=scale, nested=SimpleNamespace(code=None))
        self.weight.module = self

    def forward(self, x):
        bits = self.weight.reshape(self.out_features, -1)
        return nn.functional.linear(x, unpacked(bits, self.weight.quant_state.absmax))


class QuantLinear(nn.Module):
    """As GPTQ's: buffers, no weight at all, and older names for its sides."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = layer.in_features, layer.out_features
        bits, scale = packed(layer.weight.data)
        self.register_buffer("qweight", bits)
        self.register_buffer("scales", scale)

    def forward(self, x):
        return nn.functional.linear(x, unpacked(self.qweight, self.scales))


class Sideless(QuantLinear):
    """A layer that does not say how wide it is, and whose weight is of another shape."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        del self.infeatures, self.outfeatures
        self.weight = nn.Parameter(self.qweight.float().flatten()[:1])


class Rounded(torch.autograd.Function):
    """A kernel of a layer for inference, which has no gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no backward for this kernel")


class ForInference(QuantLinear):
    """As GPTQ's fast kernels: what they give has no graph."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class NoBackward(QuantLinear):
    """As kernels that are known to autograd and refuse to go back."""

    def forward(self, x):
        return Rounded.apply(x, unpacked(self.qweight, self.scales))


def quantized(kind: type[nn.Module]) -> nn.Module:
    """A tiny model with every projection of its blocks replaced."""
    model = build("llama")
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, kind(child))
    return model


def check(model):
    """Edits and readings in every way of running, against plain hooks on the same model."""
    batch, seen = batch_of(), {}
    parts = {"z": model.model.layers[2].self_attn.o_proj, "m": model.model.layers[2].mlp.down_proj}
    handles = [
        part.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0].detach()}))
        for name, part in parts.items()
    ]
    with raw_hooks(model, {1: by_hand}):
        wanted = forward(model, batch)
        held = {name: x.clone() for name, x in seen.items()}
        tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    for handle in handles:
        handle.remove()
    close = {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad(), sf.hooked(model, READ) as log:
        torch.testing.assert_close(forward(model, batch)[REAL], wanted[REAL], **close)
    for reading, x in zip(READ.readings(log), held.values(), strict=True):
        torch.testing.assert_close(reading.values[REAL], x[REAL], **close)
    run = sf.run(wrapped(model), RAGGED, READ, max_new_tokens=4)
    assert [list(row) for row in run.completions] == tokens[:, 6:].tolist()
    assert run.provenance.dtype == "float32"
    assert (wanted - forward(build("llama"), batch))[REAL].abs().max() > 1e-2
    return run


@pytest.mark.parametrize("kind", [Linear4bit, QuantLinear])
def test_packed_layers_are_edited_and_differentiated_like_any(kind):
    model = quantized(kind)
    check(model)
    plain = build("llama")
    for block, other in zip(model.model.layers, plain.model.layers, strict=True):
        for name, part in block.named_modules():
            if isinstance(part, kind):
                size = part.in_features if kind is Linear4bit else part.infeatures
                weight = part(torch.eye(size)).T
                other.get_submodule(name).weight.data = weight.detach()
    found, wanted = (ATP(wrapped(one), RAGGED).score for one in (model, plain))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert wanted.abs().max() > 1e-3


def test_a_layer_that_does_not_say_its_width():
    """The shape of its weight was taken for it."""
    model = quantized(Sideless)
    with pytest.raises(sf.errors.SiteError, match=r"does not say how wide.*o_proj\.input"):
        sf.edit(wrapped(model), sf.Probe(sf.Neurons("z.2", D)))
    probe = PUSH | sf.Probe(sf.Neurons("model.layers.2.self_attn.o_proj.input", D))
    out = sf.run(wrapped(model), RAGGED, probe)
    assert out.readings[0].values.shape == (3, 6, D)


@pytest.mark.parametrize("kind", [ForInference, NoBackward])
def test_what_has_no_gradient_says_so(kind):
    model = wrapped(quantized(kind))
    with pytest.raises(sf.errors.GradientError, match=r"Attribute: .*Try:"):
        ATP(model, RAGGED)
    exact = sf.Attribute(LATENTS, ATP.metric, method=sf.attribution.Exact())
    assert exact(model, RAGGED).score.abs().max() > 0
    check(model._module)


# ---------------------------------------------------------------- identity


CHANGES = {
    "packed integers": (QuantLinear, lambda layer: layer.qweight[0, 0].add_(1)),
    "scales": (QuantLinear, lambda layer: layer.scales[0, 0].mul_(2)),
    "a packed parameter": (Linear4bit, lambda layer: layer.weight.data[0, 0].add_(1)),
    "scales on a parameter": (
        Linear4bit,
        lambda layer: layer.weight.quant_state.absmax[0, 0].mul_(2),
    ),
    "a code within them": (
        Linear4bit,
        lambda layer: setattr(layer.weight.quant_state.nested, "code", torch.ones(3)),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_packed_weights_are_part_of_the_identity(name):
    kind, change = CHANGES[name]
    before, other = model_identity(quantized(kind)), quantized(kind)
    assert model_identity(other) == before
    change(other.model.layers[1].self_attn.q_proj)
    after = model_identity(other)
    assert "weights" in [key for key in before if before[key] != after[key]]


def dynamic(change: float = 0.0) -> nn.Module:
    model = build("llama")
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] += change
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of eager quantization
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize")
@pytest.mark.filterwarnings("ignore:.*TypedStorage", "ignore:.*non-tensor")
def test_weights_that_only_a_state_dict_shows_are_part_of_it():
    """torch's dynamic int8 keeps them in an object of its own: two models were one."""
    assert weights(dynamic()) == weights(dynamic()) != weights(dynamic(3.0))


def test_plain_weights_are_hashed_once_and_ties_are_no_others():
    from saefeat.files.packed import stored

    model = build("llama")
    names = [name for name, _ in stored(model)]
    assert names == [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
    model.lm_head.weight = model.model.embed_tokens.weight
    assert len([name for name, _ in stored(model)]) == len(names) - 1


# ---------------------------------------------------------------- torchao

HAS = importlib.util.find_spec("torchao") is not None or "SAEFEAT_REQUIRE_TORCHAO" in os.environ


def with_torchao(width: int, change: float = 0.0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_

        model = build("llama")
        model.model.layers[1].self_attn.q_proj.weight.data[0, 0] += change
        config = Int8WeightOnlyConfig()
        if width == 4:
            config = IntxWeightOnlyConfig(weight_dtype=torch.int4)
        quantize_(model, config)
    return model


@pytest.mark.skipif(not HAS, reason="torchao is not installed: pip install torchao")
@pytest.mark.parametrize("width", [8, 4])
def test_weights_of_torchao(width):
    model = with_torchao(width)
    assert check(model).provenance.quantization == "quantized by torchao"
    assert weights(model) == weights(with_torchao(width)) != weights(with_torchao(width, 3.0))
    plain = build("llama")
    for name, weight in model.named_parameters():
        if hasattr(weight, "__tensor_flatten__"):
            plain.get_parameter(name).data = weight.dequantize().float().clone()
    found, wanted = (ATP(wrapped(one), RAGGED).score for one in (model, plain))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
