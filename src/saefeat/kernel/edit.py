"""f → f', and the value of the site that follows from it.

The delta form: x' = x + (f' − f) · directions. No reconstruction is written, so whatever the
dictionary does not explain stays as it was, and an edit that changes nothing returns x itself,
bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .encode import top

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def changed(edit: dict[str, Any], f: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
    """F' = clip(scale · f + shift, low, high), where each of the four may be absent.

    ``edit`` holds numbers or tensors that broadcast to f: [k], or [batch, 1, k] for values
    that differ by example. ``active_only`` leaves latents at zero untouched; where ``known`` is
    given and false there is no value to give (see ``values``), and f stays too.
    """
    new = f * edit["scale"] + edit["shift"]
    if edit["low"] is not None:
        new = torch.clamp(new, min=edit["low"])
    if edit["high"] is not None:  # apart: torch.clamp takes no tensor with a number
        new = torch.clamp(new, max=edit["high"])
    if edit["active_only"]:
        new = torch.where(f != 0, new, f)
    known = edit.get("known")
    return new if known is None else torch.where(known, new, f)


def reselected(
    edit: dict[str, Any], f: Float[Tensor, "*batch d_sae"]
) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch d_sae"]]:
    """An edit of a topk kind before its selection: who enters and who leaves is decided anew.

    ``f`` are the activations of all latents that compete. The edited ones compete with what the
    change makes of them, so a latent that fell just short is scaled from there and not from zero.
    ``active_only`` still means those that were selected.

    Returns:
        The edited latents as they were, their steps, and the steps of all latents.
    """
    selected, before = edit["top"]["selected"], top(edit["top"], f)
    own = before[..., selected]
    new = changed({**edit, "active_only": False}, f[..., selected])
    if edit["active_only"]:
        new = torch.where(own != 0, new, f[..., selected])
    step = top(edit["top"], f.index_copy(-1, selected, new)) - before
    return own, step[..., selected], step


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
