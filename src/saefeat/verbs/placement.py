"""Several programs made one, each for some rows of a batch; and the log taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..kernel.program import new_log
from ..kernel.tokens import narrowed

STRIDE = 1_000_000
"""Actions of the n-th program are numbered from n · STRIDE."""


def beside(programs: Sequence[dict[str, Any]], rows: int) -> dict[str, Any]:
    """One program for a batch in which each of these has ``rows`` rows, in order."""
    visits: dict[tuple[str, str], dict[str, Any]] = {}
    for number, program in enumerate(programs):
        for visit in program["visits"]:
            place = (visit["path"], visit["end"])
            shared = visits.setdefault(place, {**visit, "actions": []})
            span = (number * rows, (number + 1) * rows)
            shared["actions"] += [_numbered(action, number, span) for action in visit["actions"]]
    return {**programs[0], "visits": sorted(visits.values(), key=lambda visit: visit["order"])}


def taken_apart(
    log: dict[str, Any], programs: int, rows: int, passes: Sequence[int]
) -> list[dict[str, Any]]:
    """Each program's own log, as if it had run alone and stopped after its own ``passes``."""
    logs = []
    for number in range(programs):
        view = narrowed(log["view"], number * rows, (number + 1) * rows)
        cut = 0 if view["whole"] else log["passes"] - passes[number]
        view = {**view, "position": view["position"] - cut}  # of the last column that is kept
        own = {**new_log(), "passes": passes[number], "view": view}
        for name in ("readings", "masks", "fired", "events"):
            for key, entries in log[name].items():
                if key // STRIDE == number:  # one entry a pass, or fewer where they were reduced
                    own[name][key % STRIDE] = entries[: passes[number]]
        for key, directions in log["directions"].items():
            if key // STRIDE == number:
                own["directions"][key % STRIDE] = directions
        logs.append(own)
    return logs


def _numbered(action: dict[str, Any], number: int, span: tuple[int, int]) -> dict[str, Any]:
    """A copy of an action with names of its own and its rows; tensors are shared."""
    found = {**action, "rows": span}
    found.pop("placed", None)
    for name in ("id", "when", "plus"):
        if isinstance(found.get(name), int):
            found[name] += number * STRIDE
        elif found.get(name) is not None:
            found[name] = f"{number}/{found[name]}"
    return found
