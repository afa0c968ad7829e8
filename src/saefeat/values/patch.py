"""Patch: latents set to what they were in another run of the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ..arguments import checked
from ..dictionaries.latents import Latents
from ..errors import LatentError
from ..kernel.values import Pinned
from ..results.readings import Readings
from .base import Value
from .columns import columns_of, require_readings


@checked(error=LatentError, own=("readings",))
@final
@dataclass(frozen=True, repr=False, eq=False)
class Patch(Value):
    """What latents were at the same position of the same prompt in another run.

    Tokens are matched by the prompt's number and by position in its text, whatever the padding;
    that the texts are the same is not asked, so the run may be of counterfactual prompts. Their
    number must be that of the prompts edited, and position must mean the same in both of a pair:
    they should have as many tokens. Where the readings hold no value (tokens behind the clean run,
    tokens its probe did not select) nothing is edited; ``run`` and ``sweep`` warn of tokens of a
    prompt that are edited and lie behind the text of the readings.

    Args:
        readings: what a ``Probe`` read in the clean run, of as many prompts in the same
            order; of all latents of the edit, in any order, and of others if you like.

    Raises:
        LatentError: for readings that were reduced, or hold values that are not finite.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> some = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post").latents({1: [3, 4]})
        >>> clean = sf.run(model, ["how do i bake bread"], sf.Probe(some)).readings[0]
        >>> out = sf.run(model, ["how do i bake bread"], sf.Ablate(some, to=sf.values.Patch(clean)))
        >>> out.receipt.rows[0].tokens
        6
    """

    readings: Readings

    numbered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_readings("Patch", self.readings)

    def check(self, function: str, parameter: str, latents: Latents) -> None:
        columns_of(self.readings, latents, f"{function}, {parameter}=Patch")

    def prompts(self) -> int:
        return self.readings.values.shape[0]

    def plain(self, latents: Latents, span: slice, rows: slice | Tensor) -> Pinned:
        index = columns_of(self.readings, latents, "Patch")[span]
        values, known = (t[rows][..., index] for t in (self.readings.values, self.readings.mask))
        assert self.readings.starts is not None
        return Pinned(
            values=torch.where(known, values, 0.0),  # [b, s, k]
            known=known,
            starts=self.readings.starts[rows, None].clone(),  # [b, 1]
        )
