"""Intervals and rank correlation: what a number from a small sample is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(count: int, n: int) -> Estimate:
    """A rate with its 95 % Wilson score interval, which stays in [0, 1] and is honest at 0 and n.

    Args:
        count: how many of the n had the property.
        n: how many were looked at.

    Raises:
        ValueError: unless 0 <= count <= n and n > 0.
    """
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"wilson: {count} of {n}; wanted 0 <= count <= n and n > 0")
    interval = stats.binomtest(count, n).proportion_ci(method="wilson")
    return Estimate(count / n, float(interval.low), float(interval.high))


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, draws: int = 2000) -> Estimate:
    """The mean with a percentile bootstrap interval over the values, which are independent.

    Raises:
        ValueError: for no values.
    """
    sample = np.asarray(values, dtype=float)
    if sample.size == 0:
        raise ValueError("bootstrap_mean: no values")
    mean = float(sample.mean())
    if sample.size == 1:  # scipy asks for two
        return Estimate(mean, mean, mean)
    resampled = stats.bootstrap(
        (sample,), np.mean, n_resamples=draws, method="percentile", rng=seed, vectorized=True
    )
    interval = resampled.confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; nan where one side does not vary.

    Raises:
        ValueError: for lists of different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"spearman: {len(a)} and {len(b)} values; wanted as many of each")
    if len(set(a)) < 2 or len(set(b)) < 2:  # scipy warns
        return math.nan
    result: Any = stats.spearmanr(a, b)
    return float(result.statistic)
