"""How an intervention crosses to a server: as the kernel and a plain program, nothing else.

A block in a remote trace travels as source with the names it reads, so ``intervention(model)`` in
it ships the object itself. Pickled for a request, the object becomes its own program for the model
that is being traced, bound to a kernel function; the kernel's functions travel as source, since no
server has them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import nnsight
import torch
from torch import Tensor

from ..kernel.pack import applied
from .upstream import upstream

KERNEL = "saefeat.kernel"


def register() -> None:
    """Let the kernel travel by value: the kernel alone, so that nothing else does by mistake."""
    nnsight.register(KERNEL)


def as_shipped(program: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    """The program as a function of the model that runs without this package."""
    register()
    return partial(applied, narrowed(program, dtype))


def narrowed(program: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The program with its matrices in the dtype asked for, or the narrowest that holds them.

    The kernel computes in float32 all the same. Vectors, thresholds and values stay as they are:
    they are small, and a rounded threshold switches latents.
    """
    visits = [
        {**visit, "actions": [_lean(action, dtype) for action in visit["actions"]]}
        for visit in upstream(program["visits"])
    ]
    return {**program, "visits": visits}


def _lean(action: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """An action with narrow matrices, without what an earlier run cached on it."""
    action = {name: value for name, value in action.items() if name != "placed"}
    if "tensors" in action:
        action["tensors"] = {
            name: narrow(value, dtype) if name in MATRICES else value
            for name, value in action["tensors"].items()
        }
    return action


MATRICES = ("encoder", "directions", "decoder")


def narrow(value: Any, dtype: torch.dtype | None) -> Any:
    """A tensor in ``dtype``, or in bfloat16 or float16 where that loses nothing."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if dtype is not None:
        return value.to(dtype)
    for half in (torch.bfloat16, torch.float16):
        if torch.equal(value.to(half).to(value.dtype), value):
            return value.to(half)
    return value
