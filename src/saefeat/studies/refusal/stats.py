"""Intervals and rank correlation: what a number from a small sample is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(count: int, n: int, z: float = 1.959963984540054) -> Estimate:
    """A rate with its Wilson score interval, which stays in [0, 1] and is honest at 0 and at n.

    Args:
        count: how many of the n had the property.
        n: how many were looked at.
        z: the normal quantile; the default gives 95 %.

    Raises:
        ValueError: unless 0 <= count <= n and n > 0.
    """
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"wilson: {count} of {n}; wanted 0 <= count <= n and n > 0")
    rate = count / n
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if count == 0 else center - half
    high = 1.0 if count == n else center + half
    return Estimate(rate, low, high)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, draws: int = 2000) -> Estimate:
    """The mean with a percentile bootstrap interval over the values, which are independent.

    Raises:
        ValueError: for no values.
    """
    found = np.asarray(values, dtype=float)
    if found.size == 0:
        raise ValueError("bootstrap_mean: no values")
    rows = np.random.default_rng(seed).integers(0, found.size, (draws, found.size))
    low, high = np.quantile(found[rows].mean(axis=1), (0.025, 0.975))
    return Estimate(float(found.mean()), float(low), float(high))


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0, ties sharing the mean of their places."""
    found = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(found, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts + 1) / 2)[inverse]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; nan where one side does not vary.

    Raises:
        ValueError: for lists of different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"spearman: {len(a)} and {len(b)} values; wanted as many of each")
    first, second = ranks(a), ranks(b)
    if len(a) < 2 or first.std() == 0 or second.std() == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])
