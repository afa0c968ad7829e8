"""What a run leaves behind, and what one forward pass of it holds."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .frozen import AnyTensors, Placed
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
    """(token, latent) pairs whose values have been kept so far, by all logs that share it."""

    pairs: int = 0


class Log:
    """The record of a run.

    Attributes:
        passes: forward passes seen.
        view: of the last of them; not there before the first.
        readings: by the number of a read dictionary, f [b, t, k] pass by pass, or one running
            value [b, 1, k].
        masks: which tokens count [b, t], or how many [b, 1].
        acted: by the number of an edited dictionary, what each pass changed, or its counts [3].
        kept: by the number of a watched place, its value [b, t, d] as edits left it.
        before: as edits found it.
        nodes: the values that a gradient is taken at.
        shown: values with their graph, for a metric or a later action to read.
        parts: the logs of some rows alone.
        budget: how much ``acted`` may still hold.
    """

    passes: int = 0
    # Annotated here and not in the method: names in a method's annotations would travel with it.
    view: View
    readings: dict[int, list[Tensor]]
    masks: dict[int, list[Tensor]]
    acted: dict[int, list[AnyActed | Tensor]]
    kept: dict[int, Tensor]
    before: dict[int, Tensor]
    nodes: dict[int, Tensor]
    shown: dict[int | str, Tensor]
    parts: dict[tuple[int, int], Log]

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget or Budget()
        self.readings, self.masks, self.acted = {}, {}, {}
        self.kept, self.before, self.nodes, self.shown = {}, {}, {}, {}
        self.parts = {}


class State:
    """What one forward pass has read so far, for its later actions.

    Attributes:
        view: what the pass shows.
        log: the run's record, if it keeps one.
        placed: the program's tensors where they are used.
        held: what each dictionary read, by its number.
        stash: values of earlier places, by name.
        met: where each condition is met [b, t, 1], and how many of its tests were made.
        parts: the states of some rows alone.
    """

    held: dict[int, Held]
    stash: dict[int | str, Tensor]
    met: dict[str, tuple[Tensor, int]]
    parts: dict[tuple[int, int], State]

    def __init__(self, view: View, log: Log | None, placed: Placed) -> None:
        self.view, self.log, self.placed = view, log, placed
        self.held, self.stash, self.met, self.parts = {}, {}, {}, {}

    def place(self, tensors: AnyTensors, x: Tensor) -> AnyTensors:
        """The tensors where x is, in its compute dtype."""
        return self.placed.at(tensors, x)

    def whole(self, x: Tensor, plus: Any) -> Tensor:
        """The site's value: x, and for resid_mid the block's input as well."""
        return x if plus is None else self.stash[plus].to(x.device) + x
