"""A job's file: JSON for how it stands and what was asked, so that it can be taken up again.

Next to ``job.json`` lie ``job.prompts.json``, the prompts' ids, ``job.edits.safetensors``, the
intervention as ``save`` writes it, both named in it by their hashes, and results that have arrived.
Each is written in full or not at all, nothing in them is code, and they hold no key and no weights
but the selected latents'. An intervention that a file cannot hold, because it has a function, is
described and not kept.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from nnsight import CONFIG
from nnsight.schema.response import Status
from torch import Tensor

from ..checks import whole
from ..errors import FileError, PromptError, RemoteError, SaefeatError
from ..files.container import pack, read, seal, unseal, write
from ..files.hashing import digest
from ..generation.decoding import Decode, Greedy, Sample, decoding
from ..generation.task import Task
from ..hub.files import load, packed
from ..results.provenance import model_key, now, versions
from ..shipping.server import NDIF, Server
from ..text.prompts import encode_prompts, split
from ..verbs.base import Chain, Intervention, require_rows
from .batch import Requests, require_plain, with_stops

if TYPE_CHECKING:
    from nnsight import TransformersModel


FORMAT, VERSION = "saefeat-job", 3
RESULT_FORMAT, RESULT_VERSION = "saefeat.job-result", 2
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
    taken_up: bool = False  # sent by an earlier call, which may be long ago

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
    def read(cls, path: Path, function: str = "submit") -> JobFile:
        """The job as its file has it, for a public function."""
        try:
            about = json.loads(path.read_bytes())
            known = about.pop("format") == FORMAT and about.pop("version") == VERSION
            parts = [_part(entry) for entry in about.pop("batches")]
            fingerprint = about.pop("fingerprint")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise not_ours(path, f"not a job file ({type(error).__name__})", function) from error
        if not known or not isinstance(fingerprint, str) or not parts:
            raise not_ours(path, "not a job file of this version of saefeat", function)
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
        """The prompts that were submitted."""
        data = self._kept("prompts", "prompts.json")
        try:
            rows = json.loads(data)
            tensors = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}
        except (ValueError, KeyError, TypeError) as error:
            got = f"with prompts that are not rows of ids ({type(error).__name__})"
            raise not_ours(self.path, got, "Job.load") from error
        return encode_prompts(None, tensors)

    def intervention(self, model: TransformersModel) -> Intervention:
        """The intervention that was submitted."""
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
    """One batch's entry."""
    name, status = entry["id"], entry["status"]
    if name is not None and not NAME.fullmatch(name):
        raise ValueError("not a job's id")
    if status not in STATUSES or (name is None and status not in ("new", "ERROR")):
        raise ValueError("not a status")
    return Part(name, status, str(entry["error"]))


def trusted(file: JobFile) -> Server:
    """The configured host, to which the key belongs, if it is the file's."""
    host = file.about.get("host")
    if host == CONFIG.API.HOST:
        return NDIF
    raise RemoteError(
        f"Job.load: `on` is not given, and {file.path} was sent to {host!r:.200}, wanted the"
        f" configured host, {CONFIG.API.HOST}, or one that you name. Likely cause: a job on a"
        " server of your own, or a file from somebody else. Try: Job.load(file, model,"
        f" on=Server({host!r:.200})), if you trust that server"
    )


def not_ours(path: Path, got: str, function: str = "submit") -> RemoteError:
    """The error for a file that does not belong to the call."""
    if function == "submit":
        wanted, call = "a new file, or the file of this very run", "another file name"
    else:
        wanted, call = "the file of a job of this model", "submit(...) again, with a new file"
    return RemoteError(
        f"{function}: `file` is {path}, {got}, wanted {wanted}. Likely cause: the prompts, the"
        f" intervention, the model or an option has changed. Try: {call}"
    )


