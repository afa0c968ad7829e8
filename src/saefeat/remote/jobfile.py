"""A job's file: JSON for how it stands and what was asked, so that it can be taken up again.

Beside ``job.json`` lie ``job.prompts.json``, the prompts' ids, and ``job.edits.safetensors``, the
intervention as ``save`` writes it, both named in it by their hashes. All are written whole or not
at all, nothing in them is code, and they hold no key and no weights but the selected latents'. An
intervention that a file cannot hold, because it has a function, is described and not kept.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnsight.schema.response import Status
from torch import Tensor

from ..errors import FileError, RemoteError
from ..files.container import write
from ..hub.files import load, packed
from ..results.provenance import now, versions
from ..text.prompts import encode_prompts
from ..verbs.base import Chain, Intervention

FORMAT, VERSION = "saefeat-job", 3
STATUSES = {"new", *(status.value for status in Status)}
NAME = re.compile(r"[\w-]{1,200}")
"""What a job's id may be: it becomes part of an address."""


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


class Held(NamedTuple):
    """What a job's file says."""

    fingerprint: str
    about: dict[str, Any]
    parts: list[Part]


def write_job(file: Path, held: Held) -> None:
    """The job as it stands."""
    batches = [{"id": p.id, "status": p.status, "error": p.error} for p in held.parts]
    head = {"format": FORMAT, "version": VERSION, "fingerprint": held.fingerprint}
    text = json.dumps({**head, **held.about, "batches": batches}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, text.encode(), "submit")


def read_job(file: Path) -> Held:
    """The job as its file has it.

    Raises:
        RemoteError: for another file, or one that was changed.
    """
    try:
        found = json.loads(file.read_bytes())
        known = found.pop("format") == FORMAT and found.pop("version") == VERSION
        parts = [_part(entry) for entry in found.pop("batches")]
        mark = found.pop("fingerprint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise not_ours(file, f"not a job file ({type(error).__name__})") from error
    if not known or not isinstance(mark, str) or not parts:
        raise not_ours(file, "not a job file of this version of saefeat")
    for number, part in enumerate(parts):
        if part.status == "COMPLETED" and not result_of(file, number).exists():
            part.status, part.error = "ERROR", "its result is no longer there"
    return Held(mark, found, parts)


def _part(entry: dict[str, Any]) -> Part:
    """One batch's entry.

    Raises:
        ValueError: for an id or a status that none can have.
    """
    name, status = entry["id"], entry["status"]
    if name is not None and not NAME.fullmatch(name):
        raise ValueError("an id that is no job's")
    if status not in STATUSES or (name is None and status not in ("new", "ERROR")):
        raise ValueError("a status that is none")
    return Part(name, status, str(entry["error"]))


def not_ours(file: Path, got: str) -> RemoteError:
    """The error for a file that does not belong to the call."""
    return RemoteError(
        f"submit: `file` is {file}, {got}, wanted a new file, or the file of this very run. Likely"
        " cause: the prompts, the intervention, the model or an option has changed. Try: another"
        " file name"
    )


def beside(file: Path, ending: object) -> Path:
    """A file of the job's own; ``exp-0.5`` and ``exp-0.7`` have others, dots are no suffix."""
    return file.with_name(f"{file.name.removesuffix('.json')}.{ending}")


def result_of(file: Path, number: int) -> Path:
    """Where the result of a batch lies."""
    return beside(file, f"{number}.safetensors")


# ---------------------------------------------------------------- what was asked


def keep_call(
    file: Path, prompts: dict[str, Tensor], intervention: Intervention, model: Any
) -> dict[str, Any]:
    """Write the prompts and the intervention beside the job's file; what the file says of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    listed = {name: tensor.tolist() for name, tensor in prompts.items()}
    said: dict[str, Any] = {"prompts": _keep(file, "prompts.json", json.dumps(listed).encode())}
    said["intervention"] = {"shown": repr(intervention)}
    if intervention.parts():
        try:
            data = packed(intervention, model)
        except FileError as error:
            said["intervention"]["not kept"] = str(error)
        else:
            said["intervention"] |= _keep(file, "edits.safetensors", data)
    return {**said, "created": now(), "versions": versions()}


def _keep(file: Path, ending: str, data: bytes) -> dict[str, str]:
    write(beside(file, ending), data, "submit")
    return {"sha256": sha256(data).hexdigest()}


def kept_prompts(file: Path, held: Held) -> dict[str, Tensor]:
    """The prompts of a job's file.

    Raises:
        RemoteError: if they are missing or were changed.
        PromptError: for rows of another form.
    """
    data = _kept(file, held, "prompts", "prompts.json")
    try:
        rows = json.loads(data)
        found = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}
    except (ValueError, KeyError, TypeError) as error:
        raise not_ours(file, f"with prompts that are none ({type(error).__name__})") from error
    return encode_prompts(None, found)


def kept_intervention(file: Path, held: Held, model: Any) -> Intervention:
    """The intervention of a job's file.

    Raises:
        RemoteError: if it is missing or was changed, or could not be kept.
        ModelError, SiteError: for a model it does not fit.
    """
    said = held.about.get("intervention")
    if isinstance(said, dict) and "not kept" in said:
        raise RemoteError(
            f"Job.load: `intervention` is not in {file}: {said.get('shown')}, wanted the"
            " intervention that was submitted. Likely cause: no file can hold it"
            f" ({said['not kept']}). Try: Job.load(file, model, intervention=...), with the same"
            " one"
        )
    if isinstance(said, dict) and "sha256" not in said:
        return Chain(())
    _kept(file, held, "intervention", "edits.safetensors")
    return load(beside(file, "edits.safetensors"), model=model)


def _kept(file: Path, held: Held, name: str, ending: str) -> bytes:
    """The bytes of a file beside the job's, those that were written."""
    path, said = beside(file, ending), held.about.get(name)
    data = path.read_bytes() if path.exists() else b""
    if isinstance(said, dict) and said.get("sha256") == sha256(data).hexdigest():
        return data
    raise RemoteError(
        f"Job.load: `file` is {file}, whose {path.name} is {'changed' if data else 'missing'},"
        " wanted the files that submit wrote, together. Likely cause: one of them was moved, edited"
        " or lost. Try: submit(...) again with the same arguments and file"
    )
