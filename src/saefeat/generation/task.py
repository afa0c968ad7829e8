"""What a run does with each of its batches, wherever they are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernel.log import Log
from ..kernel.program import Program
from ..results.provenance import Provenance
from ..results.run import Run
from ..verbs.base import Intervention, by_prompt, require_fired, require_rows
from ..verbs.lower import lower
from .batch import require_passes
from .decoding import Decoding, require_beamable, until_stop
from .result import Piece, join, piece, provenance, without_events

if TYPE_CHECKING:
    from nnsight import TransformersModel


@dataclass(frozen=True)
class Task:
    """An intervention, a way of decoding, and what is asked of the results.

    Attributes:
        function: the public function that was called, for error messages.
    """

    function: str
    model: TransformersModel
    intervention: Intervention
    decoding: Decoding
    batch_size: int
    allow_unfired: bool

    @cached_property
    def provenance(self) -> Provenance:
        """What the results depend on."""
        settings = {**self.decoding.to_dict(self.model), "batch_size": self.batch_size}
        return provenance(self.model, self.intervention, settings)

    @cached_property
    def _every_row(self) -> Program | None:
        """The program, if it is the same for every prompt."""
        require_beamable(self.intervention, self.decoding)
        program = lower(self.intervention, self.model)
        return None if by_prompt(self.intervention) else program

    def require_lowered(self) -> None:
        """Refuse what does not fit the model, before anything is run.

        Raises:
            SiteError, ModelError: see ``verbs.lower``.
            SaefeatError: for what has no meaning under beams.
        """
        self._every_row  # noqa: B018  (computed here, used for every batch)

    def program(self, start: int, size: int) -> Program:
        """The program for the prompts start..start+size: its own rows of values by prompt."""
        if self._every_row is not None:
            return self._every_row
        self._require_enough(start + size)
        beams = self.decoding.beams
        number = torch.arange(start, start + size).repeat_interleave(beams)
        return lower(
            self.intervention, self.model, slice(start, start + size) if beams == 1 else number
        )

    def _require_enough(self, prompts: int) -> None:
        """A stream may go on longer than values that differ by prompt."""
        changes = [step.change for step in self.intervention.parts()]
        sizes = [change.prompts() for change in changes if change is not None]
        if any(size is not None and size < prompts for size in sizes):
            require_rows(self.intervention, prompts)

    def piece(self, batch: dict[str, Tensor], log: Log, tokens: Tensor, logits: Tensor) -> Piece:
        """A batch's result, from its log, all its token ids and the logits after its prompts.

        Raises:
            FiringError: if an edit saw fewer forward passes than tokens were decoded.
        """
        late = tokens[:, batch["input_ids"].shape[1] :]
        if self.intervention.parts() and not self.allow_unfired:
            require_passes(log, max(1, late.shape[1]), self.function)
        outputs = log, until_stop(late, self.decoding.stops), logits
        result = piece(self.intervention, self.model, batch, outputs, self.provenance)
        return result if self.decoding.beams == 1 else without_events(result)

    def join(self, pieces: Sequence[Piece]) -> Run:
        """All batches as one result.

        Raises:
            FiringError: if an edit selected no token in any.
        """
        result = join(pieces)
        if not self.allow_unfired:
            require_fired(result.receipt, self.function)
        return result
