"""The process with the model: NDIF's own code answers requests in it.

It speaks over its standard input and output: a line of JSON, then as many bytes as the line says.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading

from .start import Blocker, end_with, replies


class Line:
    """What goes to the server: ready; what is published, stored and counted; done."""

    def __init__(self, descriptor: int) -> None:
        self._file, self._turn = os.fdopen(descriptor, "wb"), threading.Lock()

    def send(self, kind: str, name: str = "", data: bytes = b"") -> None:
        """One message."""
        head = json.dumps({"kind": kind, "name": name, "bytes": len(data)})
        with self._turn:
            self._file.write(head.encode() + b"\n" + data)
            self._file.flush()


def main() -> None:
    """Load the model, then answer requests until the input closes."""
    sys.meta_path.insert(0, Blocker())
    line = Line(replies())
    end_with(0)
    setup = json.loads(sys.stdin.buffer.readline())

    from .services import install

    install(line.send, setup["url"])
    from ndif.common.schema.request import BackendRequestModel

    from .deployment import Deployment

    counted = lambda counts: line.send("crossed", data=json.dumps(counts).encode())  # noqa: E731
    actor, loop = Deployment(setup, counted), asyncio.new_event_loop()
    line.send("ready")
    while text := sys.stdin.buffer.readline():
        job = json.loads(text)
        request = BackendRequestModel(**job["request"], payload=sys.stdin.buffer.read(job["bytes"]))
        actor.fault = job["fault"]
        loop.run_until_complete(actor.run(request))
        line.send("done")
        if actor.late:
            os._exit(0)  # a new process takes the next job
