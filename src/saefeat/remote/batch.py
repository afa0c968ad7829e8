"""One batch of a run, on a server: what travels there, and what comes back.

What comes back is reduced over there: selected readings, counts, token ids, and one row of logits
a prompt, in the model's own dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nnsight
import torch
from nnsight.intervention.backends.remote import RemoteBackend
from torch import Tensor
from transformers import GenerationConfig

from ..errors import RemoteError
from ..generation.batch import honoring
from ..generation.decoding import Decoding
from ..kernel.draws import require_drawn, seeded
from ..kernel.log import Log
from ..kernel.pack import pack
from ..kernel.program import Program
from ..kernel.trace import whole_run
from ..model.modules import torch_module
from ..results.identity import model_key
from ..shipping.narrow import narrowed
from ..shipping.program import embedding as embedding
from ..shipping.program import register

if TYPE_CHECKING:
    from nnsight import TransformersModel


def remote_batch(
    model: TransformersModel,
    program: Program,
    batch: dict[str, Tensor],
    settings: Decoding,
    *,
    dtype: torch.dtype | None = None,
    **how: Any,
) -> tuple[dict[str, Any] | None, Any]:
    """Send one batch; what was saved, where the call waits for it, and nnsight's backend.

    ``how`` goes to nnsight: ``remote``, ``blocking`` or ``backend``. A run without new tokens is a
    generation of one, which is one forward pass too, without a graph for gradients and with logits
    for the last token alone. Samples are drawn by the server's model from the seed that the block
    sets there; where the block runs in another process than the model, that is an error.
    """
    register()
    program = honoring(program, settings).replace(embedding=embedding(model))
    program = narrowed(program, dtype)
    batch = {name: tensor.clone() for name, tensor in batch.items()}  # a view ships its storage
    seed, saved = settings.seed, None
    arguments = {**settings.arguments(), "max_new_tokens": max(settings.new, 1)}
    with model.generate(**arguments, **how) as tracer:
        with tracer.invoke(batch):
            draws, log = seeded(seed), Log()
            whole_run(model, program, log)
        with tracer.invoke():
            logits = model.output.logits[:, -1].clone()
            tokens = tracer.result
            require_drawn(draws)
            saved = nnsight.save({"log": pack(log), "tokens": tokens, "logits": logits})
    return saved, tracer.backend


def backend_of(
    model: TransformersModel, remote: bool | str, job: str | None = None
) -> RemoteBackend:
    """A backend to poll a job with, or to capture what would be sent."""
    host = remote if isinstance(remote, str) else None
    return RemoteBackend(model_key(model), host=host, blocking=False, job_id=job)


def with_stops(model: TransformersModel) -> None:
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


def require_plain(model: TransformersModel, settings: Decoding, remote: bool | str) -> None:
    """Refuse beams: edits follow them through the key-value cache, which stays with the model.

    Raises:
        RemoteError: naming the parameter; and for a model that servers have no name for.
    """
    if remote != "local":
        model_key(model)
    if settings.beams > 1:
        raise RemoteError(
            f"run: `num_beams` is {settings.beams}, with remote, wanted greedy decoding, or"
            " sampling with a seed. Likely cause: beams change places between passes, and only the"
            " key-value cache, which a block on a server does not have, tells of it. Try:"
            " run(model, prompts, ..., remote=...) without num_beams"
        )
