"""A job's file: JSON for how it stands and what was asked, so that it can be taken up again.

Next to ``job.json`` lie ``job.prompts.json``, the prompts' ids, and ``job.edits.safetensors``, the
intervention as ``save`` writes it, both named in it by their hashes. Each is written in full or not
at all, nothing in them is code, and they hold no key and no weights but the selected latents'. An
intervention that a file cannot hold, because it has a function, is described and not kept.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnsight.schema.response import Status
from torch import Tensor

from ..errors import FileError, RemoteError
from ..files.container import write
from ..hub.files import load, packed
from ..results.provenance import now, versions
from ..text.prompts import encode_prompts
from ..verbs.base import Chain, Intervention

if TYPE_CHECKING:
    from nnsight import TransformersModel

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
    def in_flight(self) -> bool:
        """Sent, and not known to have ended."""
        return self.id is not None and self.status not in ("COMPLETED", "ERROR")


@dataclass
class JobFile:
    """What a job's file says.

    Attributes:
        fingerprint: a hash of all that decides the result.
        about: plain data on what was asked: the model, the host, the call, and hashes of the files
            next to this one.
        parts: how each batch stands.
    """

    path: Path
    fingerprint: str
    about: dict[str, Any]
    parts: list[Part]

    @classmethod
    def read(cls, path: Path) -> JobFile:
        """The job as its file has it.

        Raises:
            RemoteError: for another file, or one that was changed.
        """
        try:
            about = json.loads(path.read_bytes())
            known = about.pop("format") == FORMAT and about.pop("version") == VERSION
            parts = [_part(entry) for entry in about.pop("batches")]
            fingerprint = about.pop("fingerprint")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise not_ours(path, f"not a job file ({type(error).__name__})") from error
        if not known or not isinstance(fingerprint, str) or not parts:
            raise not_ours(path, "not a job file of this version of saefeat")
        file = cls(path, fingerprint, about, parts)
        for number, part in enumerate(parts):
            if part.status == "COMPLETED" and not file.result(number).exists():
                part.status, part.error = "ERROR", "its result is no longer there"
        return file

    def write(self) -> None:
        """The job as it stands."""
        batches = [{"id": p.id, "status": p.status, "error": p.error} for p in self.parts]
        head = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
        text = json.dumps({**head, **self.about, "batches": batches}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, text.encode(), "submit")

    def sibling(self, ending: str) -> Path:
        """A file of the job's; ``exp-0.5`` and ``exp-0.7`` have others, dots are no suffix."""
        return self.path.with_name(f"{self.path.name.removesuffix('.json')}.{ending}")

    def result(self, number: int) -> Path:
        """Where the result of a batch lies."""
        return self.sibling(f"{number}.safetensors")

    def keep_call(
        self, prompts: dict[str, Tensor], intervention: Intervention, model: TransformersModel
    ) -> None:
        """Write the prompts and the intervention next to the job's file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        listed = {name: tensor.tolist() for name, tensor in prompts.items()}
        said: dict[str, Any] = {"shown": repr(intervention)}
        self.about["prompts"] = self._keep("prompts.json", json.dumps(listed).encode())
        if intervention.parts():
            try:
                data = packed(intervention, model)
            except FileError as error:
                said["not kept"] = str(error)
            else:
                said |= self._keep("edits.safetensors", data)
        self.about |= {"intervention": said, "created": now(), "versions": versions()}

    def _keep(self, ending: str, data: bytes) -> dict[str, str]:
        write(self.sibling(ending), data, "submit")
        return {"sha256": sha256(data).hexdigest()}

    def prompts(self) -> dict[str, Tensor]:
        """The prompts that were submitted.

        Raises:
            RemoteError: if they are missing or were changed.
            PromptError: for rows of another form.
        """
        data = self._kept("prompts", "prompts.json")
        try:
            rows = json.loads(data)
            tensors = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}
        except (ValueError, KeyError, TypeError) as error:
            got = f"with prompts that are not rows of ids ({type(error).__name__})"
            raise not_ours(self.path, got) from error
        return encode_prompts(None, tensors)

    def intervention(self, model: TransformersModel) -> Intervention:
        """The intervention that was submitted.

        Raises:
            RemoteError: if it is missing or was changed, or could not be kept.
            ModelError, SiteError: for a model it does not fit.
        """
        said = self.about.get("intervention")
        if isinstance(said, dict) and "not kept" in said:
            raise RemoteError(
                f"Job.load: `intervention` is not in {self.path}: {said.get('shown')}, wanted the"
                " intervention that was submitted. Likely cause: no file can hold it"
                f" ({said['not kept']}). Try: Job.load(file, model, intervention=...), with the"
                " same one"
            )
        if isinstance(said, dict) and "sha256" not in said:
            return Chain(())
        self._kept("intervention", "edits.safetensors")
        return load(self.sibling("edits.safetensors"), model=model)

    def _kept(self, name: str, ending: str) -> bytes:
        """The bytes of a file next to the job's, those that were written."""
        path, said = self.sibling(ending), self.about.get(name)
        data = path.read_bytes() if path.exists() else b""
        if isinstance(said, dict) and said.get("sha256") == sha256(data).hexdigest():
            return data
        raise RemoteError(
            f"Job.load: `file` is {self.path}, whose {path.name} is"
            f" {'changed' if data else 'missing'}, wanted the files that submit wrote, together."
            " Likely cause: one of them was moved, edited or lost. Try: submit(...) again with the"
            " same arguments and file"
        )


def _part(entry: dict[str, Any]) -> Part:
    """One batch's entry.

    Raises:
        ValueError: for an id or a status that no batch can have.
    """
    name, status = entry["id"], entry["status"]
    if name is not None and not NAME.fullmatch(name):
        raise ValueError("not a job's id")
    if status not in STATUSES or (name is None and status not in ("new", "ERROR")):
        raise ValueError("not a status")
    return Part(name, status, str(entry["error"]))


def not_ours(path: Path, got: str) -> RemoteError:
    """The error for a file that does not belong to the call."""
    return RemoteError(
        f"submit: `file` is {path}, {got}, wanted a new file, or the file of this very run. Likely"
        " cause: the prompts, the intervention, the model or an option has changed. Try: another"
        " file name"
    )
