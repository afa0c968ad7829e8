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

from ..dictionaries.latents import Latents, as_latents
from ..errors import LatentError, PromptError
from ..text.prompts import Prompts
from ..values.base import Value
from ..verbs.base import Intervention, per_latent

Alignment = str | Sequence[Sequence[int | None]] | None


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
        return (
            len(self.values) if isinstance(self.values, Tensor) and self.values.ndim == 2 else None
        )

    def _places(self, dictionary: Any) -> dict[int, int]:
        """A dictionary's latents → their columns in the values."""
        places, start = {}, 0
        for basis, indices in self.latents.parts:
            if basis is dictionary:
                places |= {index: start + n for n, index in enumerate(indices)}
            start += len(indices)
        return places

    def of(self, dictionary: Any, indices: Sequence[int], prompt: Tensor) -> Tensor:
        """[1 or n, k]: the values of a dictionary's latents, for n tokens of these prompts."""
        place = self._places(dictionary)
        missing = [index for index in indices if index not in place]
        if missing:
            got = f"without a value for latent {missing[0]} at {dictionary.site}" + (
                f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            )
            raise LatentError(
                f"Attribute: `baseline` is {got}, wanted a value for every watched latent. Likely"
                " cause: values of another selection, or of a dictionary loaded again. Try:"
                " Fixed(saes.latents(), readings.mean()), from the same saes"
            )
        columns = torch.tensor([place[index] for index in indices])
        if not isinstance(self.values, Tensor):
            return torch.full((1, len(indices)), float(self.values))
        if self.values.ndim == 1:
            return self.values[columns][None]
        return self.values[prompt.cpu()[:, None], columns[None]]

    def __repr__(self) -> str:
        shown = self.values
        if isinstance(shown, Tensor):
            shown = f"{list(shown.shape)} values"
        return f"Fixed({self.latents!r}, {shown})"


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
        shown = f"{self.prompts!r:.60}" + ("..." if len(repr(self.prompts)) > 60 else "")
        align = "" if self.align is None else f", align={self.align!r}"
        return f"Paired({shown}{align})"


Baseline = Intervention | Fixed | Paired | None


def counterparts(
    align: Alignment, lengths: Sequence[int], others: Sequence[int], start: int
) -> tuple[list[list[int]], list[list[bool]]]:
    """For each token of each prompt its counterpart's position, −1 where there is none.

    The second result says which tokens were given None on purpose. ``start`` numbers the prompts
    in messages.

    Raises:
        PromptError: naming the first pair that does not fit.
    """
    positions: list[list[int]] = []
    free: list[list[bool]] = []
    for n, (length, other) in enumerate(zip(lengths, others, strict=True)):
        if align == "end":
            row: list[int | None] = [p if p >= 0 else -1 for p in range(other - length, other)]
        elif align is None:
            _require(length == other, start + n, length, other, "as many tokens in both")
            row = list(range(length))
        else:
            given: Any = align[start + n]
            row = list(given)
            fits = len(row) == length and all(p is None or 0 <= p < other for p in row)
            _require(fits, start + n, length, other, f"a map of {length} positions below {other}")
        positions.append([-1 if p is None else p for p in row])
        free.append([p is None for p in row])
    return positions, free


def require_pairs(baseline: Paired, prompts: int, others: int) -> None:
    """Refuse pairs that are not pairs.

    Raises:
        PromptError: for another number of prompts or maps, or an unknown rule.
    """
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


def _require(fits: bool, number: int, length: int, other: int, wanted: str) -> None:
    if fits:
        return
    raise PromptError(
        f"Paired: `align` is not an alignment of pair {number}: {length} tokens, and {other} in its"
        f" baseline, wanted {wanted}. Likely cause: two prompts that are tokenized into different"
        ' numbers of tokens. Try: Paired(prompts, align="end"), or a map of positions for each'
        " prompt"
    )
