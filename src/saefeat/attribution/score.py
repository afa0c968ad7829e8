"""Scores read out: a site's gradient through its dictionary, a block at a time, kept sparse.

Nothing of the size [tokens, d_sae] exists: blocks of CHUNK latents times TOKENS tokens are encoded,
scored, and reduced to the pairs that moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dictionaries.base import cast
from ..kernel.encode import encode
from ..latents import index_tensor
from .watch import Part

CHUNK = 4096
"""Latents scored at a time."""
TOKENS = 1024
"""Tokens scored at a time: with CHUNK it bounds memory, however long the prompts."""


class Goal(NamedTuple):
    """What one part's latents are moved to, at n scored tokens.

    ``after`` [n, d_in] is what the dictionary reads in the baseline run; ``fixed`` [1 or n, k]
    are given values; with neither it is zero.
    """

    after: Tensor | None = None
    fixed: Tensor | None = None


class Block(NamedTuple):
    """Some latents at some tokens: activations before and after, and their directions' scales."""

    tokens: slice
    latents: Tensor
    directions: Tensor
    was: Tensor
    will: Tensor
    scale: Tensor | None
    scale_then: Tensor | None

    def step(self) -> Tensor:
        """[tokens, d_out]: what moving all of the block's latents adds to the written site."""
        if self.scale is None or self.scale_then is None:
            return (self.will - self.was) @ self.directions
        return (self.will @ self.directions) * self.scale_then - (
            self.was @ self.directions
        ) * self.scale


class Rows(NamedTuple):
    """Sparse scores of one part: token number among those scored, latent, and what it did."""

    token: Tensor
    latent: Tensor
    score: Tensor
    activation: Tensor
    change: Tensor

    def at(self, which: Tensor) -> Rows:
        """Some of the rows."""
        return Rows(*(column[which] for column in self))


def at_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """[n, d]: a site's values [b, t, d] where the mask [b, t] holds, wherever either lies.

    A model may be split over devices: the mask is where its inputs are, a site where its block is.
    """
    return values[mask.to(values.device)]


def blocks(part: Part, before: Tensor, goal: Goal) -> Iterator[Block]:
    """Every block of latents and tokens; ``before`` [n, d_in] is what is read in the clean run."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    for first in range(0, len(part.indices), CHUNK):
        span = slice(first, first + CHUNK)
        index = index_tensor(part.indices[span])
        columns = cast(part.dictionary.columns(index), dtype, before.device)
        for start in range(0, max(len(before), 1), TOKENS):
            tokens = slice(start, start + TOKENS)
            was, scale = encode(columns, before[tokens])
            will, then = _reached(columns, goal, tokens, span, was, scale)
            yield Block(tokens, index, columns["directions"], was, will, scale, then)


def _reached(
    columns: dict[str, Any],
    goal: Goal,
    tokens: slice,
    span: slice,
    was: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The latents at the baseline, and the scale of their directions there."""
    if goal.after is not None:
        return encode(columns, goal.after[tokens])
    if goal.fixed is not None:
        fixed = goal.fixed[:, span] if len(goal.fixed) == 1 else goal.fixed[tokens, span]
        return fixed.to(was).expand_as(was), scale
    # At the zero baseline the latent is zero, though x − f · directions may encode to more.
    return torch.zeros_like(was), scale


def score(
    part: Part, before: Tensor, goal: Goal, gradient: Tensor, keep: int | None = None
) -> tuple[Rows, Rows]:
    """Rows of latents that moved, and those left out because ``keep`` larger ones share the token.

    ``gradient`` [n, d_out] is the metric's at the written site; of [n, ways, d_out] the scores'
    sizes are averaged.
    """
    kept, dropped = [], []
    for block in blocks(part, before, goal):
        kept.append(_scored(block, gradient[block.tokens].to(before)))
        if keep is not None and len(kept) > 1:
            kept, left = _largest(kept, keep)
            dropped.append(left)
    if keep is not None:
        kept, left = _largest(kept, keep)
        dropped.append(left)
    return _joined(kept), _joined(dropped) if dropped else kept[0].at(kept[0].token[:0])


def moved_rows(part: Part, before: Tensor, goal: Goal) -> Rows:
    """Rows of latents that move, without scores."""
    found = []
    for block in blocks(part, before, goal):
        token, latent = _moved(block).nonzero(as_tuple=True)
        was, will = block.was[token, latent], block.will[token, latent]
        where = block.latents.to(latent.device)[latent]
        found.append(
            Rows(token + block.tokens.start, where, torch.zeros_like(was), was, will - was)
        )
    return _joined(found)


def _moved(block: Block) -> Tensor:
    if block.scale is None:
        return block.will != block.was
    return (block.will != 0) | (block.was != 0)  # the direction itself moves


def _scored(block: Block, gradient: Tensor) -> Rows:
    token, latent = _moved(block).nonzero(as_tuple=True)  # [m], [m]
    was, will = block.was[token, latent], block.will[token, latent]
    moves = (token, latent, was, will)
    if gradient.ndim == 2:
        found = _effect(block, gradient, *moves)
    else:
        sizes = (_effect(block, one, *moves).abs() for one in gradient.unbind(1))
        found = sum(sizes, torch.zeros_like(was)) / gradient.shape[1]
    where = block.latents.to(latent.device)[latent]
    return Rows(token + block.tokens.start, where, found, was, will - was)


def _effect(
    block: Block, gradient: Tensor, token: Tensor, latent: Tensor, was: Tensor, will: Tensor
) -> Tensor:
    """[m]: change of each latent times its direction's part of the gradient [tokens, d_out]."""
    if block.scale is None or block.scale_then is None:
        return (will - was) * _dot(gradient, block.directions, token, latent)
    # the difference of two contributions
    found = will * _dot(gradient * block.scale_then, block.directions, token, latent)
    return found - was * _dot(gradient * block.scale, block.directions, token, latent)


def _dot(slope: Tensor, directions: Tensor, token: Tensor, latent: Tensor) -> Tensor:
    """[m]: slope[token] · directions[latent], gathering only the pairs that are wanted.

    Dense unless fewer than one pair in 64 is wanted: until then a matrix product of all pairs is
    cheaper than moving rows about.
    """
    if len(token) * 64 > len(slope) * len(directions):
        return (slope @ directions.T)[token, latent]
    step = max(1, (1 << 21) // slope.shape[1])  # 8 MiB of float32 at a time
    pieces = [
        (slope[token[i : i + step]] * directions[latent[i : i + step]]).sum(-1)
        for i in range(0, max(len(token), 1), step)
    ]
    return torch.cat(pieces)


def _largest(found: list[Rows], keep: int) -> tuple[list[Rows], Rows]:
    """The ``keep`` rows with the largest scores, by size, of each token; and the others."""
    rows = _joined(found)
    order = rows.score.abs().argsort(descending=True, stable=True)
    order = order[rows.token[order].argsort(stable=True)]
    token = rows.token[order]
    rank = torch.arange(len(token), device=token.device) - torch.searchsorted(token, token)
    return [rows.at(order[rank < keep])], rows.at(order[rank >= keep])


def _joined(found: list[Rows]) -> Rows:
    return found[0] if len(found) == 1 else Rows(*map(torch.cat, zip(*found, strict=True)))
