"""Effects without gradients: latents moved one at a time, as rows that share their prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..dictionaries.latents import cast, index_tensor
from ..kernel.encode import encode
from ..metrics.evaluator import Batch
from .pairs import Part, Rows, Target, score
from .path import Path


class Plan(NamedTuple):
    """What of one part is moved, in g groups of the m ``rows``.

    ``group`` [m] is each row's, ``first`` [g] a row of each, ``owner`` [g] the prompt it is of;
    ``before`` [n, d_in] is what is read at the scored tokens, ``cell`` [n, 2] their row and column.
    """

    part: Part
    target: Target
    before: Tensor
    cell: Tensor
    rows: Rows
    group: Tensor
    first: Tensor
    owner: Tensor


class Move(NamedTuple):
    """A pass for the groups ``some`` of a plan: row g is prompt ``owner[g]`` of the batch again.

    A place written alone has a target. Of several each has steps, on top of what those before it
    have done to it.
    """

    plan: int
    some: slice
    weight: float
    owner: Tensor
    batch: Batch
    targets: dict[int, Tensor]
    steps: dict[int, Tensor]


def effects(path: Path) -> list[tuple[Tensor, ...]]:
    """Six columns of scores a part: what the metric does when each latent is moved alone."""
    parts = zip(path.passes.parts, path.scored, path.targets, strict=True)
    plans = [_plan(path, *part) for part in parts]
    clean = path.metric(path.clean, path.batch).detach()
    still = sum(weight for fraction, weight in path.job.method.moves() if fraction == 0)
    scores = [still * clean[plan.owner.to(clean.device)] for plan in plans]
    moves = (move for number, plan in enumerate(plans) for move in _moves(path, number, plan))
    for move, run in path.passes.runs(moves):
        values = path.metric(run, move.batch, move.owner)
        scores[move.plan][move.some] += move.weight * values.detach()
    return [_columns(path, *plan) for plan in zip(plans, scores, strict=True)]


def _plan(path: Path, part: Part, mask: Tensor, target: Target) -> Plan:
    before = part.read_at(path.clean.values, mask)
    rows, _ = score(part, before, target, None)
    cell = mask.nonzero().to(before.device)
    key = cell[:, 0][rows.token] * part.dictionary.d_sae + rows.latent
    group, first = _groups(key, _per_latent(path))
    return Plan(part, target, before, cell, rows, group, first, cell[rows.token[first], 0])


def _per_latent(path: Path) -> bool:
    return getattr(path.job.method, "per", "latent") == "latent"


def _groups(key: Tensor, per_latent: bool) -> tuple[Tensor, Tensor]:
    """What is moved together: the group of each row [m], and one row of each group [g]."""
    every = torch.arange(len(key), device=key.device)
    if not per_latent:
        return every, every
    unique, group = torch.unique(key, return_inverse=True)
    first = group.new_zeros(len(unique)).scatter_(0, group.flip(0), every.flip(0))
    return group, first


def _moves(path: Path, number: int, plan: Plan) -> Iterator[Move]:
    """A plan's passes; groups that share one are rows of it."""
    part, size = plan.part, path.copies * len(path.batch.numbers)
    for some, members in _batches(plan.group, len(plan.first), size):
        rows, owner = plan.rows.at(members), plan.owner[some].cpu()
        steps = _steps(part, plan.before, plan.target, rows)  # [m, d_out]
        many, at = path.batch.take(owner), (plan.group[members] - some.start, rows.token)
        at = (at[0], plan.cell[at[1], 1])
        for fraction, weight in path.job.method.moves():
            if fraction:
                moved = _put(path, part, owner, at, fraction * steps)
                yield Move(number, some, weight, owner, many, *moved)


def _put(
    path: Path, part: Part, owner: Tensor, at: tuple[Tensor, Tensor], steps: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Targets and steps [g, t, d] a written place, of steps [m, d_out] at rows and columns."""
    targets, added = {}, {}
    for place, own in part.by_place(steps).items():
        start = path.clean.values[place][owner]
        where, own = (at[0].to(start.device), at[1].to(start.device)), own.to(start.device)
        if len(part.writes) == 1:
            moved = start.to(own.dtype).index_put(where, own, accumulate=True)
            targets[place] = moved.to(start.dtype)
        else:
            still = own.new_zeros(start.shape)
            added[place] = still.index_put_(where, own, accumulate=True)
    return targets, added


def _batches(group: Tensor, count: int, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Groups, ``size`` at a time, and the rows that belong to them."""
    order = group.argsort(stable=True)
    edges = torch.arange(0, count + size, size, device=group.device)
    bounds = torch.searchsorted(group[order], edges).tolist()
    for n, start in enumerate(range(0, count, size)):
        yield slice(start, start + size), order[bounds[n] : bounds[n + 1]]


def _steps(part: Part, before: Tensor, target: Target, rows: Rows) -> Tensor:
    """[m, d_out]: what each row's move adds to the written site."""
    one = part.dictionary.columns(index_tensor(part.indices[:1]))
    columns = cast(one, before.dtype, before.device)
    scale = encode(columns, before)[1]
    unique, place = torch.unique(rows.latent, return_inverse=True)
    directions = part.directions(unique.cpu()).to(before)[place]
    if scale is None:
        return rows.change[:, None] * directions
    then = scale if target.after is None else encode(columns, target.after)[1]
    assert then is not None
    will = (rows.activation + rows.change)[:, None] * then[rows.token]
    return (will - rows.activation[:, None] * scale[rows.token]) * directions


def _columns(path: Path, plan: Plan, scores: Tensor) -> tuple[Tensor, ...]:
    """Six columns, a row a group; activation and change of a group are means over its tokens."""
    rows, first, per_latent = plan.rows, plan.first, _per_latent(path)
    scored = torch.stack(path.scored).any(0).sum(1)  # the prompt's, whatever this part skips
    count = scored.to(plan.owner.device)[plan.owner] if per_latent else 1
    activation, change = (
        column.new_zeros(len(first)).index_add_(0, plan.group, column) / count
        for column in (rows.activation, rows.change)
    )
    prompt, column = plan.cell[rows.token[first]].unbind(1)
    place = path.clean.view.position.to(prompt.device)[prompt, column]
    place = torch.full_like(place, -1) if per_latent else place
    numbers = (scores.to(prompt.device).float(), activation.float(), change.float())
    return plan.owner, place, rows.latent[first], *numbers
