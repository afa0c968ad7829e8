"""Visits moved from a block's input to the output of the block before, which is the same value.

A block's inputs hold the key-value cache. Where a server runs the user's code in a process of its
own, what is read is a copy that goes back in the original's place: the block would fill a copy of
the cache, and later passes would not see its tokens. And the cache would cross at every pass.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..kernel.program import Visit, visit_at
from ..model.families import FAMILIES, NESTED

BLOCKS = {*NESTED.values(), *(blocks for blocks, _ in FAMILIES.values())}


def upstream(visits: Iterable[Visit]) -> list[Visit]:
    """Visits in the same order, those of a block's input but the first one's moved and merged."""
    merged: list[Visit] = []
    for visit in visits:
        path, end = before(visit.path, visit.end)
        last = merged[-1] if merged else None
        if last is not None and (last.path, last.end, last.part) == (path, end, visit.part):
            merged[-1] = last.replace(actions=last.actions + visit.actions)
        else:
            merged.append(visit_at(path, end, visit.order, visit.actions, visit.part))
    return merged


def before(path: str, end: str) -> tuple[str, str]:
    """Where the value is found: for a block's input at the block before, if there is one."""
    blocks, _, number = path.rpartition(".")
    if end != "input" or blocks not in BLOCKS or not number.isdecimal() or number == "0":
        return path, end
    return f"{blocks}.{int(number) - 1}", "output"
