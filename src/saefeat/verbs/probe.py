"""Probe: read latents while the model runs."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import final

from ..arguments import checked
from ..checks import one_of
from ..errors import LatentError
from ..text.tokens import Tokens
from .base import Step

REDUCTIONS = (None, "max", "mean", "last")


@checked(error=LatentError)
@final
@dataclass(frozen=True, repr=False, eq=False)
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

    _: KW_ONLY
    where: Tokens | None = None
    reduce: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("Probe", "reduce", self.reduce, REDUCTIONS, error=LatentError)

    @property
    def change(self) -> None:
        return None

    @property
    def rule(self) -> Tokens | None:
        return self.where

    @property
    def reduction(self) -> str | None:
        return self.reduce
