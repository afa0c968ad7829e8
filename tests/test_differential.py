"""Random cases against plain hooks without a cache; see ``differential``.

    pytest tests/test_differential.py --cases 5000 --first-seed 0     # thousands, -n 2 for two cores
    pytest tests/test_differential.py --cases 1 --first-seed 1234     # one case again
"""

from __future__ import annotations

from collections import Counter

import pytest

from differential.cases import *  # noqa: F403 (so that a printed case can be pasted here)
from differential.cases import Case
from differential.compare import judge
from differential.draw import case_of
from differential.shrink import shrunk

SHARES = 20
"""Test items that the cases are dealt out to, so that workers can share them."""


def differs(case: Case) -> bool:
    return judge(case).kind == "different"


def report(seed: int, case: Case, told: str) -> str:
    small = shrunk(case, differs)
    return (
        f"seed {seed}: {told}\n  shrunk: judge({small!r})\n  which says:"
        f" {judge(small).told}\n  again: pytest tests/test_differential.py -k cases --cases 1"
        f" --first-seed {seed}"
    )


@pytest.mark.parametrize("share", range(SHARES))
def test_cases(share, pytestconfig):
    """Every way of running gives what hooks written by hand give, for whatever is asked for."""
    count, first = pytestconfig.getoption("cases"), pytestconfig.getoption("first_seed")
    seeds = range(first + share, first + count, SHARES)
    kinds, failures = Counter(), []
    for seed in seeds:
        case = case_of(seed)
        found = judge(case)
        kinds[found.kind] += 1
        if found.kind == "different":
            failures.append(report(seed, case, found.told))
    assert not failures, "\n".join(failures)
    # a case that is refused, or too near to call, shows nothing
    assert kinds["refused"] + kinds["open"] <= 1 + len(seeds) // 10, kinds
