"""Adaptive nodes: each prompt's path is cut where its slope varies, until it varies no more.

A panel of seven nodes is integrated twice, by Kronrod's rule on all of them and by Gauss's on
three. The difference, token by token, is taken for the panel's error: it is that of the worse rule.
Each prompt has panels of its own, so that what is computed of it does not depend on its batch. The
panel with the largest error is cut in two until the errors add up to less than the tolerance, and
the slopes to the metric's change where that is known, or until the prompt's nodes are spent.
Gradients of a panel are kept until it is cut, or added up once it is so good that it never will be.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .convergence import held_against
from .path import Path, gradients
from .quadrature import FIRST, POINTS
from .trail import Settled, along

Cut = tuple[int, float, float]
"""A panel that is to be integrated: the prompt's row, where it starts and how wide it is."""


class Goal(NamedTuple):
    """The share of the metric's change that the error may have, the most nodes a prompt, and
    whether the slopes are known to add up to that change.
    """

    tolerance: float
    most: int
    known: bool


class Panel(NamedTuple):
    """One prompt's integral over a panel of its path, or over several.

    ``sums`` [t, d] a place are those of the gradients; ``lost`` and ``total`` [places] are of the
    slope along the way, and ``reach`` is how far the metric was from its clean value.
    """

    start: float
    width: float
    sums: dict[int, Tensor]
    lost: Tensor
    total: Tensor
    reach: Tensor


def together(panels: Sequence[Panel]) -> Panel:
    """Panels as one."""
    return reduce(_plus, panels)


def _plus(one: Panel, other: Panel) -> Panel:
    sums = {number: value + other.sums[number] for number, value in one.sums.items()}
    added = (one.lost + other.lost, one.total + other.total)
    return Panel(
        one.start, one.width + other.width, sums, *added, torch.maximum(one.reach, other.reach)
    )


class Row:
    """One prompt under way: the panels that may still be cut, and the sum of the others."""

    def __init__(self, number: int, change: Tensor, goal: Goal) -> None:
        self._number, self._change, self._goal = number, change, goal
        self._open: list[Panel] = []
        self._done: list[Panel] = []  # one at most
        self.nodes, self._reach = 0, torch.zeros_like(change)

    @property
    def whole(self) -> Panel:
        """All panels as one."""
        return together([*self._done, *self._open])

    @property
    def _limit(self) -> float:
        return self._goal.tolerance * float(held_against(self._change, self._reach))

    def add(self, panel: Panel) -> None:
        """Take a panel."""
        self.nodes += len(POINTS)
        self._reach = torch.maximum(self._reach, panel.reach)
        good = float(panel.lost.max()) <= self._limit * panel.width / 2
        if good and not self._goal.known:  # a known gap may be anywhere
            self._done = [together([*self._done, panel])]
        else:
            self._open.append(panel)

    def cut(self) -> list[Cut]:
        """The halves of the worst panel; none once the error is small, or the nodes are spent."""
        panels = [*self._done, *self._open]
        error = torch.stack([panel.lost for panel in panels]).sum(0)
        if self._goal.known:
            error = error.maximum(
                (torch.stack([p.total for p in panels]).sum(0) - self._change).abs()
            )
        enough = float(error.max()) <= self._limit
        if enough or not self._open or self.nodes + 2 * len(POINTS) > self._goal.most:
            return []
        worst = max(self._open, key=lambda panel: float(panel.lost.max()))
        self._open.remove(worst)
        half = worst.width / 2
        return [(self._number, worst.start, half), (self._number, worst.start + half, half)]


def adapted(
    path: Path, group: Sequence[int], change: Tensor, goal: Goal
) -> tuple[dict[int, Tensor], dict[int, Settled]]:
    """Mean gradients at the places of one path, and what their nodes say, for every prompt.

    ``change`` [b] is the metric's from the path's start to its end.
    """
    rows = [Row(n, one, goal) for n, one in enumerate(change)]
    cuts: list[Cut] = [(n, *panel) for n in range(len(rows)) for panel in FIRST]
    while cuts:
        for (number, _, _), panel in zip(cuts, integrated(path, group, cuts), strict=True):
            rows[number].add(panel)
        cuts = [cut for row in rows for cut in row.cut()]
    found = [row.whole for row in rows]
    slopes = {n: torch.stack([panel.sums[n] for panel in found]) for n in group}
    nodes = torch.tensor([row.nodes for row in rows])
    reach = torch.stack([panel.reach for panel in found])
    lost, total = (torch.stack([getattr(p, of) for p in found], 1) for of in ("lost", "total"))
    return slopes, {
        n: Settled(nodes, lost[place], total[place], reach) for place, n in enumerate(group)
    }


