"""Requests under way, in a file, so that the call that sent them can take them up again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.container import write
from .jobfile import NAME, Part

FORMAT = "saefeat-requests"


@dataclass(frozen=True)
class Flight:
    """What a checkpointed call has sent and not got back.

    Attributes:
        path: the file, in the checkpoint's folder, which belongs to this very call.
        host: where requests were sent; ids of another server mean nothing here.
        first: the call's number of the first batch at hand.
    """

    path: Path
    host: str
    first: int = 0

    def taken(self) -> dict[int, str]:
        """Batches under way, from the first at hand on, and their requests' ids.

        A file that cannot be read costs no result: its requests are made again.
        """
        try:
            said = json.loads(self.path.read_bytes())
            known = said["format"] == FORMAT and said["host"] == self.host
            listed = {int(number): str(name) for number, name in said["requests"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        names = {n - self.first: name for n, name in listed.items() if NAME.fullmatch(name)}
        return {n: name for n, name in names.items() if n >= 0} if known else {}

    def write(self, parts: Sequence[Part]) -> None:
        """Keep what is under way now."""
        flying = {str(self.first + n): part.id for n, part in enumerate(parts) if part.in_flight}
        said = {"format": FORMAT, "host": self.host, "requests": flying}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, json.dumps(said, indent=1).encode(), "run")
