"""Probe: read latents while the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from ..dictionaries.latents import Latents, as_latents
from ..errors import LatentError
from ..text.tokens import Tokens
from .base import Step


@final
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Probe(Step):
    """Read latents' activations; nothing is changed.

    In a chain it reads what the steps before it left. Only the selected latents are computed, and
    only they are returned.

    Args:
        latents: ``Latents``, or a dictionary (all its latents).
        where: which tokens count; every real token by default. Values at other tokens are
            returned too, with a false mask.
        reduce: ``"max"``, ``"mean"`` or ``"last"`` over the selected tokens, prompt by prompt,
            while the model runs; readings then have one token, and memory does not grow with them.

    Raises:
        LatentError: for an empty selection or an unknown reduction.

    Examples:
        >>> sf.Probe(sf.Direction(torch.ones(8), site="resid_post.1"))
        Probe(Latents(1: resid_post.1 [0]))
    """

    where: Tokens | None
    reduce: str | None

    def __init__(
        self, latents: Latents | Any, *, where: Tokens | None = None, reduce: str | None = None
    ) -> None:
        if reduce not in (None, "max", "mean", "last"):
            raise LatentError(
                f'Probe: `reduce` is {reduce!r}, wanted "max", "mean", "last" or None. Try:'
                ' Probe(latents, reduce="max")'
            )
        object.__setattr__(self, "latents", as_latents(latents, "Probe"))
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "reduce", reduce)

    @property
    def change(self) -> None:
        return None

    @property
    def rule(self) -> Tokens | None:
        return self.where

    @property
    def reduction(self) -> str | None:
        return self.reduce

    def __repr__(self) -> str:
        where = "" if self.where is None else f", where={self.where!r}"
        reduce = "" if self.reduce is None else f", reduce={self.reduce!r}"
        return f"Probe({self.latents!r}{where}{reduce})"
