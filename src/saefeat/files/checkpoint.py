"""Checkpoints: a long job's finished batches in a folder, so that it can go on where it stopped.

A folder belongs to one job. ``identity.json`` says which, as hashes, and a call that differs is
refused by the name of what differs. Each finished batch is one file of the library's container:
tensors, plain data as JSON, and a hash of both. Files are written beside their place and moved
there, so a batch is either whole or absent; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from ..errors import CheckpointError, FileError
from .container import PARTIAL, pack, read, seal, unseal, write
from .paths import expanded

FORMAT, VERSION = "saefeat.checkpoint", 1
LARGEST = 1 << 40
"""Bytes that are read: a batch's file is as large as what this library wrote."""


@final
@dataclass(frozen=True)
class Checkpoint:
    """Finished batches of one job, by number; without a folder nothing is kept.

    Use it as a context: entering reads or writes the folder's identity, and refuses another job's.

    Args:
        folder: where to keep batches; made if it is not there. None keeps nothing.
        identity: what the job is: name → anything JSON can hold, shown in the error where it
            differs. ``saefeat.results.provenance`` hashes what is long.
        function: the public function, for errors.

    Raises:
        CheckpointError: for another job's folder, one that is no checkpoint, or a damaged
            ``identity.json``.
        FileError: for a folder that cannot be made, read or written to.

    Examples:
        >>> from saefeat.files.checkpoint import Checkpoint
        >>> with Checkpoint("job", {"prompts": "three"}) as done:
        ...     done.save(0, {"scores": torch.ones(2)}, {"rows": 2})
        >>> with Checkpoint("job", {"prompts": "three"}) as done:
        ...     done.load(0), done.load(1)
        (({'scores': tensor([1., 1.])}, {'rows': 2}), None)
    """

    folder: str | os.PathLike[str] | None
    identity: Mapping[str, Any]
    function: str = "run"

    def __enter__(self) -> Checkpoint:
        if self.folder is None:
            return self
        folder = self._made()
        wanted = json.loads(json.dumps(dict(self.identity)))  # as it will be read
        name = folder / "identity.json"
        if name.exists():
            _require_same(self.function, folder, _identity(self.function, name), wanted)
        elif any(entry.suffix != PARTIAL for entry in folder.iterdir()):  # left by a broken write
            raise _no_folder(self.function, folder)
        else:
            write(name, json.dumps(wanted, indent=1).encode(), self.function)
        return self

    def _made(self) -> Path:
        """The folder, made if it is not there."""
        folder = self.path
        try:
            taken = folder.exists() and not folder.is_dir()
            if not taken:
                folder.mkdir(parents=True, exist_ok=True)
                next(folder.iterdir(), None)  # some that are there cannot be read
        except (OSError, ValueError) as error:  # a ValueError: a path with a NUL
            cause = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
            raise FileError(
                f"{self.function}: `checkpoint` is {str(folder)!r:.200}, which cannot be made or"
                f" read, wanted a folder that can be read and written to. Likely cause: {cause}."
                ' Try: checkpoint="runs/job-1"'
            ) from error
        if taken:
            raise _no_folder(self.function, folder)
        return folder

    def __exit__(self, *_: object) -> None:
        """Nothing is held open: what is finished is on the disk already."""

    def load(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished batch's tensors and plain data; None where it has to be done.

        A damaged file counts as not done, with a warning that names it.
        """
        if self.folder is None or not self._file(number).exists():
            return None
        try:
            contents = read(self._file(number), self.function, LARGEST)
            meta = unseal(contents, FORMAT, VERSION, self.function)["meta"]
        except (FileError, KeyError) as error:
            text = (
                f"saefeat: {self._file(number)} is damaged ({error}) and its batch is done again."
            )
            warnings.warn(text, stacklevel=3)
            return None
        return contents.tensors, json.loads(meta)

    def save(self, number: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Keep a finished batch: named tensors, and anything JSON can hold."""
        if self.folder is None:
            return
        # Plain data as a text: a NaN is a result too, and the document itself has none.
        document = seal(FORMAT, VERSION, {"meta": json.dumps(dict(meta))}, tensors, {})
        write(self._file(number), pack(document, tensors, self.function), self.function)

    def _file(self, number: int) -> Path:
        return self.path / f"batch-{number:06d}.safetensors"

    @property
    def path(self) -> Path:
        """The folder."""
        return expanded(self.folder or "", self.function, "checkpoint", CheckpointError)


def _identity(function: str, name: Path) -> dict[str, Any]:
    try:
        found = json.loads(name.read_bytes())
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    raise CheckpointError(
        f"{function}: `checkpoint` is {name}, which cannot be read, wanted the identity of the job"
        " whose batches lie beside it. Likely cause: a damaged disk, or a file edited by hand. Try:"
        " another folder; nothing tells whose batches these are"
    )


def _require_same(
    function: str, folder: Path, found: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Refuse to go on with another job's batches."""
    names = sorted({*found, *wanted})
    other = [name for name in names if found.get(name) != wanted.get(name)]
    if other:
        shown = "; ".join(f"{n} was {found.get(n)!r:.80}, is {wanted.get(n)!r:.80}" for n in other)
        raise CheckpointError(
            f"{function}: `checkpoint` is of another job: {folder} differs in {', '.join(other)}"
            f" ({shown}), wanted the same call as the one that began it. Likely cause: an argument,"
            " the model or a library changed since. Try: the same arguments again, or a folder of"
            " its own for this job"
        )


def _no_folder(function: str, folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{function}: `checkpoint` is {folder}, which is no checkpoint, wanted a new or empty"
        " folder, or one that an earlier call began. Likely cause: a path to something else. Try:"
        ' checkpoint="runs/job-1"'
    )
