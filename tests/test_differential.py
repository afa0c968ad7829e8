"""Random cases against plain hooks without a cache; see ``differential``.

pytest tests/test_differential.py --cases 5000 --first-seed 0     # thousands, -n 2 for two cores
pytest tests/test_differential.py --cases 1 --first-seed 1234     # one case again
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import saefeat as sf
from differential import cases
from differential.asked import asked_of
from differential.cases import Case
from differential.compare import judge
from differential.draw import case_of
from differential.scored import judge_scores
from differential.shrink import shrunk
from saefeat.kernel import encode, program, read, state
from saefeat.running import hooks

SHARES = 20
"""Test items that the cases are dealt out to, so that workers can share them."""

MOST = 150
"""Cases within which a break is found."""


def differs(case: Case) -> bool:
    return judge(case).kind == "different"


def report(seed: int, case: Case, told: str) -> str:
    small = shrunk(case, differs)
    return (
        f"seed {seed}: {told}\n  smallest: judge({small!r})\n  which says: {judge(small).told}\n"
        f"  again: pytest tests/test_differential.py -k test_cases --cases 1 --first-seed {seed}"
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


@pytest.mark.parametrize("share", range(6))
def test_scores(share, pytestconfig):
    """AtP and integrated gradients are slopes of a forward pass in float64, prompt by prompt."""
    count, first = pytestconfig.getoption("cases"), pytestconfig.getoption("first_seed")
    seeds = range(first + share, first + max(1, 3 * count // 20), 6)
    found = {seed: judge_scores(asked_of(seed)) for seed in seeds}
    wrong = {seed: v.told for seed, v in found.items() if v.kind == "different"}
    lines = [f"judge_scores({asked_of(seed)!r}), of seed {seed}: {wrong[seed]}" for seed in wrong]
    assert not wrong, "\n".join(lines)
    refused = [verdict for verdict in found.values() if verdict.kind == "refused"]
    assert len(refused) <= 2 + len(seeds) // 4, refused


# ---------------------------------------------------------------- that it can fail


def _positions_of_columns(patch) -> None:
    """Positions counted from a row's padding on: those of a batch that has none."""

    def shifted(*arguments):
        view = state.window(*arguments)
        columns = torch.arange(view.shown.shape[1]) + view.memory.seen - view.shown.shape[1]
        return view.replace(position=columns.expand_as(view.shown))

    patch.setattr(program, "window", shifted)
    patch.setattr(hooks, "window", shifted)


def _conditions_held_over(patch) -> None:
    """What was held of one text is still held in the next."""
    apply, kept = read.Test.apply, {}

    def applied(self, x, now):
        if self.hold and self.name in kept and len(kept[self.name]) == len(x):
            now.view.memory.kept.setdefault(self.name, kept[self.name])
        view, now.view = now.view, now.view.replace(whole=False)
        apply(self, x, now)
        now.view, kept[self.name] = view, view.memory.kept.get(self.name)
        return x

    patch.setattr(read.Test, "apply", applied)


def _neighbors_rows(patch) -> None:
    """Directions are those of the latent before."""
    columns = sf.SAE.columns

    def rolled(self, indices):
        found = columns(self, indices)
        return found | {"directions": found["directions"].roll(1, 0)}

    patch.setattr(sf.SAE, "columns", rolled)


def _scale_forgotten(patch) -> None:
    """What a normed SAE writes is not scaled back."""
    normalize = encode.LayerNorm.normalize

    def unscaled(self, x):
        return normalize(self, x)[0], torch.ones_like(x[..., :1])

    patch.setattr(encode.LayerNorm, "normalize", unscaled)


BREAKS = {
    "positions of columns": _positions_of_columns,
    "conditions held over": _conditions_held_over,
    "neighbors' rows": _neighbors_rows,
    "scale forgotten": _scale_forgotten,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_found_and_shrunk(name, monkeypatch):
    """Broken by hand, saefeat differs within some cases, and the smallest is a line or two."""
    BREAKS[name](monkeypatch)
    case = next((case for case in map(case_of, range(MOST)) if differs(case)), None)
    assert case is not None, f"{MOST} cases without a difference"
    small = shrunk(case, differs, tries=60)
    assert differs(small) and len(small.steps) <= 2 and len(small.prompts) <= 2, small
    assert eval(repr(small), vars(cases)) == small  # what is printed can be pasted
