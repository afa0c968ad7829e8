"""What is done to a model in one forward pass: visits to places, and the actions of each.

An edit is one ``Read``, where its latents are encoded, and one ``Write``, where the change is
added: at the same visit for an SAE, at a later one for a transcoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from .frozen import Frozen, Placed
from .log import State
from .view import Ends

if TYPE_CHECKING:
    from jaxtyping import Float


@runtime_checkable
class Action(Protocol):
    """One thing that is done with the value of a place."""

    def apply(self, x: Tensor, state: State) -> Tensor:
        """The value [b, t, d] to leave behind: x itself if nothing is written."""
        ...


class Visit(Frozen):
    """What is done at one place.

    Attributes:
        path: the module.
        end: its input or output.
        order: sorts visits as a forward pass reaches them.
        actions: in order.
    """

    path: str
    end: str
    order: tuple[int, int, int, str]
    actions: tuple[Action, ...]


class Program(Frozen):
    """An intervention, lowered for one model.

    Attributes:
        visits: in the order a forward pass reaches them.
        ends: how the model ends a row.
        remembers: whether an action looks back over its row, so that beams must be followed.
        embedding: the module that embeds tokens, where a server reads the tokens of later passes.
        placed: the actions' tensors where runs have needed them.
    """

    visits: tuple[Visit, ...]
    ends: Ends | None
    remembers: bool
    placed: Placed
    embedding: str | None = None

    @property
    def actions(self) -> tuple[Action, ...]:
        """Those of all visits."""
        return tuple(action for visit in self.visits for action in visit.actions)


def visit(
    actions: tuple[Action, ...], x: Float[Tensor, "*batch d"], state: State
) -> Float[Tensor, "*batch d"]:
    """Apply a visit's actions to the value x of its place; return the value to leave behind.

    The same object x comes back when nothing was written, so that the caller need not write either.

    Under autocast, as some servers run blocks, a product of float32 would be one of bfloat16: other
    latents would fire. So it is switched off here; the meta device, for one, knows nothing of it.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return visit(actions, x, state)
    new = before = by_token(x, *state.view.real.shape)
    for action in actions:
        new = action.apply(new, state)
    return x if new is before else new.reshape(x.shape)


def by_token(x: Float[Tensor, "*batch d"], rows: int, tokens: int) -> Float[Tensor, "b t d"]:
    """The value with a row for each sequence: some modules are given all tokens in one row.

    A value of fewer tokens than the pass has would broadcast against their mask.
    """
    if x.ndim == 3 and tuple(x.shape[:2]) == (rows, tokens):
        return x
    if x.ndim == 2 and x.shape[0] == rows * tokens:
        return x.reshape(rows, tokens, -1)
    raise ValueError(
        f"saefeat: a site's value is of shape {tuple(x.shape)}, and this pass has {rows} rows of"
        f" {tokens} tokens. Likely cause: a module that sees only part of them, as the unembedding"
        " does in generate, or that is given all invokes' tokens in one row. Try: the input or"
        " output of another module, or one invoke."
    )
