"""What a value is at each token, where it is no plain number.

All three look at nothing but the token's place in its row's text, so that a value does not depend
on padding, on the batch, or on how many tokens a pass shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from .frozen import Frozen
from .state import View, require_one_beam
from .tokens import whole_prompt

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

WORD = 0xFFFFFFFF


@runtime_checkable
class ByToken(Protocol):
    """A value that is another at each token."""

    def at(self, view: View, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Its numbers [b, t, k or 1], and where it has any [b, t, k]; None for everywhere."""
        ...


class Scheduled(Frozen):
    """By generated token, the first at step 0; the last value is held on."""

    values: Tensor  # [steps, k or 1]
    prompt: Tensor  # [k or 1], before them

    def at(self, view: View, device: torch.device) -> tuple[Float[Tensor, "b t _"], None]:
        whole_prompt(view)
        step = (view.position - view.lengths).to(device)
        now = self.values[step.clamp(0, len(self.values) - 1)]
        return torch.where(step.unsqueeze(-1) < 0, self.prompt, now), None


class Pinned(Frozen):
    """What another run of the same prompts gave at the same position."""

    values: Tensor  # [b, s, k]
    known: Tensor  # [b, s, k], where it gave anything
    starts: Tensor  # [b, 1], the column of each prompt's first token

    def at(
        self, view: View, device: torch.device
    ) -> tuple[Float[Tensor, "b t k"], Bool[Tensor, "b t k"]]:
        position = view.position.to(device)
        column = position + self.starts
        inside = (position >= 0) & (column >= 0) & (column < self.values.shape[1])
        column = torch.where(inside, column, 0)
        row = torch.arange(len(column), device=column.device)[:, None]
        return self.values[row, column], self.known[row, column] & inside.unsqueeze(-1)


class Drawn(Frozen):
    """Rows drawn from data: the same for a (seed, prompt, position) whenever it is asked."""

    values: Tensor  # [n, k] to draw rows from
    seed: int  # of the draw
    first: int  # the number of the batch's first prompt in the data set

    def at(self, view: View, device: torch.device) -> tuple[Float[Tensor, "b t k"], None]:
        require_one_beam(view.memory, "a Resample")
        position = view.position.to(device)
        prompt = self.first + torch.arange(len(position), device=position.device)[:, None]
        word = mixed(mixed(torch.full_like(prompt, self.seed)) ^ prompt)
        return self.values[mixed(word ^ position) % len(self.values)], None


def mixed(word: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """32 bits stirred so that neighbors are far apart: shifts and odd factors, as hashes do it.

    The factors lie below 2³¹, so that every product fits int64 and is the same on any device.
    """
    word = (word + 0x9E3779B9) & WORD  # or zero would stay zero
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & WORD
    return word ^ (word >> 15)
