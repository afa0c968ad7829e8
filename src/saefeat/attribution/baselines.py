"""What latents are moved to: fixed values, or what another prompt makes of them.

The other two baselines need no class of their own: None is zero, and an intervention is the same
prompt under it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from ..arguments import checked
from ..dictionaries.given import as_latents
from ..dictionaries.latents import Latents
from ..errors import LatentError, PromptError
from ..files.hashing import digest
from ..metrics.evaluator import Batch
from ..text.prompts import Prompts
from ..values.base import Value
from ..values.declared import show
from ..verbs.base import Intervention, per_latent

Alignment = str | Sequence[Sequence[int | None]] | None


@checked(error=LatentError, own=("values",))
@final
@dataclass(frozen=True, init=False, eq=False)
class Fixed:
    """Baseline: latents at fixed values, such as their means over a data set.

    Like the zero baseline it moves the watched latents where they are scored, and leaves the
    error term and other tokens as they are: x_base = x + (values − f) · directions, site by site.

    Args:
        latents: ``Latents``, or a dictionary (all its latents); every watched latent must be there.
        values: a number, one a latent [k], or one a prompt and latent [prompts, k], finite;
            ``readings.mean()`` of a ``Probe`` for the mean.

    Raises:
        LatentError: for values that do not fit; when attributing, for watched latents without one.

    Examples:
        >>> sf.attribution.Fixed(sf.Direction(torch.ones(8), site="resid_post.1"), 2.0)
        Fixed(Latents(1: resid_post.1 [0]), 2.0)
    """

    latents: Latents
    values: Any

    def __init__(self, latents: Any, values: float | Tensor) -> None:
        chosen = as_latents(latents, "Fixed")
        checked = per_latent("Fixed", "values", values, chosen)
        if checked is None or isinstance(checked, Value):
            raise LatentError(
                f"Fixed: `values` is {values!r}, wanted a number, [{len(chosen)}] or [prompts,"
                f" {len(chosen)}] values. Likely cause: a Schedule, Patch or Resample, which differ"
                " by step or position. Try: Fixed(latents, readings.mean())"
            )
        object.__setattr__(self, "latents", chosen)
        object.__setattr__(self, "values", checked)

    @property
    def prompts(self) -> int | None:
        """How many prompts the values are for; None if they fit any."""
        by_prompt = isinstance(self.values, Tensor) and self.values.ndim == 2
        return len(self.values) if by_prompt else None

    def of(self, dictionary: Any, indices: Sequence[int], prompt: Tensor) -> Tensor:
        """[1 or n, k]: the values of a dictionary's latents, for n tokens of these prompts."""
        place, start = {}, 0  # the dictionary's latents → their columns in the values
        for basis, own in self.latents.parts:
            if basis is dictionary:
                place |= {index: start + n for n, index in enumerate(own)}
            start += len(own)
        missing = [index for index in indices if index not in place]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise LatentError(
                f"Attribute: `baseline` is without a value for latent {missing[0]} at"
                f" {dictionary.site}{more}, wanted one for every watched latent. Likely cause:"
                " another selection, or a dictionary loaded again. Try: Fixed(saes.latents(),"
                " readings.mean()), from the same saes"
            )
        columns = torch.tensor([place[index] for index in indices])
        if not isinstance(self.values, Tensor):
            return torch.full((1, len(indices)), float(self.values), dtype=torch.float32)
        if self.values.ndim == 1:
            return self.values[columns][None]
        return self.values[prompt.cpu()[:, None], columns[None]]

    def __repr__(self) -> str:
        return f"Fixed({self.latents!r}, {show(self.values)})"


@checked
@final
@dataclass(frozen=True)
class Paired:
    """Baseline: another prompt for each prompt, as in clean and corrupt pairs.

    Where a pair has as many tokens, position meets position. Otherwise say which meets which, as
    nothing can be guessed. At tokens without a counterpart the model is left as it is.

    Args:
        prompts: one for each prompt attributed, in order, in any form that ``run`` takes.
        align: ``"end"``: the last tokens meet, and so on backward. Or for each prompt a list with,
            for each of its tokens, the position of its counterpart, or None for no counterpart;
            such tokens are not scored.

    Raises:
        PromptError: when attributing: another number of prompts, a pair of different lengths
            without ``align``, a scored token for which ``"end"`` finds no counterpart, or a map
            that does not fit.

    Examples:
        >>> sf.attribution.Paired(["the cat sat"], align="end")
        Paired(['the cat sat'], align='end')
    """

    prompts: Prompts
    align: Alignment = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        shown = repr(self.prompts)
        if len(shown) > 60 or isinstance(self.prompts, Tensor):  # cut, by us or as torch prints
            shown = f"{' '.join(shown.split()):.60}... {digest(self.prompts)[:8]}"
        align = "" if self.align is None else f", align={self.align!r}"
        return f"Paired({shown}{align})"


