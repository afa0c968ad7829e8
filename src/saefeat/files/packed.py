"""All numbers that a module computes with, however they are kept.

Quantized weights are kept as integers beside scales, and in many ways: buffers of a layer (GPTQ,
AWQ), a parameter's attributes (bitsandbytes), the parts of a tensor class (torchao), or an object
that only ``state_dict`` opens (torch's own dynamic int8). Two models may differ in any of these
alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def stored(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Parameters, buffers and what else the module would save, in parts: plain tensors and texts.

    A name comes once, with the first of these that has it.
    """
    seen: set[str] = set()
    listed = [*module.named_parameters(), *module.named_buffers()]
    seen.update(name for name, _ in listed)
    for name, tensor in listed:
        yield from _opened(name, tensor)
    for name, tensor in module.named_parameters():
        for key, value in sorted(getattr(tensor, "__dict__", {}).items()):
            # a leading underscore is bookkeeping; tensor classes have been opened
            if not key.startswith("_") and not hasattr(tensor, "__tensor_flatten__"):
                yield from _held(f"{name}.{key}", value)
    # tied weights are parameters under a second name
    pointers = {tensor.data_ptr() for _, tensor in listed if type(tensor) in _PLAIN}
    for name, value in module.state_dict(keep_vars=True).items():
        if name in seen or (type(value) in _PLAIN and value.data_ptr() in pointers):
            continue
        yield from _held(name, value)


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def _opened(name: str, tensor: Tensor) -> Iterator[tuple[str, object]]:
    """A tensor, or the parts of one of a class of its own."""
    if hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "placements"):
        own: Any = tensor
        parts, context = own.__tensor_flatten__()
        yield name, f"{type(tensor).__name__} {_text(context)}"
        for part in parts:
            yield from _opened(f"{name}.{part}", getattr(tensor, part))
    elif tensor.is_quantized:
        yield name, f"{tensor.dtype} {tensor.qscheme()}"
        yield f"{name}.integers", tensor.int_repr()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"{name}.scale", _text((tensor.q_scale(), tensor.q_zero_point()))
        else:
            yield f"{name}.scales", tensor.q_per_channel_scales()
            yield f"{name}.zeros", tensor.q_per_channel_zero_points()
    else:
        yield name, tensor


def _held(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, object]]:
    """The tensors and plain values of what hangs on a weight; objects are opened."""
    if isinstance(value, Tensor):
        yield from _opened(name, value)
    elif isinstance(value, nn.Module) or depth > 3:  # a layer of the model, or none of its numbers
        return
    elif isinstance(value, list | tuple | Mapping):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, one in pairs:
            yield from _held(f"{name}.{key}", one, depth + 1)
    elif value is None or isinstance(value, str | bool | int | float | torch.dtype | torch.Size):
        yield name, _text(value)
    else:
        for key, one in sorted(getattr(value, "__dict__", {}).items()):
            yield from _held(f"{name}.{key}", one, depth + 1)


def _text(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
