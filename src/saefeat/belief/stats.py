"""The statistics of this room: ranks, agreement, resampling, stratified totals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Z = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "an unknown share"
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


class Agreement(NamedTuple):
    """How estimates agree with exact effects.

    ``rank`` is Spearman's correlation. It is helped by signs alone, so ``order`` is the same of
    the sizes, |estimate| and |exact|. ``sign`` is the share of one sign among the pairs in which
    neither is zero; ``slope`` the least-squares factor from estimate to exact effect, through the
    origin. Each is NaN where it is not defined.
    """

    n: int
    rank: float
    order: float
    sign: float
    slope: float


def agreement(estimate: Tensor, exact: Tensor) -> Agreement:
    """Both [n]."""
    x, y = estimate.double(), exact.double()
    signed = (x != 0) & (y != 0)
    same = (x.sign() == y.sign())[signed].double()
    square = float((x * x).sum())
    return Agreement(
        n=len(x),
        rank=spearman(x, y),
        order=spearman(x.abs(), y.abs()),
        sign=float(same.mean()) if len(same) else math.nan,
        slope=float((x * y).sum()) / square if square else math.nan,
    )


def ranks(values: Tensor) -> Tensor:
    """[n] ranks from 1, ties sharing the mean of their places."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two [n]; NaN where one does not vary."""
    if len(a) < 2:
        return math.nan
    x, y = (ranks(v) - ranks(v).mean() for v in (a, b))
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else math.nan


def resample(n: int, samples: int, seed: int) -> Tensor:
    """[samples, n] weights that sum to one: how often each of n is drawn, with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (samples, n), generator=generator)
    counts = torch.zeros(samples, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)) / n


def quantiles(draws: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of a 95 % percentile interval over dimension 0."""
    low, high = torch.quantile(draws.double(), torch.tensor([0.025, 0.975]).double(), dim=0)
    return low, high


def stratified_total(samples: Sequence[Tensor], sizes: Sequence[int]) -> Estimate:
    """The total over a population, from a simple random sample of each of its strata.

    Σ N_h · mean_h, with the variance Σ N_h² (1 − n_h/N_h) s_h²/n_h (Cochran 1977, eq. 5.6). Values
    must not be negative: the interval stops at what was seen.
    """
    total = variance = seen = 0.0
    for values, size in zip(samples, sizes, strict=True):
        n = len(values)
        if n == 0:
            return UNKNOWN
        total += size * float(values.mean())
        seen += float(values.sum())
        if n < size:  # a stratum of which all was seen adds no doubt
            spread = float(values.double().var()) if n > 1 else math.nan
            variance += size**2 * (1 - n / size) * spread / n
    half = Z * math.sqrt(variance) if variance == variance else math.nan
    return Estimate(total, max(seen, total - half), total + half)


def wilson(share: float, n: float) -> Estimate:
    """Wilson's score interval of a share seen among n draws; n need not be whole."""
    center = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return Estimate(share, max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))
