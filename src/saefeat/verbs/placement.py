"""Several programs made one, each for some rows of a batch; and the log taken apart again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernel.program import Program, Visit
from ..kernel.split import Rows, Split, view_of
from ..kernel.state import Log


def beside(programs: Sequence[Program], rows: int) -> Program:
    """One program for a batch in which each of these has ``rows`` rows, in order."""
    visits: dict[tuple[str, str], Visit] = {}
    parts: dict[tuple[str, str], list[Rows]] = {}
    for number, program in enumerate(programs):
        for visit in program.visits:
            visits.setdefault((visit.path, visit.end), visit)
            span = {"start": number * rows, "stop": (number + 1) * rows}
            own = Rows(**span, actions=visit.actions)
            parts.setdefault((visit.path, visit.end), []).append(own)
    split = [v.replace(actions=(Split(parts=tuple(parts[key])),)) for key, v in visits.items()]
    return programs[0].replace(
        visits=tuple(sorted(split, key=lambda visit: visit.order)),
        beams=next((program.beams for program in programs if program.beams is not None), None),
    )


def taken_apart(log: Log, programs: int, rows: int, passes: Sequence[int]) -> list[Log]:
    """Each program's own log, as if it had run alone and stopped after its own ``passes``."""
    logs = []
    for number, own in enumerate(passes):
        span = (number * rows, (number + 1) * rows)
        part, cut = log.parts.get(span, Log()), log.passes - own
        view = view_of(log.view, *span)
        part.passes = own  # one entry a pass, or fewer where they were reduced
        part.view = view.replace(position=view.position - cut)  # of the last column that is kept
        for entries in (part.readings, part.masks, part.acted):
            for key, found in entries.items():
                entries[key] = found[:own]  # type: ignore[assignment]
        if log.view.whole and cut:  # without a cache the last pass shows every token
            for key, (mask,) in part.masks.items():
                if mask.dtype == torch.bool:  # and no count, of a running value
                    part.masks[key] = [mask[:, :-cut]]
                    part.readings[key] = [part.readings[key][0][:, :-cut]]
        logs.append(part)
    return logs
