"""The action that writes an edit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .edit import AnyChange, moved
from .events import Acted
from .frozen import Frozen
from .log import State

if TYPE_CHECKING:
    from jaxtyping import Float

MOST_LATENTS = 64
"""Latents of one dictionary up to which an edit's receipt lists its changes."""

PAIRS = 1 << 22
"""(token, latent) pairs of a log whose values are kept for the receipt: 32 MiB of float32."""


class Write(Frozen):
    """Add the change of latents that were read; a transcoder may write on another device.

    Attributes:
        number: of the dictionary whose latents were read.
        change: how they change.
        directions: [n, d_out].
        when: the condition that must be met, by name.
    """

    number: int
    change: AnyChange
    directions: Tensor
    when: str | None

    def apply(self, x: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        directions = state.place(self.directions, x)
        f, scale, mask, everywhere = state.held[self.number]
        f, mask = f.to(x.device), mask.to(x.device)
        scale = None if scale is None else scale.to(x.device)
        if self.when is not None:
            mask, everywhere = mask & state.met[self.when][0].to(x.device), False
        change = state.place(self.change, x).at(f, state.view)
        if change.known is not None:
            mask, everywhere = mask & change.known.any(-1, keepdim=True), False
        steps = change.steps(f)
        if state.log is not None:
            acted = Acted(steps, mask, directions, scale, state.view)
            entries, budget = state.log.acted.setdefault(self.number, []), state.log.budget
            budget.pairs += acted.written.numel()
            few = acted.step.shape[-1] <= MOST_LATENTS and budget.pairs <= PAIRS
            entries.append(acted if few else acted.counts())
        return moved(x, steps[2], directions, scale, None if everywhere else mask)
