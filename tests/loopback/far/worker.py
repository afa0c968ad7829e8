"""The process with the model: it answers requests as an NDIF server does.

It speaks over its standard input and output: a line of JSON, then as many bytes as the line says.
Ordinarily a block runs beside the model, as for the trusted keys of a server. With ``copies`` it
runs in a process of its own, as for all other keys.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

from .start import Blocker, end_with, replies


def main() -> None:
    """Load the model, then answer requests until the input closes."""
    sys.meta_path.insert(0, Blocker())
    sink = os.fdopen(replies(), "wb")
    end_with(0)
    setup = json.loads(sys.stdin.buffer.readline())
    import torch

    from .host import Host
    from .job import load

    torch.set_num_threads(setup["threads"])
    host = Host(setup["folder"]) if setup["copies"] else None
    model = load(setup["folder"], setup["dtype"], setup["device_map"])
    if host is not None:
        host.wait()
    sink.write(b'{"ready": true}\n')
    sink.flush()
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        head, result = answer(model, host, sys.stdin.buffer.read(job["bytes"]), job)
        sink.write(json.dumps({**head, "bytes": len(result)}).encode() + b"\n" + result)
        sink.flush()


def answer(model: Any, host: Any, blob: bytes, job: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The reply to one request: its result, or the error as text."""
    from .job import as_deployed, run

    if job["fault"] == "slow":
        time.sleep(job["slow"])
    try:
        if job["fault"] == "fail":
            raise RuntimeError("CUDA out of memory (the fault that was asked for)")
        model._remoteable_set_env(job["env"])
        if host is None:
            with as_deployed(model):
                return {"ok": True}, run(model, blob, job)
        return host.run(model, blob, job)
    except Exception:
        return {"ok": False, "error": traceback.format_exc()}, b""
