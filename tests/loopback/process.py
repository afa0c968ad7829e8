"""The worker process, seen from the server: started when needed, replaced when it dies."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .far.start import command

Deliver = Callable[[str, str, bytes], None]
"""Takes what a job publishes, stores or counts: which, the session or the name, the bytes."""


class Worker:
    """One worker process; it answers one request at a time, in the order they come.

    Args:
        setup: the first line it reads.

    Attributes:
        last_words: what a process that died last had written, for whoever looks for the reason.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = setup
        self._turn = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        self.last_words = ""

    def run(self, job: dict[str, Any], blob: bytes, deliver: Deliver) -> str:
        """Have one request answered; what it publishes and stores is delivered as it comes.

        Returns:
            An error that nobody else has told the client, or nothing.
        """
        with self._turn:
            if self._closed:
                return "The server was closed before the job began."
            told = UNDEPLOYED
            try:
                process = self._running()
                told = DIED
                _write(process, json.dumps({**job, "bytes": len(blob)}).encode() + b"\n" + blob)
                while (head := json.loads(_line(process)))["kind"] != "done":
                    deliver(head["kind"], head["name"], _exactly(process, head["bytes"]))
            except (BrokenPipeError, EOFError):
                self.last_words = self._obituary()
                return told if told is DIED else f"{told} {self.last_words}"
            return ""

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._turn:  # whoever waited for an answer has now seen that none will come
            self._bury()
            self._errors.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._bury()
            self._process = process = subprocess.Popen(
                command("worker"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # a Ctrl-C is for whoever serves, not for the job
            )
            if self._closed:  # by another thread, which had nothing to kill yet
                process.kill()
            _write(process, json.dumps(self._setup).encode() + b"\n")
            _line(process)  # ready
        return self._process

    def _obituary(self) -> str:
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):  # it is ending, with a reason of its own
                self._process.wait(timeout=ENDING)
        code = self._bury()
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        last = self._errors.read().decode(errors="replace").strip()
        return f"The worker process died (exit code {code}).\n{last}"

    def _bury(self) -> int | None:
        """Close what is left of the process; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # what it had not taken yet
                    stream.close()
        return code


UNDEPLOYED = "Could not deploy this model."
DIED = (
    "Error submitting request to model deployment. "
    "Please try again later. Sorry for the inconvenience."
)
"""What NDIF's queue tells the client, in these words; of a death it does not tell the reason."""

ENDING = 120.0
"""Seconds a process has to end by itself once it has closed its output."""


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)
    process.stdin.flush()


def _line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.endswith(b"\n"):  # nothing, or half an answer
        raise EOFError
    return line


def _exactly(process: subprocess.Popen[bytes], size: int) -> bytes:
    assert process.stdout is not None
    data = process.stdout.read(size)
    if len(data) < size:
        raise EOFError
    return data
