"""Dictionaries that read at several sites, or write at several.

Values of earlier read sites wait for the last one, where the latents are encoded of all of them
side by side. A change is written at every write site; the first write makes the record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .edit import Acted, Write
from .frozen import Frozen
from .read import Norm, Source, lift
from .state import Log, State

if TYPE_CHECKING:
    from jaxtyping import Float


class Gather(Frozen):
    """Hold an earlier read site's value until the last one is reached."""

    key: str  # by which it is found there
    norm: Norm  # the site's
    plus: str | None  # the block whose input is added to the value

    def apply(self, x: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        state.stash[self.key] = lift(state.whole(x, self.plus), self.norm)
        return x


class Gathered(Source):
    """Latents of several sites' values, of which this is the last."""

    keys: tuple[str, ...]  # of the others, in order

    def latents(
        self, x: Float[Tensor, "b t d"], state: State
    ) -> tuple[Float[Tensor, "b t k"], Float[Tensor, "b t _"] | None]:
        """Their activations, and the scale of their directions."""
        earlier = [state.stash[key].to(x.device) for key in self.keys]
        own = lift(state.whole(x, self.plus), self.norm)
        value = torch.cat([*(part.to(own.dtype) for part in earlier), own], -1)
        return state.placed.at(self.encoder, x).encode(value)


class WriteOn(Write):
    """Add the same change at a further site, along the directions that latents have there."""

    def note(self, log: Log, acted: Acted) -> None:
        """The change is on record; its length is that of all that is written."""
        entry = log.acted[self.number][-1]
        if isinstance(entry, Acted):  # and no counts alone
            here = acted.directions.to(entry.directions.device)
            entry.directions = torch.cat([entry.directions, here], 1)


class Added(Frozen):
    """Add steps to what the pass has at a place, whatever other places were moved before it."""

    step: Tensor  # [b, t, d]

    def apply(self, x: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        return (x.to(self.step.dtype) + self.step.to(x.device)).to(x.dtype)