class Nodes(NamedTuple):
    """The nodes [m] of some panels: the panel of each, its prompt's row, and where it lies; and
    [2, m] Kronrod's weights, and how much Gauss's are less than these.
    """

    panel: Tensor
    row: Tensor
    share: Tensor
    weights: Tensor

    @classmethod
    def of(cls, cuts: Sequence[Cut]) -> Nodes:
        """All nodes of the panels, panel after panel."""
        at, kronrod, gauss = torch.tensor(POINTS, dtype=torch.float64).T
        row, start, width = (x[:, None] for x in torch.tensor(cuts, dtype=torch.float64).T)
        weights = torch.stack([width * kronrod, width * (kronrod - gauss)]).flatten(1)
        every = torch.arange(len(cuts)).repeat_interleave(len(at))
        return cls(every, row.long().flatten()[every], (start + width * at).flatten(), weights)

    def at(self, some: slice) -> Nodes:
        """Some of them."""
        return Nodes(self.panel[some], self.row[some], self.share[some], self.weights[:, some])


class Sums:
    """Panels' integrals at one place, as they grow: gradients [p, t, d], the slope along the way
    [p, t], and its error.
    """

    def __init__(self, panels: int, start: Tensor, end: Tensor) -> None:
        self._panels, self._start, self._end = panels, start, end
        self.gradients: Tensor | None = None
        self.along = torch.zeros(2, panels, start.shape[1], dtype=torch.float64)

    def add(self, nodes: Nodes, slope: Tensor) -> None:
        """Add the nodes of a pass, whose gradients are [m, t, d]."""
        slope = slope.to(torch.promote_types(slope.dtype, torch.float32))
        if self.gradients is None:
            self.gradients = slope.new_zeros(self._panels, *slope.shape[1:])
        weight = nodes.weights[0].to(slope).view(-1, *[1] * (slope.ndim - 1))
        self.gradients.index_add_(0, nodes.panel.to(slope.device), slope * weight)
        ends = (x[nodes.row.to(x.device)] for x in (self._start, self._end))
        seen = along(slope, *ends).double().cpu()
        self.along.index_add_(1, nodes.panel, nodes.weights[..., None] * seen)


def integrated(path: Path, group: Sequence[int], cuts: Sequence[Cut]) -> list[Panel]:
    """The integrals over panels; as many nodes share a pass as with any other method."""
    nodes, size = Nodes.of(cuts), path.copies * len(path.batch.numbers)
    clean = path.metric(path.clean, path.batch).detach().double().cpu()
    reach = torch.zeros(len(cuts), dtype=torch.float64)
    sums = {n: Sums(len(cuts), path.clean.values[n], path.ends[n]) for n in group}
    for first in range(0, len(nodes.row), size):
        some = nodes.at(slice(first, first + size))
        values, slopes = gradients(path, group, some.row, some.share)
        away = (values.double().cpu() - clean[some.row]).abs()
        reach.scatter_reduce_(0, some.panel, away, "amax")
        for number, slope in slopes.items():
            sums[number].add(some, slope)
    rows = [row for row, _, _ in cuts]
    total = torch.stack([sums[n].along[0].sum(1) for n in group], 1)
    chosen = [path.chosen(n).cpu()[rows] for n in group]
    errors = [(sums[n].along[1] * mask).abs().sum(1) for n, mask in zip(group, chosen, strict=True)]
    lost = torch.stack(errors, 1)
    whole = {n: one.gradients for n, one in sums.items() if one.gradients is not None}
    return [
        Panel(
            start, width, {n: x[i].clone() for n, x in whole.items()}, lost[i], total[i], reach[i]
        )
        for i, (_, start, width) in enumerate(cuts)
    ]