class Call(NamedTuple):
    """``submit``'s arguments but for the model, the prompts and the intervention."""

    max_new_tokens: int
    decode: Decode
    batch_size: int
    allow_unfired: bool
    on: Server

    def requests(
        self, model: TransformersModel, prompts: dict[str, Tensor], intervention: Intervention
    ) -> Requests:
        """The call's batches, checked but for the preflight."""
        if not isinstance(self.on, Server) or self.on.is_local:
            raise RemoteError(
                f'submit: `on` is {self.on!r}, wanted a Server() or Server("http://..."). Likely'
                " cause: a job is left with a server, which a run here is not. Try: run(model,"
                ' prompts, intervention, on=Server("local")), which waits'
            )
        whole("submit", "batch_size", self.batch_size, error=PromptError)
        require_rows(intervention, len(prompts["input_ids"]))
        with_stops(model)
        settings = decoding(model, self.max_new_tokens, self.decode)
        require_plain(model, settings, self.on.remote)
        task = Task("submit", model, intervention, settings, self.batch_size, self.allow_unfired)
        return Requests(task, split(prompts, self.batch_size), self.on)

    def fingerprint(
        self, model: TransformersModel, prompts: dict[str, Tensor], intervention: Intervention
    ) -> str:
        """A hash of all that decides the result, and not of where or how it is asked for."""
        asked = [self.max_new_tokens, self.decode, self.batch_size, str(self.on.dtype)]
        return digest(prompts, intervention, asked, model_key(model))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the job's file, which has no address: that stands beside it."""
        dtype = None if self.on.dtype is None else str(self.on.dtype).removeprefix("torch.")
        return {
            "max_new_tokens": self.max_new_tokens,
            "decode": {"kind": type(self.decode).__name__, **asdict(self.decode)},
            "batch_size": self.batch_size,
            "allow_unfired": self.allow_unfired,
            "dtype": dtype,
            "payload_limit": self.on.payload_limit,
            "requests": self.on.requests,
        }

    @classmethod
    def read(cls, said: Any, url: str | None) -> Call:
        """The arguments in a job's file, for a server at this address."""
        try:
            decode, dtype = dict(said["decode"]), said["dtype"]
            kind = {"Greedy": Greedy, "Sample": Sample}[decode.pop("kind")]
            dtype = None if dtype is None else getattr(torch, dtype)
            limits = {name: said[name] for name in ("payload_limit", "requests")}
            names = ("max_new_tokens", "batch_size", "allow_unfired")
            rest = {name: said[name] for name in names}
            return cls(**rest, decode=kind(**decode), on=Server(url, dtype=dtype, **limits))
        except (KeyError, TypeError, ValueError, AttributeError, SaefeatError) as error:
            raise RemoteError(
                f"Job.load: `file` is one with arguments {said!r:.200}, wanted those of submit"
                f" ({type(error).__name__}: {error}). Likely cause: a file from another version of"
                " saefeat. Try: submit(...) again, with a new file"
            ) from error


# ---------------------------------------------------------------- results that have arrived


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
    said = {"passes": log["passes"], "job": job, "where": saved["where"]}
    document = seal(RESULT_FORMAT, RESULT_VERSION, said, flat, versions())
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
    table: dict[int, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        if name.startswith("events."):
            _, number, key = name.split(".")
            table.setdefault(int(number), {})[key] = tensor
    events = {}
    for number, columns in table.items():
        sizes = columns.pop("passes").tolist()
        cut = {name: column.split([n for *_, n in sizes]) for name, column in columns.items()}
        events[number] = [
            {"begins": bool(begins), "rows": rows, "changes": {n: c[i] for n, c in cut.items()}}
            for i, (begins, rows, _) in enumerate(sizes)
        ]
    return events


def load_saved(file: Path, job: str) -> dict[str, Any]:
    """What ``save_saved`` wrote."""
    try:
        contents = read(file, "submit", LARGEST)
        spec, flat = unseal(contents, RESULT_FORMAT, RESULT_VERSION, "submit"), contents.tensors
        if spec["job"] != job:
            raise ValueError("it is of another job")
        view = {"position": flat["position"]}
        log = {"passes": spec["passes"], "events": _events(flat), "view": view}
        for group in GROUPS:
            keys = [name for name in flat if name.startswith(f"{group}.")]
            log[group] = {int(name.partition(".")[2]): flat[name] for name in keys}
        outputs = {name: flat[name] for name in ("tokens", "logits")}
        return {"log": log, **outputs, "where": spec["where"]}
    except (FileError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise RemoteError(
            f"submit: `file` is {file}, which cannot be read: {error}, wanted a result that arrived"
            " earlier. Likely cause: it was cut short or changed. Try: delete it; its batch is sent"
            " again"
        ) from error
