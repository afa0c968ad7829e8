"""The batches of a run: from its checkpoint, from the model here, or from a server."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import CheckpointError
from ..files.checkpoint import Checkpoint
from ..files.identity import digest, model_identity, remote_identity
from ..generation.batch import require_passes, run_batch
from ..generation.decoding import Decoding, until_stop
from ..generation.result import Piece, pack, piece, provenance, unpack, without_events
from ..remote.batch import remote_batch
from ..remote.preflight import inspected, require_light
from ..remote.validate import received
from ..results.provenance import Provenance
from ..shipping.server import Server
from ..verbs.base import Intervention, by_prompt, require_rows
from ..verbs.lower import lower


class Job(NamedTuple):
    """All that one call of ``run`` does with each of its batches.

    Attributes:
        program: the intervention lowered, unless its values differ by prompt.
        on: the server, or None for the model here.
    """

    model: Any
    intervention: Intervention
    program: Any
    decoding: Decoding
    checkpoint: Checkpoint
    source: Provenance
    allow_unfired: bool
    on: Server | None

    @classmethod
    def of(
        cls,
        model: Any,
        intervention: Intervention,
        settings: Decoding,
        batch_size: int,
        allow_unfired: bool,
        on: Server | None,
    ) -> Job:
        """The job, without a checkpoint yet; what does not fit the model is refused here."""
        program = lower(intervention, model)
        source = provenance(
            model, intervention, {**settings.to_dict(model), "batch_size": batch_size}
        )
        return cls(
            model,
            intervention,
            None if by_prompt(intervention) else program,
            settings,
            Checkpoint(None, {}, "run"),
            source,
            allow_unfired,
            on,
        )

    def kept_in(self, folder: str | os.PathLike[str] | None) -> Job:
        """The job with its finished batches in a folder; None keeps none."""
        if folder is None:
            return self
        if self.on is None:
            identity = model_identity(self.model)
        else:  # nobody here can hash the weights of a model elsewhere
            identity = remote_identity(self.model, self.on.remote)
            identity["sent as"] = str(self.on.dtype)
        identity |= {"intervention": digest(self.intervention), **self.source.generation}
        return self._replace(checkpoint=Checkpoint(folder, identity, "run"))

    def pieces(self, batches: Iterable[dict[str, Tensor]], progress: bool) -> Iterator[Piece]:
        """Every batch's result, in order: from the checkpoint, or run and kept there."""
        bar = tqdm(batches, disable=not progress, desc="run", unit="batch")
        start = 0
        with self.checkpoint as finished:
            for number, batch in enumerate(bar):
                prompts = digest(batch["input_ids"], batch["attention_mask"])
                kept = finished.load(number)
                if kept is None:
                    result = self.one(batch, start)
                    tensors, meta = pack(result)
                    finished.save(number, tensors, {**meta, "identity": prompts})
                else:
                    _require_prompts(self, number, kept[1]["identity"], prompts)
                    result = unpack(self.intervention, *kept, self.source)
                start += len(batch["input_ids"])
                yield result

    def one(self, batch: dict[str, Tensor], start: int) -> Piece:
        """Run the batch whose first prompt is number ``start``."""
        size, width = batch["input_ids"].shape
        program, beams = self.program, self.decoding.beams
        if program is None:  # values by prompt: the batch's rows of them, one for each beam
            _require_enough(self.intervention, start + size)
            number = torch.arange(start, start + size).repeat_interleave(beams)
            rows = slice(start, start + size) if beams == 1 else number
            program = lower(self.intervention, self.model, rows)
        log, tokens, logits = self._executed(program, batch, start)
        if self.intervention.parts() and not self.allow_unfired:
            require_passes(log, max(1, tokens.shape[1] - width), "run")
        new = until_stop(tokens[:, width:], self.decoding.stops)
        result = piece(self.intervention, self.model, batch, (log, new, logits), self.source)
        return result if beams == 1 else without_events(result)

    def _executed(
        self, program: Any, batch: dict[str, Tensor], start: int
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """A batch's log, token ids and logits, from here or from a server."""
        settings = self.decoding.at(start)
        if self.on is None:
            return run_batch(self.model, program, batch, settings)
        saved, _ = remote_batch(
            self.model, program, batch, settings, dtype=self.on.dtype, remote=self.on.remote
        )
        return received(saved, self.intervention, batch, settings.new)


def require_sendable(job: Job, batches: Sequence[dict[str, Tensor]]) -> None:
    """Refuse, before any request is sent, those that would fail or weigh too much.

    Raises:
        RemoteError: see ``remote.preflight``.
    """
    if job.on is not None:
        report = inspected(job.model, batches, job.intervention, job.decoding, job.on.dtype)
        require_light(report, job.on.payload_limit)


def sendable(job: Job, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The batches as they come, the first weighed and tried before it is sent."""
    for number, batch in enumerate(batches):
        if number == 0:
            require_sendable(job, [batch])
        yield batch


def _require_enough(intervention: Intervention, prompts: int) -> None:
    """A stream may go on longer than values that differ by prompt."""
    sizes = [step.change.prompts() for step in intervention.parts() if step.change is not None]
    if any(size is not None and size < prompts for size in sizes):
        require_rows(intervention, prompts)


def _require_prompts(job: Job, number: int, kept: str, wanted: str) -> None:
    """Refuse a finished batch that was made of other prompts."""
    if kept == wanted:
        return
    raise CheckpointError(
        f"run: `checkpoint` is of another job: {job.checkpoint.folder} differs in prompts"
        f" (of batch {number}), wanted the prompts of the finished batches unchanged. Likely cause:"
        " the list was changed or put in another order since. Try: the same prompts again, or a"
        " folder of its own for this job"
    )
