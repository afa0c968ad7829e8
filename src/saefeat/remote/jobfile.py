"""A job's file: JSON for what was asked and how it stands, safetensors for what has arrived.

Everything is written whole or not at all, and nothing in it is code.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RemoteError, explain
from ..kernel.program import new_log
from ..records import now, versions

FORMAT, VERSION = "saefeat-job", 1
GROUPS = ("readings", "masks", "fired")


@dataclass
class Part:
    """One batch of a job: what the server calls it, and how it stands."""

    id: str | None = None
    status: str = "new"
    error: str = ""
    missed: int = 0

    @property
    def flying(self) -> bool:
        """Sent, and not known to have ended."""
        return self.id is not None and self.status not in ("COMPLETED", "ERROR")


def write_parts(file: Path, mark: str, about: dict[str, Any], parts: list[Part]) -> None:
    """The job as it stands."""
    batches = [{"id": p.id, "status": p.status, "error": p.error} for p in parts]
    head = {"format": FORMAT, "version": VERSION, "fingerprint": mark}
    write_json(file, {**head, **about, "batches": batches})


def read_parts(file: Path, mark: str, count: int) -> list[Part]:
    """The file's batches; those that failed are to be sent anew.

    Raises:
        RemoteError: for another file, or one of another run.
    """
    try:
        held = json.loads(file.read_text())
        known = held["format"] == FORMAT and held["version"] == VERSION
        batches = held["batches"]
    except (ValueError, KeyError, TypeError):
        known, held, batches = False, {}, []
    same = known and held["fingerprint"] == mark and len(batches) == count
    if not same:
        raise RemoteError(
            explain(
                "submit",
                "file",
                got=f"{file}, " + ("of another run" if known else "not a job file"),
                wanted="a new file, or the file of this very run",
                cause="the prompts, the intervention, the model or an option has changed",
                call="another file name",
            )
        )
    parts = []
    for number, batch in enumerate(batches):
        lost = batch["status"] == "COMPLETED" and not beside(file, number).exists()
        failed = lost or batch["status"] == "ERROR" or batch["id"] is None
        parts.append(Part() if failed else Part(batch["id"], batch["status"]))
    return parts


def beside(file: Path, number: int) -> Path:
    """Where the results of a batch lie."""
    return file.with_suffix(f".{number}.safetensors")


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps(data, indent=1))
    os.replace(new, file)


def save_saved(file: Path, saved: dict[str, Any]) -> None:
    """A batch's saved values as safetensors."""
    log = saved["log"]
    flat = {f"{g}.{n}": t.contiguous().clone() for g in GROUPS for n, t in log[g].items()}
    flat |= {name: saved[name].contiguous().clone() for name in ("tokens", "logits")}
    flat["position"] = log["view"]["position"].contiguous()
    flat |= _flat_events(log["events"])
    new = file.with_name(file.name + ".new")
    save_file(flat, new, metadata={"passes": str(log["passes"])})
    os.replace(new, file)


def _flat_events(events: dict[int, list[dict[str, Any]]]) -> dict[str, Tensor]:
    """Packed events as tensors by name: number, pass, column."""
    flat = {}
    for number, passes in events.items():
        for at, seen in enumerate(passes):
            name = f"events.{number}.{at}"
            flat[f"{name}.pass"] = torch.tensor([int(seen["begins"]), seen["rows"]])
            flat |= {f"{name}.{key}": t.contiguous() for key, t in seen["changes"].items()}
    return flat


def _events(flat: dict[str, Tensor]) -> dict[int, list[dict[str, Any]]]:
    """What ``_flat_events`` made flat."""
    found: dict[int, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in flat.items():
        if name.startswith("events."):
            _, number, at, key = name.split(".")
            found.setdefault(int(number), {}).setdefault(int(at), {})[key] = tensor
    return {
        number: [_seen(passes[at]) for at in sorted(passes)] for number, passes in found.items()
    }


def _seen(columns: dict[str, Tensor]) -> dict[str, Any]:
    begins, rows = columns.pop("pass").tolist()
    return {"begins": bool(begins), "rows": rows, "changes": columns}


def load_saved(file: Path) -> dict[str, Any]:
    """What ``save_saved`` wrote.

    Raises:
        RemoteError: for a damaged file.
    """
    try:
        with safe_open(file, "pt") as held:
            passes = int(held.metadata()["passes"])
            flat = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RemoteError(
            explain(
                "submit",
                "file",
                got=f"{file}, which cannot be read: {error}",
                wanted="a result that arrived earlier",
                cause="it was cut short or changed",
                call="delete it; its batch is sent again",
            )
        ) from error
    log = {**new_log(), "passes": passes, "packed": True}
    log |= {"view": {"position": flat["position"]}, "events": _events(flat)}
    for group in GROUPS:
        keys = [name for name in flat if name.startswith(f"{group}.")]
        log[group] = {int(name.partition(".")[2]): flat[name] for name in keys}
    return {"log": log, "tokens": flat["tokens"], "logits": flat["logits"]}


def about(model_key: str, host: str, intervention: object, **options: Any) -> dict[str, Any]:
    """What a job's file says for a person to read."""
    found = {"model": model_key, "host": host, "intervention": repr(intervention), **options}
    return {**found, "created": now(), "versions": versions()}


def fingerprint(*values: Any) -> str:
    """A hash of nested plain data and tensors: equal for equal content."""
    digest = sha256()
    for value in values:
        _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(f"{{{key}".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(getattr(value, "__qualname__", value)).encode())
