"""One request: the model it is for, or that model's skeleton, and how a block is run.

A request is code: whoever can send one to this process can run anything in it.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import torch
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing import globals as known
from nnsight.tracing import tracer as tracing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def load(folder: str, dtype: str, device_map: str | None) -> Any:
    """The model of a Hugging Face folder, frozen as a deployment's is."""
    logging.disable_progress_bar()
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map)
    return wrap(module.requires_grad_(False), folder)


def skeleton(folder: str) -> Any:
    """The same model without weights: a block finds its modules by name, and asks for values."""
    logging.disable_progress_bar()
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return wrap(module, folder, device="meta")


def wrap(module: Any, folder: str, **options: Any) -> Any:
    """An nnsight model, with a tokenizer if the folder has one."""
    with contextlib.suppress(OSError, ValueError):
        options["tokenizer"] = AutoTokenizer.from_pretrained(folder)
    return TransformersModel(module, task="text-generation", **options)


def as_deployed(model: Any) -> Any:
    """A context as NDIF runs the blocks of trusted keys in: autocast, in half precision.

    A product of float32 in the block is one of bfloat16 there, unless the block sees to it.
    """
    first = next(model._module.parameters())
    half = first.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(first.device.type, first.dtype) if half else contextlib.nullcontext()


def run(model: Any, blob: bytes, job: dict[str, Any]) -> bytes:
    """One request, run on the model: its saved values as the client expects them."""
    for cache in (known.SOURCES, known.BLOCKS):  # of the job before, under the same file's name
        cache.clear()
    objects = model._remoteable_persistent_objects()
    tracer = RequestModel.deserialize(blob, objects, compress=job["compress"])
    tracing.inc()  # the outermost scope: only values marked with `save` leave it
    try:
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
