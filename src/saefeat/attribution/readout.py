"""Scores read out: the gradient's dot product with the direction of each latent that moves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .pairs import Block, GrowingColumns, Target, blocks
from .part import Part


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


def score(
    part: Part, before: Tensor, target: Target, gradient: Tensor, keep: int | None = None
) -> tuple[Rows, Tensor]:
    """Rows of latents that moved, and each token's sums of what ``keep`` left out.

    Args:
        part: the latents.
        before: [n, d_in], what they read in the clean run.
        target: what they are moved to.
        gradient: [n, d_out], the metric's at the written site; of [n, ways, d_out] the scores'
            sizes are averaged.
        keep: how many rows a token, those with the largest scores.

    Returns:
        The rows; and [n, 2], the sum of the scores left out and of their sizes.
    """
    rows, left = GrowingColumns(), before.new_zeros(len(before), 2)
    for block in blocks(part, before, target):
        scored = _scored(block, gradient[block.tokens].to(before))
        if keep is not None:
            earlier = rows.columns() or [column[:0] for column in scored]
            every = Rows(*map(torch.cat, zip(earlier, scored, strict=True)))
            scored, dropped = _largest(every, keep)
            left.index_add_(0, dropped.token, _sums(dropped).to(left))
            rows = GrowingColumns()
        rows.add(scored)
    return Rows(*rows.columns()), left


def moved_rows(part: Part, before: Tensor, target: Target) -> Rows:
    """Rows of latents that move, without scores."""
    rows = GrowingColumns()
    for block in blocks(part, before, target):
        rows.add(_rows(block, torch.zeros_like(block.was)))
    return Rows(*rows.columns())


def _rows(block: Block, score: Tensor) -> Rows:
    latent = block.latents.to(block.column.device)[block.column]
    token = block.token + block.tokens.start
    return Rows(token, latent, score, block.was, block.will - block.was)


def _scored(block: Block, gradient: Tensor) -> Rows:
    if gradient.ndim == 2:
        return _rows(block, _effect(block, gradient))
    sizes = (_effect(block, one).abs() for one in gradient.unbind(1))
    return _rows(block, sum(sizes, torch.zeros_like(block.was)) / gradient.shape[1])


def _effect(block: Block, gradient: Tensor) -> Tensor:
    """[m]: change of each latent times its direction's part of the gradient [tokens, d_out]."""
    if block.scale is None or block.then is None:
        return (block.will - block.was) * block.dot(gradient)
    # the difference of two contributions
    after = block.will * block.dot(gradient * block.then)
    return after - block.was * block.dot(gradient * block.scale)


def _largest(rows: Rows, keep: int) -> tuple[Rows, Rows]:
    """The ``keep`` rows with the largest scores, by size, of each token; and the others."""
    order = rows.score.abs().argsort(descending=True, stable=True)
    order = order[rows.token[order].argsort(stable=True)]
    token = rows.token[order]
    rank = torch.arange(len(token), device=token.device) - torch.searchsorted(token, token)
    return rows.at(order[rank < keep]), rows.at(order[rank >= keep])


def _sums(rows: Rows) -> Tensor:
    return torch.stack([rows.score, rows.score.abs()], 1)
