"""Actions that keep values of places: for later actions, for metrics, for gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .frozen import Frozen
from .state import State

if TYPE_CHECKING:
    from jaxtyping import Float


class Stash(Frozen):
    """Keep a block's input until its attention's output is there, for resid_mid."""

    name: str

    def apply(self, x: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        state.stash[self.name] = x
        return x


class Show(Frozen):
    """Hand out the site's whole value with its graph, for a metric or a later action to read."""

    name: int | str
    plus: str | None

    def apply(self, x: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        state.stash[self.name] = value = state.whole(x, self.plus)
        if state.log is not None:
            state.log.shown[self.name] = value
        return x


class Keep(Frozen):
    """Keep the site's value for attribution, move it, and let a gradient be taken there."""

    number: int  # of the place
    plus: str | None = None  # the block whose input is added to the value
    before: bool = False  # whether the value is kept as one that edits have not reached yet
    # What the site's value becomes, to the bit, while gradients pass as if a constant had been
    # added; and [b, 1, 1], how much of the way there it goes from where this pass has it.
    target: Tensor | None = None
    share: Tensor | None = None
    # Whether the value returned is a node of the graph, which the metric can be differentiated at;
    # and whether the graph starts here: nothing before is differentiated, and frozen models work.
    gradient: bool = False
    first: bool = False
    # Replaces how gradients pass backward from here, given the value of the place ``source``.
    through: Callable[[Tensor, Tensor | None], Tensor] | None = None
    source: int | None = None
    copy: bool = True  # whether a copy is kept

    def apply(self, x: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        if state.log is None:
            return x
        before = 0.0 if self.plus is None else state.stash[self.plus].to(x.device)
        target = None if self.target is None else self.target.to(x.device) - before
        target = None if target is None else target.detach()  # the block's input has its graph
        if target is not None and self.share is not None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            share = self.share.to(x.device, dtype)
            target = torch.lerp(x.detach().to(dtype), target.to(dtype), share).to(x.dtype)
        if self.gradient:
            x = x.detach() if self.first else x
            # Adding even zero makes a node of its own: later in-place edits must not reach it. And
            # in half precision x + (target - x) is not the target: 9984 + (3.7 - 9984) is 0 in
            # bfloat16.
            x = x + 0.0 if target is None else target + (x - x.detach())
        elif target is not None:
            x = target
        if self.through is not None:
            source = None if self.source is None else state.stash[self.source]
            x = self.through(x + before, source) - before
        if self.gradient:
            x = x if x.requires_grad else x.requires_grad_()
            state.log.nodes[self.number] = x
        if self.copy:
            kept = state.log.before if self.before else state.log.kept
            kept[self.number] = (x + before).detach().clone()
        return x
