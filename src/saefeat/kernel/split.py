"""Several programs in one pass, each for some rows of the batch."""

from __future__ import annotations

from torch import Tensor

from .frozen import Frozen
from .program import Action
from .state import Log, Memory, State, View


class Rows(Frozen):
    """The actions of one program, and the rows start..stop-1 that are its own."""

    start: int
    stop: int
    actions: tuple[Action, ...]


class Split(Frozen):
    """Apply each program's actions to its own rows, as if it ran alone."""

    parts: tuple[Rows, ...]

    def apply(self, x: Tensor, state: State) -> Tensor:
        new = x
        for part in self.parts:
            before = after = new[part.start : part.stop]
            own = state_of(state, part.start, part.stop)
            for action in part.actions:
                after = action.apply(after, own)
            if after is not before:
                new = x.clone() if new is x else new  # one copy, however many write
                new[part.start : part.stop] = after
        return new


def state_of(state: State, start: int, stop: int) -> State:
    """The state of some rows, made once a pass; its log counts into the shared budget."""
    key = (start, stop)
    if key not in state.parts:
        log = state.log
        own = None if log is None else log.parts.setdefault(key, Log(log.budget))
        state.parts[key] = State(view_of(state.view, start, stop), own, state.placed)
    return state.parts[key]


def view_of(view: View, start: int, stop: int) -> View:
    """The view of some rows; it has a memory of its own, which lasts as long as the whole's."""
    whole = view.memory
    memory = whole.parts.setdefault((start, stop), Memory())
    memory.seen, memory.prompt, memory.blocks = whole.seen, whole.prompt, whole.blocks
    memory.ids = None if whole.ids is None else whole.ids[start:stop]
    names = ("ids", "position", "shown", "real", "lengths")
    own = {n: None if getattr(view, n) is None else getattr(view, n)[start:stop] for n in names}
    return view.replace(**own, selected={}, memory=memory)
