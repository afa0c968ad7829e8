"""Visits being collected for one model, by place."""

from __future__ import annotations

from collections.abc import Iterable

from ..kernel.program import Action, Visit, visit_at
from ..kernel.watch import Stash
from ..model.sites import Order, Place


class Visits:
    """The places a program visits and the actions there, in any order until all are known."""

    def __init__(self, visits: Iterable[Visit] = ()) -> None:
        self._orders: dict[tuple[str, str], Order] = {}
        self._actions: dict[tuple[str, str], list[Action]] = {}
        for visit in visits:
            self._orders[visit.path, visit.end] = visit.order
            self._actions[visit.path, visit.end] = list(visit.actions)

    def add(self, place: Place, order: Order, action: Action, *, first: bool = False) -> None:
        """An action at a place, behind those that are there, or ``first`` of all.

        A site with a transform shares its visit with the plain value.
        """
        key = (place.path, place.end)
        self._orders.setdefault(key, order)
        actions = self._actions.setdefault(key, [])
        actions.insert(0 if first else len(actions), action)

    def stash(self, block: str, order: Order) -> None:
        """Keep a block's input until its attention's output is there, for resid_mid."""
        there = self._actions.get((block, "input"), ())
        if not any(map(_stashes, there)):
            self.add(Place(block, "input"), order, Stash(name=block))

    def ordered(self) -> tuple[Visit, ...]:
        """As a forward pass reaches them; stashing comes last: what is kept is what edits left."""
        visits = [
            visit_at(*key, self._orders[key], tuple(sorted(actions, key=_stashes)))
            for key, actions in self._actions.items()
        ]
        return tuple(sorted(visits, key=lambda visit: visit.order))


def _stashes(action: Action) -> bool:
    return isinstance(action, Stash)
