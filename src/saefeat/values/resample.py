"""Resample: latents set to what they were at tokens drawn from data."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ..arguments import checked
from ..dictionaries.latents import Latents
from ..errors import LatentError
from ..kernel.values import Drawn
from ..results.readings import Readings
from .base import Value, numbers
from .columns import columns_of, require_readings
from .declared import argument


def _source(given: Readings | Tensor, function: str = "Resample") -> Readings | Tensor:
    if isinstance(given, Tensor):
        dtype = torch.promote_types(given.dtype, torch.float32)
        return numbers(function, "activations", given, (2,)).to(dtype)
    require_readings(function, given)
    return given


@checked(error=LatentError)
@final
@dataclass(frozen=True, repr=False, eq=False)
class Resample(Value):
    """At each token, what the latents were at a token drawn from given activations.

    Resample ablation: what is specific to the prompt goes, what is typical of the data stays. All
    latents of an edit take their values from one drawn token, so that they stay as they occur
    together. The draw is a function of the seed, the prompt's number in the data set and the
    token's position, and of nothing else: batches, padding and caches do not change it.

    Args:
        activations: ``Readings`` of at least the edit's latents, whose selected tokens are drawn
            from, or a tensor [n, k].
        seed: of the draw, 0 ≤ seed < 2³².

    Raises:
        LatentError: for activations without a token, readings that were reduced, or values that are
            not finite.

    Examples:
        >>> v = sf.Direction(torch.ones(8), site="resid_post.1")
        >>> seen = torch.tensor([[0.5], [2.0], [3.5]])
        >>> sf.values.Resample(seen, seed=1) == sf.values.Resample(seen.clone(), seed=1)
        True
        >>> edit = sf.Ablate(v, to=sf.values.Resample(seen, seed=1))
    """

    activations: Readings | Tensor = argument(converter=_source)
    _: KW_ONLY
    seed: int = 0

    numbered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise LatentError(
                f"Resample: `seed` is {self.seed!r}, wanted an integer from 0 to 2³² − 1. Likely"
                " cause: a generator, or a seed of another library. Try: Resample(readings, seed=0)"
            )

    def check(self, function: str, parameter: str, latents: Latents) -> None:
        rows = self._rows(latents)
        if rows.shape[0] == 0 or rows.shape[1] != len(latents):
            raise LatentError(
                f"{function}: `{parameter}` is Resample from {list(rows.shape)}, wanted [n,"
                f" {len(latents)}] with at least one row. Likely cause: activations of another"
                " selection, or no token at which all were read. Try: Resample(run(model, data,"
                " Probe(latents)).readings[0])"
            )

    def _rows(self, latents: Latents) -> Tensor:
        """[n, k]: what is drawn from, the tokens at which all of the latents were selected."""
        if isinstance(self.activations, Tensor):
            return self.activations
        index = columns_of(self.activations, latents, "Resample")
        return self.activations.values[..., index][self.activations.mask[..., index].all(-1)]

    def plain(self, latents: Latents, span: slice, rows: slice | Tensor) -> Drawn:
        values = self._rows(latents)[:, span].clone()
        first = rows.start or 0 if isinstance(rows, slice) else int(rows[0])
        return Drawn(values=values, seed=self.seed, first=first)
