"""What a run leaves behind, and what one forward pass of it holds."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from .frozen import Placed
from .view import View

Held = tuple[Tensor, Tensor | None, Tensor, bool]
"""Latents f [b, t, k], their directions' scale, which tokens [b, t, 1], and whether all of them."""


@runtime_checkable
class AnyActed(Protocol):
    """What an edit did in one pass; see ``Acted``."""

    @property
    def rows(self) -> int: ...

    @property
    def begins(self) -> bool: ...

    def counts(self) -> Tensor: ...

    def changes(self) -> dict[str, Tensor]: ...


class Budget:
    """How much of what edits did is kept, by all logs that share it."""

    pairs: int = 0  # (token, latent) pairs whose values have been kept so far


class Log:
    """The record of a run."""

    # Annotated here and not in the method: names in a method's annotations would travel with it.
    passes: int = 0  # forward passes seen
    view: View  # of the last of them; not there before the first
    # By the number of a read dictionary: f [b, t, k] pass by pass, or one running value [b, 1, k].
    readings: dict[int, list[Tensor]]
    masks: dict[int, list[Tensor]]  # which tokens count [b, t], or how many [b, 1]
    # By the number of an edited dictionary: what each pass changed, or its counts [3].
    acted: dict[int, list[AnyActed | Tensor]]
    kept: dict[int, Tensor]  # by the number of a watched place: its value [b, t, d] after edits
    before: dict[int, Tensor]  # the same before edits
    nodes: dict[int, Tensor]  # the values that a gradient is taken at
    shown: dict[int | str, Tensor]  # values with their graph, for a metric or a later action
    parts: dict[tuple[int, int], Log]  # the logs of some rows alone
    budget: Budget

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget or Budget()
        self.readings, self.masks, self.acted = {}, {}, {}
        self.kept, self.before, self.nodes, self.shown = {}, {}, {}, {}
        self.parts = {}


class State:
    """What one forward pass has read so far, for its later actions."""

    view: View
    log: Log | None
    placed: Placed  # the program's tensors where they are used
    held: dict[int, Held]  # what each dictionary read, by its number
    stash: dict[int | str, Tensor]  # values of earlier places, by name
    met: dict[str, tuple[Tensor, int]]  # where each condition is met [b, t, 1], of how many tests
    parts: dict[tuple[int, int], State]  # the states of some rows alone

    def __init__(self, view: View, log: Log | None, placed: Placed) -> None:
        self.view, self.log, self.placed = view, log, placed
        self.held, self.stash, self.met, self.parts = {}, {}, {}, {}

    def whole(self, x: Tensor, plus: str | None) -> Tensor:
        """The site's value: x, and for resid_mid the block's input as well."""
        return x if plus is None else self.stash[plus].to(x.device) + x
