"""A program made lean for sending: matrices in the narrowest dtype that holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import RemoteError
from ..kernel.encode import AnyEncoder, Called
from ..kernel.frozen import Placed, mapped
from ..kernel.program import Program
from ..kernel.read import Read, Test
from .upstream import upstream


def narrowed(program: Program, dtype: torch.dtype | None = None) -> Program:
    """The program with its matrices in the dtype asked for, or the narrowest that holds them.

    The kernel computes in float32 all the same. Vectors, thresholds and values stay as they are:
    they are small, and a rounded threshold switches latents.

    Raises:
        RemoteError: for a dictionary that cannot be sent, or a dtype that cannot hold one.
    """
    require_floating(dtype)
    for action in program.actions:
        if isinstance(action, Read | Test):
            require_sendable(action.source.encoder)

    def lean(name: str, tensor: Tensor) -> Tensor:
        return narrow(tensor, dtype) if name in MATRICES else tensor

    visits = [
        visit.replace(actions=tuple(mapped(action, lean) for action in visit.actions))
        for visit in upstream(program.visits)
    ]
    return program.replace(visits=tuple(visits), placed=Placed(), beside=None)


MATRICES = ("encoder", "directions", "decoder")


def narrow(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in ``dtype``, or in bfloat16 or float16 where that loses nothing."""
    if not value.is_floating_point():
        return value
    if dtype is not None:
        return _held(value, dtype)
    for half in (torch.bfloat16, torch.float16):
        if torch.equal(value.to(half).to(value.dtype), value):
            return value.to(half)
    return value


def _held(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype, unless that makes a number infinite."""
    found = value.to(dtype)
    if bool((found.float().isfinite() | ~value.isfinite()).all()):
        return found
    raise RemoteError(
        f"Server: `dtype` is {dtype}, for a matrix with numbers up to"
        f" {float(value.abs().max()):.3g}, wanted a dtype that reaches further than"
        f" {torch.finfo(dtype).max:.3g}. Likely cause: float16 and narrower have a small range."
        " Try: dtype=torch.bfloat16, or none, which rounds nothing"
    )


def require_floating(dtype: Any) -> None:
    """Refuse a dtype that would cut off fractions.

    Raises:
        RemoteError: naming it.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise RemoteError(
        f"Server: `dtype` is {dtype!r}, wanted a floating dtype, or None. Likely cause: a dtype by"
        " its name, or one of integers. Try: dtype=torch.bfloat16"
    )


def require_sendable(encoder: AnyEncoder) -> None:
    """Refuse a dictionary that is encoded by an object that stays here.

    Raises:
        RemoteError: saying which.
    """
    if isinstance(encoder, Called) and encoder.local:
        raise RemoteError(
            f"run: `on` is given, and {encoder.local}, wanted dictionaries made of tensors,"
            " or of plain torch functions. Likely cause: a matching pursuit or temporal SAE, which"
            " needs its own code. Try: run(...) without on=, or an SAE of another architecture"
        )
