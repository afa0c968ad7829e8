"""The plain settings of an attribution, which ``Attribute`` makes and every part of it takes."""

from __future__ import annotations

from typing import NamedTuple

from ..dictionaries.latents import Latents
from ..metrics.base import Metric
from ..text.tokens import Tokens
from .backward import Backward
from .baselines import Baseline
from .methods import Method


class Job(NamedTuple):
    """The fields of an ``Attribute``, which documents them, with its target as latents."""

    target: Latents
    metric: Metric
    baseline: Baseline
    method: Method
    where: Tokens | None
    semantics: str
    one_site: bool
    backward: Backward | None
    keep: int | None

    @property
    def at_clean_alone(self) -> bool:
        """Whether the one gradient taken is that of the clean run."""
        return [alpha for alpha, _ in self.method.nodes()] == [0.0]
