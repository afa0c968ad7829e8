"""What a run leaves behind, made small and plain before it leaves a server.

A log as actions write it holds a mask and a value for every token of every pass, and every change
an edit made, to be counted later. Packed, it holds selected values and counts: dictionaries of
tensors and integers, which need no class of ours at either end.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from .errors import SaefeatError
from .frozen import Frozen
from .program import Program, whole_run
from .state import Log, Memory, View, last_position


def applied(
    program: Program, model: Any, *, step: int | None = None, repository: str | None = None
) -> dict[str, Any]:
    """What an intervention is on a server: its program, called with the model inside a block."""
    traced = getattr(model, "repo_id", None)
    if traced != repository:  # of the model that the program was made for
        raise SaefeatError(
            f"saefeat: an intervention is bound to the model {repository}, and applied to {traced}."
            " Try: intervention.bind(model) with the model that the block traces."
        )
    if step is not None and program.beams is not None:
        raise SaefeatError(
            "saefeat: `step` is given for an intervention with a held condition or a chat role,"
            " which look back over the whole sequence. Try: call it without step, once, before any"
            " loop."
        )
    log = Log()
    whole_run(model, program, log, step=step)
    return pack(log)


# What a packed log holds: ``passes``; ``readings``, the selected tokens' values [n, k] by number,
# and ``masks`` [b, s] which they were taken by; ``fired``, counts [passes, 3] of each edit, and
# ``events``, the changes it made in each pass whose values were kept; ``view``, the last column's
# position.
def pack(log: Log) -> dict[str, Any]:
    """The log as plain data, without what its readers do not need."""
    masks = {number: torch.cat(parts, 1) for number, parts in log.masks.items()}
    readings = {n: torch.cat(log.readings[n], 1)[mask > 0].clone() for n, mask in masks.items()}
    fired, events = {}, {}
    for number, entries in log.acted.items():
        rows = [entry if isinstance(entry, Tensor) else entry.counts() for entry in entries]
        fired[number] = torch.stack([row.to("cpu") for row in rows])
        events[number] = [
            {"begins": entry.begins, "rows": entry.rows, "changes": entry.changes()}
            for entry in entries
            if not isinstance(entry, Tensor)
        ]
    view = {"position": last_position(log.view).clone()}
    found = {"passes": log.passes, "readings": readings, "masks": masks, "fired": fired}
    return found | {"events": events, "view": view}


def whereabouts(model: Any, value: Tensor) -> dict[str, str]:
    """Where a block runs, as texts: the model's dtype and device by a value of it, and versions.

    What the server calls its model is not there in a block that has none of it.
    """
    dtype, device = str(value.dtype).removeprefix("torch."), str(value.device)
    found = {"dtype": dtype, "device": device, "python": platform.python_version()}
    for name in ("torch", "nnsight", "transformers"):
        found[name] = version(name)
    config = getattr(getattr(model, "_module", None), "config", None)
    commit = getattr(config, "_commit_hash", None)
    return found if commit is None else found | {"commit": str(commit)}


class Unpacked(Frozen):
    """What an edit did in one pass, as a server counted it; see ``Acted``."""

    total: Tensor
    columns: dict[str, Tensor]
    rows: int
    begins: bool

    def counts(self) -> Tensor:
        """[3]."""
        return self.total

    def changes(self) -> dict[str, Tensor]:
        """A tensor [m] a column."""
        return self.columns


def unpack(packed: Log | dict[str, Any]) -> Log:
    """A packed log as actions write it, with zeros at tokens that were not selected."""
    if isinstance(packed, Log):
        return packed
    log = Log()
    log.passes, position = packed["passes"], packed["view"]["position"]
    for number, mask in packed["masks"].items():
        f = packed["readings"][number]
        values = f.new_zeros((*mask.shape, f.shape[-1]))
        values[mask > 0] = f
        log.readings[number], log.masks[number] = [values], [mask]
    for number, counts in packed["fired"].items():
        passes, log.acted[number] = packed["events"].get(number, []), list(counts)
        if len(passes) == len(counts):  # otherwise some passes were only counted
            log.acted[number] = [
                Unpacked(total=total, columns=p["changes"], rows=p["rows"], begins=p["begins"])
                for total, p in zip(counts, passes, strict=True)
            ]
    log.view = View(
        ids=None, position=position, shown=position >= 0, real=position >= 0, lengths=position + 1,
        whole=False, begins=False, memory=Memory(), selected={},
    )  # fmt: skip
    return log
