"""The process that runs a request as an NDIF server does, with nothing of ours installed.

It is run as a script in an isolated interpreter, never imported by the library: an import blocker
goes in before anything else, so that code which travels by reference fails here as it would there.
It speaks over its standard input and output: a line of JSON, then as many bytes as the line says.

A request is code: whoever can send one to this process can run anything in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
import traceback
from importlib.abc import MetaPathFinder
from typing import Any

NOT_THERE = ("saefeat", "sae_lens", "transformer_lens", "jaxtyping", "beartype")
"""Packages that this process cannot import, whether installed or not."""


class Blocker(MetaPathFinder):
    """Makes the packages of ``NOT_THERE`` look as if they were not installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        root = fullname.partition(".")[0]
        if root in NOT_THERE:
            raise ModuleNotFoundError(f"No module named {root!r}", name=root)


def load(folder: str, dtype: str, device_map: str | None) -> Any:
    """The model of a Hugging Face folder as an nnsight model, as a deployment loads it."""
    from nnsight import TransformersModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map)
    with contextlib.suppress(OSError, ValueError):  # a folder without a tokenizer
        return TransformersModel(
            module, tokenizer=AutoTokenizer.from_pretrained(folder), task="text-generation"
        )
    return TransformersModel(module, task="text-generation")


def copied(value: Any) -> Any:
    """The value as another process would see it: a copy, outside any graph."""
    import torch
    from nnsight.intervention.serialization import dumps, loads
    from nnsight.util import apply

    return loads(dumps(apply(value, torch.Tensor.detach, torch.Tensor)))


@contextlib.contextmanager
def boundary(copies: bool) -> Any:
    """With ``copies``, every value the block reads or writes is copied on its way.

    So it is on the server for ordinary keys, whose blocks run in a process of their own: what a
    block does in place never reaches the model, and no gradient crosses.
    """
    from nnsight.intervention.interleaver import Mediator

    plain = Mediator.event

    def event(kind: Any, location: str, *rest: Any) -> Any:
        return copied(plain(kind, location, *map(copied, rest)))

    if copies:
        Mediator.event = staticmethod(event)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Mediator.event = plain  # type: ignore[method-assign]


def run(model: Any, blob: bytes, job: dict[str, Any]) -> bytes:
    """One request, run on the model: its saved values as the client expects them."""
    import torch
    from nnsight.schema.request import RequestModel
    from nnsight.tracing import globals as known
    from nnsight.tracing import tracer as tracing

    for cache in (known.SOURCES, known.BLOCKS):  # of the job before, under the same file's name
        cache.clear()
    objects = model._remoteable_persistent_objects()
    model._remoteable_set_env(job["env"])
    tracer = RequestModel.deserialize(blob, objects, compress=job["compress"])
    tracing.inc()  # the outermost scope: only values marked with `save` leave it
    try:
        with boundary(job["copies"]):
            tracer.execute(tracer.info.code)
        kept = {
            name: value
            for name, value in tracer.info.frame.f_locals.items()
            if id(value) in tracing._saves()
        }
    finally:
        tracing.dec()
    if job["fault"] == "die":
        os._exit(9)
    with io.BytesIO() as file:
        torch.save(kept, file, pickle_protocol=4)
        result = file.getvalue()
    if job["compress"]:
        import zstandard

        result = zstandard.ZstdCompressor(level=6).compress(result)
    return result


def answer(model: Any, blob: bytes, job: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The reply to one request: its result, or the error as text."""
    if job["fault"] == "slow":
        time.sleep(job["slow"])
    try:
        if job["fault"] == "fail":
            raise RuntimeError("CUDA out of memory (the fault that was asked for)")
        return {"ok": True}, run(model, blob, job)
    except Exception:
        return {"ok": False, "error": traceback.format_exc()}, b""


def main() -> None:
    """Load the model, then answer requests until the input closes."""
    sys.meta_path.insert(0, Blocker())
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a block prints must not land among the replies
    setup = json.loads(sys.stdin.buffer.readline())
    import torch

    torch.set_num_threads(setup["threads"])
    model = load(setup["folder"], setup["dtype"], setup["device_map"])
    replies.write(b'{"ready": true}\n')
    replies.flush()
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        head, result = answer(model, sys.stdin.buffer.read(job["bytes"]), job)
        replies.write(json.dumps({**head, "bytes": len(result)}).encode() + b"\n" + result)
        replies.flush()


if __name__ == "__main__":
    main()
