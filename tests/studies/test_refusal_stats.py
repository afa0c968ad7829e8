"""Intervals and rank correlation against values computed elsewhere."""

import math

import pytest

from saefeat.studies.refusal.stats import Estimate, bootstrap_mean, spearman, wilson
from saefeat.studies.refusal.tables import cell, render, table


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [  # scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (1, 100, 0.001767, 0.054486),
        (72, 100, 0.62512, 0.798603),
        (126, 126, 0.970414, 1.0),
    ],
)
def test_wilson_gives_the_published_interval(count, n, low, high):
    found = wilson(count, n)
    assert found.value == count / n
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("count", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(count, n):
    with pytest.raises(ValueError, match="0 <= count <= n"):
        wilson(count, n)


def test_bootstrap_is_reproducible_and_brackets_the_mean():
    values = [float(i % 7) for i in range(70)]
    found = bootstrap_mean(values, seed=1)
    assert found == bootstrap_mean(values, seed=1)
    assert found.low < found.value < found.high
    half = 1.96 * 2.0 / math.sqrt(70)  # the standard deviation of 0..6 is 2
    assert found.high - found.value == pytest.approx(half, rel=0.15)


def test_bootstrap_of_one_value_has_no_width_and_of_none_is_refused():
    assert bootstrap_mean([3.0]) == Estimate(3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])


def test_spearman_uses_ranks_and_shares_ties():
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 10000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.948683, abs=1e-6)  # scipy
    assert spearman([3, 1, 2, 2, 9], [1, 2, 5, 4, 4]) == pytest.approx(-0.026316, abs=1e-6)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ValueError, match="as many of each"):
        spearman([1], [1, 2])


def test_tables_are_aligned_and_whole():
    text = render(table("T", "What.", ("name", "n"), [("a", 1), ("long name", 1000)]))
    lines = text.splitlines()
    assert lines[:2] == ["T", "What."]
    assert lines[-2:] == ["a             1", "long name  1000"]
    with pytest.raises(ValueError, match="1 cells in a row of 2"):
        table("T", "What.", ("a", "b"), [("x",)])


@pytest.mark.parametrize(
    ("value", "text"),
    [(Estimate(0.5, 0.25, 0.75), "0.50 [0.25, 0.75]"), (True, "yes"), (None, "-"), (0.5, "0.500")],
)
def test_cells(value, text):
    assert cell(value) == text
