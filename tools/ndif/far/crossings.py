"""Counts what crosses between a model and a sandboxed block, a line of JSON a request."""

from __future__ import annotations

import json
import os
from typing import Any

from ndif.services.ray.sandbox import host

FILE = "NDIF_CROSSINGS"
"""The environment variable with the file's path; nothing is counted without it."""


class Counted(host.Connection):
    """The released connection, which also counts its messages and bytes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counts = {"to_block": 0, "to_model": 0, "bytes_to_block": 0, "bytes_to_model": 0}

    def send_raw(self, data: bytes) -> None:
        """Send a message to the block."""
        self._count("to_block", data)
        super().send_raw(data)

    def recv_raw(self, timeout: float | None = None) -> bytes:
        """Take a message from the block."""
        data = super().recv_raw(timeout)
        self._count("to_model", data)
        return data

    def close(self) -> None:
        """Write the counts down."""
        with open(os.environ[FILE], "a", encoding="utf-8") as file:
            file.write(json.dumps(self.counts) + "\n")
        super().close()

    def _count(self, direction: str, data: bytes) -> None:
        self.counts[direction] += 1
        self.counts[f"bytes_{direction}"] += len(data)


def count() -> None:
    """Count from now on, if that is asked for."""
    if FILE in os.environ:
        host.Sandbox.connection = lambda self, timeout=60.0: Counted.open(self.path, timeout)
