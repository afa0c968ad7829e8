"""What a run leaves behind, made small before it leaves a server.

A log as the kernel writes it holds a mask and a value for every token of every pass, and every
change an edit made, to be counted later. Packed, it holds selected values and counts: plain tensors
and integers that need no class of ours at either end.
"""

from __future__ import annotations

from typing import Any

import torch

from .events import changes
from .program import fired, new_log
from .tokens import looks_back
from .trace import inline


def applied(program: dict[str, Any], model: Any, *, step: int | None = None) -> dict[str, Any]:
    """What an intervention is on a server: its program, called with the model inside a block.

    Only what needs no memory from pass to pass may be applied pass by pass with ``step``.
    """
    if step is not None and looks_back(program):
        raise RuntimeError(
            "saefeat: `step` is given for an intervention with a held condition or a chat role,"
            " which look back over the whole sequence. Try: call it without step, once, before any"
            " loop."
        )
    log = new_log()
    inline(model, program, log, step)
    return pack(log)


def pack(log: dict[str, Any]) -> dict[str, Any]:
    """The log in place, without what its readers do not need.

    Readings keep their selected tokens alone, [n, k], beside the mask they were taken by; edits
    become counts, [passes, 3], and the changes they made; the view of the sequence is dropped.
    """
    for number, values in log["readings"].items():
        mask = torch.cat(log["masks"][number], 1)
        f = torch.cat(values, 1)
        log["readings"][number] = f[mask > 0].clone()
        log["masks"][number] = mask
    pack_events(log)
    for number, entries in log["fired"].items():
        rows = [fired(*entry) if isinstance(entry, tuple) else entry for entry in entries]
        log["fired"][number] = torch.stack([row.to("cpu") for row in rows])
    position = log["view"]["position"][:, -1:].clone()
    log |= {"view": {"position": position}, "directions": {}, "packed": True}
    return log


def pack_events(log: dict[str, Any]) -> None:
    """In place of every token's values, the changes alone: rows that any receipt can read."""
    for number, passes in log["events"].items():
        steps, directions = log["fired"][number], log["directions"][number]
        log["events"][number] = [
            {
                "begins": seen["begins"],
                "rows": len(entry[0]),
                "changes": changes(entry[0], entry[1], seen, directions),
            }
            for entry, seen in zip(steps, passes, strict=False)
            if isinstance(entry, tuple)
        ]


def unpack(log: dict[str, Any]) -> dict[str, Any]:
    """A packed log as the kernel writes it, with zeros at tokens that were not selected."""
    if not log.get("packed"):
        return log
    readings, masks = {}, {}
    for number, mask in log["masks"].items():
        f = log["readings"][number]
        whole = f.new_zeros((*mask.shape, f.shape[-1]))
        whole[mask > 0] = f
        readings[number], masks[number] = [whole], [mask]
    fired_rows = {number: list(rows) for number, rows in log["fired"].items()}
    return {**log, "readings": readings, "masks": masks, "fired": fired_rows, "packed": False}
