"""A batch's result as it came from a server, kept in a file until the whole job is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError, RemoteError
from ..files.container import pack, read, seal, unseal, write
from ..results.provenance import versions

FORMAT, VERSION = "saefeat.job-result", 1
GROUPS = ("readings", "masks", "fired")
LARGEST = 1 << 40
"""Bytes that are read: what a file has is bounded by what was written here, not by the format."""


def save_saved(file: Path, saved: dict[str, Any], job: str) -> None:
    """What a batch's block saved, as a safetensors file of its own, written whole or not at all.

    ``job`` is the fingerprint of the job that it belongs to.
    """
    log = saved["log"]
    flat = {f"{g}.{n}": t for g in GROUPS for n, t in log[g].items()}
    flat |= {name: saved[name] for name in ("tokens", "logits")}
    flat["position"] = log["view"]["position"]
    flat |= _flat_events(log["events"])
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in flat.items()}
    document = seal(FORMAT, VERSION, {"passes": log["passes"], "job": job}, flat, versions())
    write(file, pack(document, flat, "submit"), "submit")


def _flat_events(events: dict[int, list[dict[str, Any]]]) -> dict[str, Tensor]:
    """Packed events, all passes of a step in one tensor a column, and the passes' sizes."""
    flat = {}
    for number, passes in events.items():
        sizes = [(s["begins"], s["rows"], len(s["changes"]["row"])) for s in passes]
        flat[f"events.{number}.passes"] = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 3)
        for key in passes[0]["changes"] if passes else ():
            flat[f"events.{number}.{key}"] = torch.cat([s["changes"][key] for s in passes])
    return flat


def _events(flat: dict[str, Tensor]) -> dict[int, list[dict[str, Any]]]:
    """What ``_flat_events`` made flat."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        if name.startswith("events."):
            _, number, key = name.split(".")
            found.setdefault(int(number), {})[key] = tensor
    return {number: _passes(columns) for number, columns in found.items()}


def _passes(columns: dict[str, Tensor]) -> list[dict[str, Any]]:
    sizes = columns.pop("passes").tolist()
    cut = {name: column.split([n for *_, n in sizes]) for name, column in columns.items()}
    return [
        {"begins": bool(begins), "rows": rows, "changes": {n: c[i] for n, c in cut.items()}}
        for i, (begins, rows, _) in enumerate(sizes)
    ]


def load_saved(file: Path, job: str) -> dict[str, Any]:
    """What ``save_saved`` wrote.

    Raises:
        RemoteError: for a damaged file, or one of another job.
    """
    try:
        contents = read(file, "submit", LARGEST)
        spec, flat = unseal(contents, FORMAT, VERSION, "submit"), contents.tensors
        if spec["job"] != job:
            raise ValueError("it is of another job")
        view = {"position": flat["position"]}
        log = {"passes": spec["passes"], "events": _events(flat), "view": view}
        for group in GROUPS:
            keys = [name for name in flat if name.startswith(f"{group}.")]
            log[group] = {int(name.partition(".")[2]): flat[name] for name in keys}
        return {"log": log, "tokens": flat["tokens"], "logits": flat["logits"]}
    except (FileError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise RemoteError(
            f"submit: `file` is {file}, which cannot be read: {error}, wanted a result that arrived"
            " earlier. Likely cause: it was cut short or changed. Try: delete it; its batch is sent"
            " again"
        ) from error