Baseline = Intervention | Fixed | Paired | None


def require_pairs(baseline: Paired, prompts: int, others: int) -> None:
    """Refuse pairs that are not pairs: another number of prompts or maps, or an unknown rule."""
    align = baseline.align
    named = isinstance(align, str)
    maps = prompts if align is None or named else len(align)
    if others == prompts and maps == prompts and (not named or align == "end"):
        return
    got = f"{others} prompts, and " + (repr(align) if named else f"{maps} maps")
    raise PromptError(
        f"Paired: `prompts and align` is {got}, wanted {prompts} of each, as many as are"
        ' attributed, or align="end". Likely cause: one list was filtered and the other not. Try:'
        ' Attribute(..., baseline=Paired(corrupt, align="end"))(model, clean)'
    )


def aligned(
    baseline: Paired,
    batch: Batch,
    other: Batch,
    clean: dict[int, Tensor],
    paired: dict[int, Tensor],
    scored: tuple[Tensor, ...],
) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
    """The paired run's values at this batch's columns, and what can be scored of it.

    Values [b, t, d] a place, ``scored`` [b, t] a part. Where a token has no counterpart the value
    is the clean run's.
    """
    columns, free = _columns(baseline.align, batch, other)
    missing = columns < 0
    for mask in scored:
        lacking = mask & (missing & ~free).to(mask.device)
        if bool(lacking.any()):
            row = int(lacking.any(1).nonzero()[0])
            raise PromptError(
                f"Attribute: `baseline` is without a counterpart for {int(lacking[row].sum())}"
                f" scored tokens of prompt {int(batch.numbers[row])}, wanted one for each. Likely"
                " cause: the paired prompt is shorter. Try: where=Tokens.last(n) for the tokens"
                " they share, or a map with None in align="
            )
    rows = torch.arange(len(columns))[:, None]
    values = {}
    for n, value in clean.items():
        across = paired[n][rows, columns.clamp(min=0)]
        values[n] = torch.where(missing.to(value.device).unsqueeze(-1), value, across)
    return values, tuple(mask & ~free.to(mask.device) for mask in scored)


def _columns(align: Alignment, batch: Batch, other: Batch) -> tuple[Tensor, Tensor]:
    """[b, t]: the other batch's column that meets each column, or −1; and where that was asked for.

    Positions are the prompt's; what continues it meets what continues the other.
    """
    columns = torch.full(batch.inputs["input_ids"].shape, -1, dtype=torch.long)
    free = torch.zeros(columns.shape, dtype=torch.bool)
    sizes = zip(batch.numbers.tolist(), _sizes(batch), _sizes(other), strict=True)
    for n, (number, (length, more, pad), (theirs, _, their_pad)) in enumerate(sizes):
        met = _counterparts(align, number, length, theirs)
        meets = [-1 if position is None else position + their_pad for position in met]
        columns[n, pad : pad + length] = torch.tensor(meets)
        asked = [position is None and align != "end" for position in met]
        free[n, pad : pad + length] = torch.tensor(asked)
        columns[n, pad + length :] = torch.arange(more) + their_pad + theirs
    return columns, free


def _counterparts(align: Alignment, number: int, length: int, other: int) -> list[int | None]:
    """For each token of a prompt the position of its counterpart, None where there is none."""
    if align == "end":
        return [position if position >= 0 else None for position in range(other - length, other)]
    row: list[int | None] = list(range(length))
    fits, wanted = length == other, "as many tokens in both"
    if align is not None:
        given: Any = align[number]
        row, wanted = list(given), f"a map of {length} positions below {other}"
        fits = len(row) == length and all(p is None or 0 <= p < other for p in row)
    if fits:
        return row
    raise PromptError(
        f"Paired: `align` is not an alignment of pair {number}: {length} tokens, and {other} in its"
        f" baseline, wanted {wanted}. Likely cause: two prompts of different numbers of tokens."
        ' Try: Paired(prompts, align="end"), or a map of positions for each prompt'
    )


def _sizes(batch: Batch) -> list[tuple[int, int, int]]:
    """For each row: the prompt's tokens, the continuation's, and pads."""
    mask = batch.inputs["attention_mask"]
    real = mask.sum(1)
    lengths = real if batch.lengths is None else batch.lengths.squeeze(1)
    return torch.stack([lengths, real - lengths, mask.shape[1] - real], 1).tolist()
