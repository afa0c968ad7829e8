"""One batch of a run, on a server: what travels there, and what comes back.

What comes back is reduced over there: selected readings, counts, token ids, and one row of logits
a prompt, in the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nnsight
import torch
from nnsight.intervention.backends.remote import RemoteBackend
from torch import Tensor
from transformers import GenerationConfig

from ..errors import RemoteError, explain
from ..execution.decoding import Decoding, decoding
from ..kernel.pack import pack, unpack
from ..kernel.program import new_log
from ..kernel.trace import whole_run
from ..sites import torch_module
from ..verbs.travel import narrowed, register

Piece = tuple[dict[str, Any], Tensor, Tensor]
"""A batch's log, all its token ids, and the logits after the prompt."""


def remote_batch(
    model: Any,
    program: dict[str, Any],
    batch: dict[str, Tensor],
    new: int,
    *,
    dtype: torch.dtype | None = None,
    **how: Any,
) -> tuple[Piece | None, Any]:
    """Send one batch; its results where the call waits for them, and nnsight's backend.

    ``how`` goes to nnsight: ``remote``, ``blocking`` or ``backend``. A run without new tokens is a
    generation of one, which is one forward pass too, without a graph for gradients and with logits
    for the last token alone.
    """
    register()
    program = {**program, "ends": {**program["ends"], "honored": True}}
    program = narrowed({**program, "embedding": embedding(model)}, dtype)
    batch = {name: tensor.clone() for name, tensor in batch.items()}  # a view ships its storage
    log = logits = tokens = None
    with model.generate(max_new_tokens=max(new, 1), do_sample=False, **how) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save(new_log())
            whole_run(model, program, log)
            pack(log)
        with tracer.invoke():
            logits = nnsight.save(model.output.logits[:, -1].clone())
            tokens = nnsight.save(tracer.result)
    if tokens is None:  # sent off, not waited for
        return None, tracer.backend
    return received({"log": log, "tokens": tokens, "logits": logits}, batch, new), tracer.backend


def embedding(model: Any) -> str | None:
    """The path of the module that embeds tokens, where later passes' tokens are read."""
    module: Any = torch_module(model)
    wanted = module.get_input_embeddings()
    return next((name for name, part in module.named_modules() if part is wanted), None)


def received(saved: dict[str, Any], batch: dict[str, Tensor], new: int) -> Piece:
    """What came back, as a local batch would have left it."""
    tokens = saved["tokens"].cpu() if new else batch["input_ids"]
    return unpack(saved["log"]), tokens, saved["logits"].float().cpu()


def backend_of(model: Any, remote: bool | str, job: str | None = None) -> RemoteBackend:
    """A backend to poll a job with, or to capture what would be sent."""
    host = remote if isinstance(remote, str) else None
    return RemoteBackend(model.to_model_key(), host=host, blocking=False, job_id=job)


def with_stops(model: Any) -> None:
    """Give a model without weights the checkpoint's own settings for generation.

    nnsight builds it from ``config.json`` alone; which tokens end a turn stands in
    ``generation_config.json``, and the server's model has read that.
    """
    module: Any = torch_module(model)
    if module.device.type == "meta" and isinstance(getattr(model, "repo_id", None), str):
        try:
            module.generation_config = GenerationConfig.from_pretrained(
                model.repo_id, revision=model.revision
            )
        except OSError:  # a checkpoint without that file: config.json is all there is
            return


def remote_settings(
    model: Any, settings: Decoding, stop: Sequence[int] = (), checkpoint: object = None
) -> Decoding:
    """Settings for a server: greedy, with the stop tokens the checkpoint names.

    Raises:
        RemoteError: for what is only done here.
    """
    given = {
        "temperature": settings.temperature is not None,
        "num_beams": settings.beams > 1,
        "stop": bool(stop),
        "checkpoint": checkpoint is not None,
    }
    name = next((name for name, there in given.items() if there), None)
    if name is None:
        with_stops(model)
        return decoding(model, max_new_tokens=settings.new)
    raise RemoteError(
        explain(
            "run",
            name,
            got="given, with remote",
            wanted="greedy decoding, without a checkpoint",
            cause="a server's random numbers and beams are not ours to set",
            call="submit(..., file='job.json') to go on after an interruption",
        )
    )
