"""The worker process, seen from the server: started when needed, replaced when it dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("worker.py")


class Worker:
    """One worker process; it answers one request at a time, in the order they come."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = setup
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)

    def run(self, job: dict[str, Any], blob: bytes) -> tuple[bool, str, bytes]:
        """Whether the request succeeded, what went wrong otherwise, and its result."""
        with self._turn:
            try:
                process = self._running()
                _write(process, json.dumps({**job, "bytes": len(blob)}).encode() + b"\n" + blob)
                head = json.loads(_line(process))
                assert process.stdout is not None
                return head["ok"], head.get("error", ""), process.stdout.read(head["bytes"])
            except (BrokenPipeError, EOFError):
                return False, self._obituary(), b""

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        self._errors.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                # isolated: no PYTHONPATH, and the script's own folder is not importable
                [sys.executable, "-I", str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
            _write(self._process, json.dumps(self._setup).encode() + b"\n")
            _line(self._process)  # ready
        return self._process

    def _obituary(self) -> str:
        process, self._process = self._process, None
        code = None
        if process is not None:
            code = process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):  # what it had not taken yet
                        stream.close()
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        last = self._errors.read().decode(errors="replace").strip()
        return f"The worker process died (exit code {code}).\n{last}"


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)
    process.stdin.flush()


def _line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise EOFError
    return line
