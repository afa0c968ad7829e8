"""Probe: read latents while the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from ..latents import Latents, as_latents
from ..tokens import Tokens
from .base import Step


@final
@dataclass(frozen=True, init=False, repr=False)
class Probe(Step):
    """Read latents' activations; nothing is changed.

    In a chain it reads what the steps before it left. Only the selected latents are computed, and
    only they are returned.

    Args:
        latents: ``Latents``, or a dictionary (all its latents).
        where: which tokens count; every real token by default. Values at other tokens are
            returned too, with a false mask.

    Raises:
        LatentError: for an empty selection.

    Example:
        >>> sf.Probe(sf.Direction(torch.ones(8), site="resid_post.1"))
        Probe(Latents(1: resid_post.1 [0]))
    """

    where: Tokens | None

    def __init__(self, latents: Latents | Any, *, where: Tokens | None = None) -> None:
        object.__setattr__(self, "latents", as_latents(latents, "Probe"))
        object.__setattr__(self, "where", where)

    @property
    def change(self) -> None:
        return None

    @property
    def rule(self) -> Tokens | None:
        return self.where

    def __repr__(self) -> str:
        where = "" if self.where is None else f", where={self.where!r}"
        return f"Probe({self.latents!r}{where})"
