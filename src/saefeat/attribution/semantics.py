"""How gradients pass a watched site on their way to earlier ones.

``pass_through`` needs nothing: the dictionary is not in the graph, and everything downstream of a
site reaches it. ``through_sae`` detaches the error term: what flows back past a site is only what
encode → decode carries, as if the dictionary were spliced into the model with its error a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dictionaries.latents import Dictionary
from ..errors import DictionaryError
from ..kernel.read import Norm, lift
from .pairs import Part

_NUMBERS = 1 << 22
"""Latents times tokens that a backward pass through a dictionary holds at a time."""

Passing = Callable[[Tensor, Tensor | None], Tensor]


def through(parts: Sequence[Part]) -> dict[int, tuple[int | None, Passing]]:
    """Written place → the place its dictionary reads (None if the same), and how it passes."""
    passing: dict[int, tuple[int | None, Passing]] = {}
    for part in parts:
        (read, *_), (write, *_) = part.reads, part.writes
        alone = len(part.reads) == len(part.writes) == 1
        reconstruct = _reconstruction(part.dictionary) if alone else None
        if write in passing or reconstruct is None:
            second = ", a second one there" if write in passing else ""
            second = second if alone else ", which has several sites"
            raise DictionaryError(
                f"Attribute: `semantics` is 'through_sae' with {part.dictionary!r}{second}, wanted"
                " one dictionary with a reconstruction at each place. Likely cause: an error term,"
                " a function, or two dictionaries that write there. Try: semantics='pass_through'"
            )
        source = None if read == write else read
        step = max(1, _NUMBERS // part.dictionary.d_sae)
        passing[write] = (source, partial(_pass, part.norms[0], reconstruct, step))
    return passing


def _reconstruction(dictionary: Dictionary) -> Callable[[Tensor], Tensor] | None:
    """From x to x̂ by all latents, or what of it depends on x."""
    own = getattr(dictionary, "reconstruct", None)
    if own is not None:
        return own
    if dictionary.columns(torch.tensor([0]))["activation"] == "error":
        return None
    directions = dictionary.directions()
    return lambda x: (f := dictionary.encode(x)) @ directions.to(f.device, f.dtype)


def _pass(norm: Norm, reconstruct: Callable, step: int, x: Tensor, read: Tensor | None) -> Tensor:
    return _Through.apply(x, x if read is None else read, norm, reconstruct, step)  # type: ignore[return-value]


class _Through(torch.autograd.Function):
    """The value as it is; backward, the gradient of encode → decode at what the dictionary reads.

    The dictionary runs in the backward pass alone, some tokens at a time, so that memory does not
    grow with its width.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, read: Tensor, transform: Norm, reconstruct: Any, step: int
    ) -> Tensor:
        ctx.save_for_backward(read)
        ctx.transform, ctx.reconstruct, ctx.step = transform, reconstruct, step
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (read,) = ctx.saved_tensors
        rows, slopes = read.flatten(0, -2), gradient.flatten(0, -2)
        pieces = []
        for start in range(0, len(rows), ctx.step):
            with torch.enable_grad():
                x = rows[start : start + ctx.step].detach().requires_grad_()
                out = ctx.reconstruct(lift(x, ctx.transform))
            slope = slopes[start : start + ctx.step].to(out)
            pieces.append(torch.autograd.grad(out, x, slope)[0])
        return None, torch.cat(pieces).view_as(read), None, None, None
