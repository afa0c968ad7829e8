"""One batch in the model here: every batch of a run or sweep goes through this."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nnsight
import torch
from torch import Tensor

from ..errors import FiringError
from ..kernel.log import Log
from ..kernel.program import Program
from ..kernel.trace import whole_run
from ..kernel.view import Ends
from ..model.modules import torch_module
from .decoding import Decoding, seeded

if TYPE_CHECKING:
    from nnsight import TransformersModel


def run_batch(
    model: TransformersModel, program: Program, batch: dict[str, Tensor], settings: Decoding
) -> tuple[Log, Tensor, Tensor]:
    """One batch: the log, all token ids, and the logits after the prompt.

    The logits are read in an invoke of their own, since nothing of a block runs after its loop
    over forward passes has parked.
    """
    program = honoring(program, settings)
    if settings.new == 0:
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(batch):
                log = nnsight.save(Log())
                whole_run(model, program, log)
            with tracer.invoke():
                logits = nnsight.save(model.output.logits[:, -1].float().clone())
        return log, batch["input_ids"], logits
    arguments = settings.arguments()
    with seeded(settings.seed, torch_module(model)), model.generate(**arguments) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save(Log())
            whole_run(model, program, log)
        with tracer.invoke():
            logits = nnsight.save(model.output.logits[:, -1].float().clone())
            tokens = nnsight.save(tracer.result)
    return log, tokens, logits[:: settings.beams]


def honoring(program: Program, settings: Decoding) -> Program:
    """The program for a generation that is known to stop at the settings' stop tokens."""
    pad = -1 if program.ends is None else program.ends.pad
    return program.replace(ends=Ends(stops=settings.stops, pad=pad, honored=True))


def require_passes(log: Log, wanted: int, where: str) -> None:
    """Refuse a generation of which an edit or a reading saw only some forward passes.

    Raises:
        FiringError: naming both numbers.
    """
    if log.passes >= wanted:
        return
    raise FiringError(
        f"{where}: `intervention` is applied to {log.passes} of the {wanted} forward passes"
        " decoded, wanted every forward pass. Likely cause: a generate of the model's own, whose"
        " later passes do not call the whole model, so that they were not edited. Try: the model's"
        " standard generate; allow_unfired=True if one pass decodes several tokens"
    )
