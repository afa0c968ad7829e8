"""Stages: finished pieces of work on disk, so that an interrupted study goes on where it stopped.

Every piece is one JSON file, written whole or not at all, with a key that says what it was made
from. A piece whose key does not fit, or whose content is damaged, is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Say = Callable[[str], object]
"""Where messages go, a line at a time."""


def fingerprint(value: Any) -> str:
    """A hash of plain data; equal for equal data whatever the order of dictionaries."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Write beside the target and rename: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Stages:
    """The stages of one study in one folder.

    Attributes:
        folder: where the files lie.
        base: what every stage depends on: model, dictionaries, versions and code. ``Lab.stage``
            adds settings, prompts, judge and openings.
        say: takes messages.
        reused: names of the stages found on disk, filled as the study runs.
        made: names of those computed now.
    """

    folder: Path
    base: str
    say: Say
    reused: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    def run(self, name: str, inputs: Any, work: Callable[[], Any]) -> Any:
        """The stage's payload: from disk if it was made from the same things, else made now.

        Args:
            name: may hold slashes, which become folders.
            inputs: plain data that the work depends on beside ``base``.
            work: makes the payload, which must be plain JSON data.
        """
        path = self.folder / f"{name}.json"
        key = fingerprint([self.base, name, inputs])
        found = self._read(path, key)
        if found is not None:
            self.reused.append(name)
            return found["payload"]
        start = time.perf_counter()
        payload = json.loads(json.dumps(work()))  # a resumed study sees what a fresh one saw
        record = {
            "key": key,
            "digest": fingerprint(payload),
            "seconds": round(time.perf_counter() - start, 3),
            "payload": payload,
        }
        write_atomically(path, json.dumps(record))
        self.made.append(name)
        return payload

    def _read(self, path: Path, key: str) -> dict[str, Any] | None:
        """A stage's record, or None if it is absent, damaged, or made from something else."""
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            whole = fingerprint(record["payload"]) == record["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.say(f"{path} is damaged ({type(error).__name__}); computing it again")
            return None
        if not whole:
            self.say(f"{path} is damaged (its digest differs); computing it again")
            return None
        return record if record.get("key") == key else None
