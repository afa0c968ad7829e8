"""Mean gradients over a path, and whether that mean has settled."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .adaptive import Goal, adapted
from .convergence import TOLERANCE, Convergence, held_against
from .methods import AtP
from .path import Path, gradients, gradients_of
from .trail import Settled, Trail

Gradients = dict[int, Tensor]


def mean_gradients(path: Path) -> tuple[Gradients, Convergence | None]:
    """The metric's gradient at each written place [b, t, d], averaged over the path, and whether
    the average has settled; ``AtP`` takes no average.

    With ``one_site`` each place has a path of its own, on which nothing else is moved.
    """
    written = list(path.passes.written)
    groups = [[number] for number in written] if path.job.one_site else [written]
    tolerance = tolerance_of(path.job.method)
    if tolerance is None:
        total, settled = _at_nodes(path, groups)
        average = not isinstance(path.job.method, AtP)
        return total, _convergence(path, settled, TOLERANCE) if average else None
    goal = Goal(tolerance, getattr(path.job.method, "steps", 0), _known(path))
    total, settled = {}, {}
    for group in groups:
        change = _changes(path)[group[0]]
        found, said = adapted(path, group, change, goal)
        total |= found
        settled |= said
    return total, _convergence(path, settled, tolerance)


def tolerance_of(method: object) -> float | None:
    """The tolerance that a method's nodes adapt to; None if its nodes are given in advance."""
    return getattr(method, "tolerance", None)


def _at_nodes(path: Path, groups: list[list[int]]) -> tuple[Gradients, dict[int, Settled]]:
    """At the method's own nodes."""
    nodes, count = list(path.job.method.nodes()), len(path.batch.numbers)
    ways = {n: (path.clean.values[n], path.ends[n]) for n in path.passes.written}
    total, trail = Gradients(), Trail(ways)
    if nodes[0][0] == 0.0:  # the clean pass is the node at zero, for every site
        _add(total, trail, gradients_of(path, path.clean, path.batch), [nodes.pop(0)[1]])
        path.clean.nodes.clear()  # one graph at a time
    for group in groups:
        for first in range(0, len(nodes), path.copies):
            shares, weights = zip(*nodes[first : first + path.copies], strict=True)
            share = torch.tensor(shares, dtype=torch.float64).repeat_interleave(count)
            rows = torch.arange(count).repeat(len(shares))
            _add(total, trail, gradients(path, group, rows, share), weights)
    clean, rule = _clean(path), getattr(path.job.method, "rule", "")
    about = (path.job.method.nodes(), rule)
    return total, {n: trail.settled(n, *about, path.chosen(n), clean) for n in ways}


def _add(
    total: Gradients, trail: Trail, found: tuple[Tensor, Gradients], weights: tuple | list
) -> None:
    """Add weight · gradient at the nodes of a pass, whose rows are the batch once a weight."""
    values, slopes = found
    for number, every in slopes.items():
        pieces = every.chunk(len(weights))
        trail.add(number, pieces, values.chunk(len(weights)))
        for weight, slope in zip(weights, pieces, strict=True):
            # In bfloat16 a mean of 200 gradients is wrong by several percent.
            part = weight * slope.to(torch.promote_types(slope.dtype, torch.float32))
            total[number] = part if number not in total else total[number].add_(part)


def _clean(path: Path) -> Tensor:
    return path.metric(path.clean, path.batch).detach().double().cpu()


def _changes(path: Path) -> dict[int, Tensor]:
    """[b] a written place: the metric's change on its path."""
    if path.job.one_site:
        return {n: end.double().cpu() - _clean(path) for n, end in path.alone.items()}
    end = path.metric(path.baseline, path.other).detach().double().cpu()
    return dict.fromkeys(path.passes.written, end - _clean(path))


def _known(path: Path) -> bool:
    """Whether slopes add up to the metric's change: one place alone moves on a path, whose end was
    run, and the gradient is the metric's own.
    """
    job = path.job
    alone = job.one_site or (len(path.passes.written) == 1 and path.run is None)
    return alone and job.semantics == "pass_through" and job.backward is None


def _convergence(path: Path, settled: Mapping[int, Settled], tolerance: float) -> Convergence:
    """What the nodes say of every dictionary's site."""
    changes, known = _changes(path), _known(path)
    rounding = 1e-5 * (1 + _clean(path).abs())
    columns = []
    for part in path.passes.parts:
        said, change = [settled[n] for n in part.writes], changes[part.writes[0]]
        reach = torch.stack([one.reach for one in said]).amax(0)
        against = torch.maximum(held_against(change, reach), rounding)
        total, lost = (
            torch.stack([getattr(one, name) for one in said]).sum(0) for name in ("total", "lost")
        )
        gap = total - change if known else torch.full_like(change, torch.nan)
        columns.append(torch.stack([against, lost, gap]))
    moved, lost, gap = torch.stack(columns, -1).float()
    nodes = torch.stack([said.nodes for said in settled.values()]).amax(0)
    return Convergence(nodes, moved, lost, gap, tolerance)
