"""Readings: the activations that a probe read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..arguments import checked
from .formats import frame
from .outliers import few_hold_much
from .result import Result

if TYPE_CHECKING:
    import pandas

    from ..dictionaries.latents import Latents


@checked
@dataclass(frozen=True, repr=False)
class Readings(Result):
    """Activations that a ``Probe`` read.

    Attributes:
        latents: what was read; the last dimension follows its order.
        values: [prompts, tokens, k], float32 or wider. Prompts end in the same column, generated
            tokens follow; a generated token appears once it has been fed back, so the very last
            one has no column. Unselected tokens hold values too: see ``kept``.
        mask: [prompts, tokens, k], true where the token is real and selected.
        starts: [prompts], the column of each prompt's first token, so that a token's position
            is its column less this; None for a reduced reading, whose columns are no tokens.
        counts: [prompts, 1, k], how many tokens each mean is over; None unless the probe reduced
            to means.

    Examples:
        >>> latents = sf.Direction(torch.ones(2), site="resid_post.0").latents()
        >>> values = torch.tensor([[[1.0], [3.0]]])
        >>> sf.results.Readings(latents, values, torch.tensor([[[True], [True]]])).mean()
        tensor([2.])
    """

    latents: Latents
    values: Tensor
    mask: Tensor
    starts: Tensor | None = None
    counts: Tensor | None = None

    def __repr__(self) -> str:
        read = self.mask.any(-1)
        what = "tokens read" if self.starts is not None else "prompts read, reduced"
        line = f"Readings({self.latents!r:.200}; {int(read.sum())} {what}"
        line += f" of {len(self.values)} prompts; values {list(self.values.shape)}"
        if not bool(self.mask.any()):
            return f"{line})"
        found = self.values[self.mask]
        line += f", mean {float(found.mean()):.4g}, largest {float(found.max()):.4g}"
        firsts, share = int(self._firsts().any(-1).sum()), self.first_share
        if few_hold_much(firsts, int(read.sum()), share):
            line += f", {share:.0%} of Σ|value| at prompts' first tokens"
        return f"{line})"

    @property
    def first_share(self) -> float:
        """The share of Σ|value| that lies at prompts' first tokens; NaN for a reduced reading.

        In many models that token is an outlier, on which latents are as large as nowhere else, and
        which then makes means: read with ``where=~Tokens.first(1)``.
        """
        if self.starts is None:
            return math.nan
        size = torch.where(self.mask, self.values.abs().double(), 0.0)
        total = float(size.sum())
        return float(size[self._firsts()].sum()) / total if total else 0.0

    def _firsts(self) -> Tensor:
        """[prompts, tokens, k]: the mask at prompts' first tokens alone."""
        if self.starts is None:
            return torch.zeros_like(self.mask)
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        return self.mask & (columns == self.starts[:, None])[..., None]

    def kept(self) -> Tensor:
        """[prompts, tokens, k]: the values, NaN where a token is padding or not selected."""
        return torch.where(self.mask, self.values, torch.nan)

    def mean(self) -> Tensor:
        """[k]: the mean over every selected token of every prompt; NaN where there is none.

        A reduced mean counts with its tokens, so this is the same with or without
        ``reduce="mean"``. After ``"max"`` or ``"last"`` it is the mean over prompts.
        """
        weights = self.mask if self.counts is None else self.counts
        kept = torch.where(self.mask, self.values * weights, 0.0).sum((0, 1))
        return kept / weights.sum((0, 1))

    def max(self) -> Tensor:
        """[prompts, k]: the largest value over each prompt's selected tokens, NaN without any."""
        largest = torch.where(self.mask, self.values, -torch.inf).amax(1)
        return torch.where(self.mask.any(1), largest, torch.nan)

    def last(self) -> Tensor:
        """[prompts, k]: the value at each prompt's last selected token, NaN without any."""
        tokens = torch.arange(self.mask.shape[1], device=self.mask.device)[None, :, None]
        place = torch.where(self.mask, tokens, 0).amax(1, keepdim=True)  # [prompts, 1, k]
        values = self.values.gather(1, place).squeeze(1)
        return torch.where(self.mask.any(1), values, torch.nan)

    def active(self) -> Tensor:
        """[k]: the share of selected tokens at which the latent is above zero.

        Of a reduced reading it is the share of prompts.
        """
        hits = (self.mask & (self.values > 0)).sum((0, 1))
        return hits / self.mask.sum((0, 1)).clamp(min=1)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a kept value: prompt, column (as in ``values``), site, latent and value.

        Raises:
            SaefeatError: without pandas.
        """
        prompt, column, place = self.mask.nonzero(as_tuple=True)
        names = list(self.latents)
        table = {
            "prompt": prompt.numpy(),
            "column": column.numpy(),
            "site": [str(names[n][0]) for n in place.tolist()],
            "latent": [names[n][1] for n in place.tolist()],
            "value": self.values[self.mask].numpy(),
        }
        return frame(table, "Readings.to_pandas")


def join_time(pieces: list[Tensor]) -> Tensor:
    """Forward passes side by side on dimension 1."""
    return torch.cat(pieces, dim=1)


def stack_readings(batches: list[Readings], widths: list[int]) -> Readings:
    """The same probe's readings over several batches, prompts ending in the same column.

    ``widths`` are the batches' prompt columns: what is missing of a prompt goes to its left, and
    what a batch generated less than another to its right.
    """
    if batches[0].values.shape[1] == 1 and all(b.values.shape[1] == 1 for b in batches):
        widths = [1] * len(batches)  # one column a prompt, prompt or not
    width = max(widths)
    new = max(b.values.shape[1] - w for b, w in zip(batches, widths, strict=True))
    sides = [
        (width - w, new - (b.values.shape[1] - w)) for b, w in zip(batches, widths, strict=True)
    ]
    pairs = list(zip(batches, sides, strict=True))
    values = [pad(b.values, (0, 0, *side)) for b, side in pairs]  # zeros in columns that are not
    masks = [pad(b.mask, (0, 0, *side)) for b, side in pairs]
    starts = [b.starts + left for b, (left, _) in pairs if b.starts is not None]
    joined = torch.cat(starts) if len(starts) == len(batches) else None
    counts = [b.counts for b in batches if b.counts is not None]
    totals = torch.cat(counts) if counts else None
    return Readings(batches[0].latents, torch.cat(values), torch.cat(masks), joined, totals)
