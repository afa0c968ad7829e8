"""Run by test_machine.py: a model whose blocks lie on two devices, dictionaries on the CPU.

No second device is needed. torch lets a process name a device of its own; fake tensors carry
shapes and devices without data, and refuse every operation that mixes devices, as a GPU would.
What depends on data is answered False, so that masks are applied rather than skipped.
"""

from __future__ import annotations

import beartype  # noqa: F401  (before nnsight)
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration

import saefeat as sf
from helpers import D, build, make_sae, unit

HERE, THERE = "npy:0", "npy:1"


class Answers(TorchFunctionMode):
    """What fake tensors cannot: they have no truth value, and begin on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.__bool__:
            return False
        if func is torch.equal:
            return True
        if func is torch.tensor and "device" in kwargs:
            device = torch.device(kwargs.pop("device"))
            return copied(func(*args, **kwargs), device, None)
        if func is torch.Tensor.to and args[0].device.type == "cpu":
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type != "cpu":
                return copied(args[0], device, dtype)
        return func(*args, **kwargs)


def copied(value: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.empty(value.shape, dtype=dtype or value.dtype, device=device)


def put(module: torch.nn.Module, device: str) -> None:
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            empty = torch.empty(value.shape, device=device, dtype=value.dtype)
            setattr(part, name, torch.nn.Parameter(empty, requires_grad=False))
        for name, value in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(value.shape, device=device, dtype=value.dtype))


def bring(device: str):
    """A hook that moves a block's inputs, as device_map has it."""

    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    return lambda _, args, kwargs: (moved(args), {k: moved(v) for k, v in kwargs.items()})


def split(model: torch.nn.Module) -> torch.nn.Module:
    put(model, HERE)
    put(model.model.layers[1], THERE)
    model.model.layers[1].register_forward_pre_hook(bring(THERE), with_kwargs=True)
    model.model.layers[2].register_forward_pre_hook(bring(HERE), with_kwargs=True)
    return model


def interventions():
    """Every kind of action at every kind of site; conditions and writes on another device."""
    for layer in (1, 2):
        for site in ("resid_post", "resid_mid", "attn_out", "mlp_out", "resid_pre"):
            v = sf.Direction(unit(), site=f"{site}.{layer}")
            yield sf.Clamp(v, 2.0, where=sf.Tokens.last(2)) | sf.Probe(v)
        for architecture in ("standard", "gated", "jumprelu", "topk", "abstopk", "transcoder"):
            sae = make_sae(architecture, layer=layer)
            yield sf.Clamp(sae.latents([1, 5]), low=0.5, high=torch.tensor([1.0, 2.0]))
        for norm in ("layer_norm", "constant_norm_rescale"):
            yield sf.Ablate(make_sae(layer=layer, norm=norm).latents([1, 5]))
        yield sf.Ablate(make_sae(layer=layer).error())
        for reduce in ("max", "mean", "last"):
            yield sf.Probe(make_sae(layer=layer).latents([1, 5]), reduce=reduce)
        by_prompt = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        yield sf.Clamp(make_sae(layer=layer).latents([1, 5]), by_prompt, active_only=True)
        rules = sf.Tokens.ids(5) | ~sf.Tokens.first(1) & sf.Tokens.generated()
        yield sf.Ablate(sf.Neurons(f"mlp_in.{layer}", D), where=rules)
    yield sf.Probe(make_sae(layer=0).latents([1])) | sf.Probe(make_sae(layer=1).latents([1]))
    both = make_sae(layer=0).latents([1]) | make_sae(layer=1).latents([2])
    v = sf.Direction(unit(), site="resid_post.2")
    for hold in (False, True):
        yield sf.Clamp(v, add=1.0, when=sf.When(both, above=0.5, hold=hold))
    yield sf.Ablate(make_sae("transcoder", "mlp_norm.0", write_site="mlp_out.1").latents([3]))
    yield sf.Ablate(sf.Direction(torch.eye(D)[:3], site="resid_post.1"))


def main() -> None:
    model = build("llama")  # torch would save the random state of the pretended devices
    backend_registration._setup_privateuseone_for_python_backend("npy")
    pretend = FakeTensorMode(allow_non_fake_inputs=True)
    with pretend:
        split(model)
        ids = torch.zeros(3, 6, dtype=torch.long, device=HERE)
        mask = torch.ones(3, 7, dtype=torch.long, device=HERE)
    step = sf.verbs.base.Chain(tuple(part for each in interventions() for part in each.parts()))
    with sf.hooked(model, step) as log, pretend, Answers(), torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask[:, :6], use_cache=True)
        model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=first.past_key_values)
        assert str(first.logits.device) == HERE
        for reading in step.readings(log):
            assert reading.values.device.type == "cpu"
    print("all on their devices")


if __name__ == "__main__":
    main()
