"""One batch in the model here: every batch of a run or sweep goes through this."""

from __future__ import annotations

from typing import Any

import nnsight
import torch
from torch import Tensor

from ..errors import FiringError
from ..kernel.program import new_log
from ..kernel.trace import whole_run
from ..model.modules import torch_module
from .decoding import Decoding, seeded


def run_batch(
    model: Any, program: dict[str, Any], batch: dict[str, Tensor], settings: Decoding
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """One batch: the log, all token ids, and the logits after the prompt; plain dicts and tensors.

    The logits are read in an invoke of their own, since nothing of a block runs after its loop
    over forward passes has parked.
    """
    ends = {**program["ends"], "honored": True, "stops": settings.stops}
    program = {**program, "ends": ends}
    if settings.new == 0:
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(batch):
                log = nnsight.save(new_log())
                whole_run(model, program, log)
            with tracer.invoke():
                logits = nnsight.save(model.output.logits[:, -1].float().clone())
        return log, batch["input_ids"], logits
    arguments = settings.arguments()
    with seeded(settings.seed, torch_module(model)), model.generate(**arguments) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save(new_log())
            whole_run(model, program, log)
        with tracer.invoke():
            logits = nnsight.save(model.output.logits[:, -1].float().clone())
            tokens = nnsight.save(tracer.result)
    return log, tokens, logits[:: settings.beams]


def require_passes(log: dict[str, Any], wanted: int, where: str) -> None:
    """Refuse a generation of which an edit or a reading saw only some forward passes.

    Raises:
        FiringError: naming both numbers.
    """
    if log["passes"] >= wanted:
        return
    raise FiringError(
        f"{where}: `intervention` is applied to {log['passes']} of the {wanted} forward passes"
        " decoded, wanted every forward pass. Likely cause: a generate of the model's own, whose"
        " later passes do not call the whole model, so that they were not edited. Try: the model's"
        " standard generate; allow_unfired=True if one pass decodes several tokens"
    )
