"""Visits moved from a block's input to the output of the block before, which is the same value.

A block's inputs hold the key-value cache. Where a server runs the user's code in a process of its
own, what is read is a copy that goes back in the original's place: the block would fill a copy of
the cache, and later passes would not see its tokens. And the cache would cross at every pass.
"""

from __future__ import annotations

from typing import Any

from ..model.families import FAMILIES, NESTED

BLOCKS = {*NESTED.values(), *(blocks for blocks, _ in FAMILIES.values())}


def upstream(visits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Visits in the same order, those of a block's input but the first one's moved and merged."""
    found: list[dict[str, Any]] = []
    for visit in visits:
        visit = {**visit, **before(visit["path"], visit["end"])}
        last = found[-1] if found else {}
        if (last.get("path"), last.get("end")) == (visit["path"], visit["end"]):
            found[-1] = {**last, "actions": [*last["actions"], *visit["actions"]]}
        else:
            found.append(visit)
    return found


def before(path: str, end: str) -> dict[str, str]:
    """Where the value of a block's input comes from, if that is the block before."""
    blocks, _, number = path.rpartition(".")
    if end != "input" or blocks not in BLOCKS or not number.isdecimal() or number == "0":
        return {}
    return {"path": f"{blocks}.{int(number) - 1}", "end": "output"}
