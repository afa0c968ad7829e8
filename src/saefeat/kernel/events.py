"""Where an edit acted in one forward pass, as plain columns.

They are worked out once the run is over: on a server before its log leaves, here when a receipt is
made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .view import View

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class Acted:
    """What an edit did in one pass, by reference: counting and norms wait until the run is over.

    Attributes:
        step: [b, t, k], how the edited latents changed.
        mask: [b, t, 1], at which tokens.
        before: [b, t, k], what they were.
        written: [b, t, n], the steps of all latents that were written: a topk may reselect.
        directions: [n, d_out].
        scale: of the directions.
        rows: how many rows the pass had.
        begins: whether it was a sequence's first.
    """

    def __init__(
        self,
        steps: tuple[Tensor, Tensor, Tensor],
        mask: Tensor,
        directions: Tensor,
        scale: Tensor | None,
        view: View,
    ) -> None:
        self.before, self.step, self.written = (f.detach() for f in steps)
        self.mask, self.directions, self.scale = mask, directions, scale
        self.ids, self.position, self.lengths = view.ids, view.position, view.lengths
        self.rows, self.begins = len(mask), view.begins

    def counts(self) -> Tensor:
        """[3]: see ``counted``."""
        return counted(self.step, self.mask)

    def changes(self) -> dict[str, Tensor]:
        """A tensor [m] a column, one row a changed (token, latent) pair.

        ``row`` is the row of the batch, ``latent`` the latent's place in the selection; the others
        are as ``saefeat.results.receipt`` documents them.
        """
        change = torch.where(self.mask, self.step, 0.0)
        row, column, latent = (change != 0).nonzero(as_tuple=True)
        token = (change != 0).any(-1)  # [b, t]
        written = torch.where(self.mask, self.written, 0.0)
        delta = written[token] @ self.directions.to(change.device)  # [tokens, d_out]
        if self.scale is not None:
            delta = delta * self.scale[token]
        norm = torch.zeros_like(change[..., 0]).masked_scatter(token, delta.norm(dim=-1))
        before = self.before[row, column, latent]
        after = before + change[row, column, latent]
        columns = {"row": row, "latent": latent, "before": before, "after": after}
        columns = {n: v.cpu() for n, v in (columns | {"norm": norm[row, column]}).items()}
        place = (columns["row"], column.cpu())
        position, lengths = self.position.cpu()[place], self.lengths.cpu()[columns["row"], 0]
        step = torch.where(position < lengths, -1, position - lengths)
        ids = torch.full_like(position, -1) if self.ids is None else self.ids.cpu()[place]
        return columns | {"position": position, "step": step, "token": ids}


def counted(step: Float[Tensor, "b t k"], mask: Bool[Tensor, "b t 1"]) -> Float[Tensor, "3"]:
    """Tokens selected, (token, latent) pairs changed, largest change of a latent."""
    change = torch.where(mask, step, 0.0)
    counts = torch.stack([mask.sum(), (change != 0).sum()])
    return torch.cat([counts.to(change.dtype), change.abs().amax()[None]])
