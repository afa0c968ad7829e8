"""Effects without gradients: latents moved one at a time, as rows that share their prompt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dictionaries.latents import cast, index_tensor
from ..kernel.encode import encode
from .pairs import Part, Rows, Target, score
from .path import Path


def effects(path: Path, part: Part, mask: Tensor, target: Target) -> tuple[Tensor, ...]:
    """One part's scores, in six columns: what the metric does when each latent is moved alone."""
    before = part.read_at(path.clean.values, mask)
    rows, _ = score(part, before, target, None)
    cell = mask.nonzero().to(before.device)  # [n, 2]: row and column of each scored token
    prompt, position = cell[:, 0], path.clean.view.position[mask].to(cell.device)
    per_latent = getattr(path.job.method, "per", "latent") == "latent"
    group, first = _groups(prompt[rows.token] * part.dictionary.d_sae + rows.latent, per_latent)
    owner = prompt[rows.token[first]]
    scores = [before.new_zeros(0).to(owner.device)]
    for some, members in _batches(group, len(first), path.copies * len(path.batch.numbers)):
        steps = _steps(part, before, target, rows.at(members))  # [m, d_out]
        at = (group[members] - some.start, cell[rows.token[members], 1])
        scores.append(_effect(path, part.write, owner[some], at, steps))
    scored = torch.stack(path.scored).any(0).sum(1)  # the prompt's, whatever this part skips
    count = scored.to(owner.device)[owner] if per_latent else torch.ones_like(owner)
    activation, change = (
        column.new_zeros(len(first)).index_add_(0, group, column) / count
        for column in (rows.activation, rows.change)
    )
    place = torch.full_like(owner, -1) if per_latent else position[rows.token[first]]
    numbers = (torch.cat(scores).float(), activation.float(), change.float())
    return owner, place, rows.latent[first], *numbers


def _groups(key: Tensor, per_latent: bool) -> tuple[Tensor, Tensor]:
    """What is moved together: the group of each row [m], and one row of each group [g]."""
    every = torch.arange(len(key), device=key.device)
    if not per_latent:
        return every, every
    unique, group = torch.unique(key, return_inverse=True)
    first = group.new_zeros(len(unique)).scatter_(0, group.flip(0), every.flip(0))
    return group, first


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
    directions = part.dictionary.directions(unique.cpu()).to(before)[place]
    if scale is None:
        return rows.change[:, None] * directions
    then = scale if target.after is None else encode(columns, target.after)[1]
    assert then is not None
    will = (rows.activation + rows.change)[:, None] * then[rows.token]
    return (will - rows.activation[:, None] * scale[rows.token]) * directions


def _effect(
    path: Path, write: int, owner: Tensor, at: tuple[Tensor, Tensor], steps: Tensor
) -> Tensor:
    """[g]: the metric summed over the method's moves, weighted; row g is prompt owner[g] again."""
    device, owner = owner.device, owner.cpu()
    many = path.batch.take(owner)
    start = path.clean.values[write][owner]
    at, steps = (at[0].to(start.device), at[1].to(start.device)), steps.to(start.device)
    total = torch.zeros(len(owner), dtype=torch.float32)
    for fraction, weight in path.job.method.moves():
        if fraction == 0:
            values = path.metric(path.clean, path.batch)[owner]
        else:
            moved = start.to(steps.dtype).index_put(at, fraction * steps, accumulate=True)
            run = path.passes.run(many, targets={write: moved.to(start.dtype)}, copy=False)
            values = path.metric(run, many, owner)
        total = total.to(values) + weight * values.detach()
    return total.to(device)
