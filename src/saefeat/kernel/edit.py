"""f → f', and the value of the site that follows from it.

The delta form: x' = x + (f' − f) · directions. No reconstruction is written, so whatever the
dictionary does not explain stays as it was, and an edit that changes nothing returns x itself,
bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def changed(edit: dict[str, Any], f: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
    """F' = clip(scale · f + shift, low, high), where each of the four may be absent.

    ``edit`` holds numbers or tensors that broadcast to f: [k], or [batch, 1, k] for values
    that differ by example. ``active_only`` leaves latents at zero untouched.
    """
    new = f * edit["scale"] + edit["shift"]
    if edit["low"] is not None:
        new = torch.clamp(new, min=edit["low"])
    if edit["high"] is not None:  # apart: torch.clamp takes no tensor with a number
        new = torch.clamp(new, max=edit["high"])
    return torch.where(f != 0, new, f) if edit["active_only"] else new


def moved(
    x: Float[Tensor, "*batch d_out"],
    step: Float[Tensor, "*batch k"],
    directions: Float[Tensor, "k d_out"],
    scale: Float[Tensor, "*batch _"] | None,
    mask: Bool[Tensor, "*batch 1"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """X + step · directions where the mask holds, x elsewhere, in x's own dtype.

    The sum is taken in the compute dtype and rounded once; since x converts there and back
    without loss, a zero step still returns x exactly.
    """
    delta = step @ directions  # [*batch, d_out]
    if scale is not None:
        delta = delta * scale
    new = x.to(delta.dtype) + delta
    return (new if mask is None else torch.where(mask, new, x)).to(x.dtype)
