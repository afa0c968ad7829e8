"""What a path moves: the pairs of token and latent whose activation differs at its two ends.

Nothing of the size [tokens, d_sae] exists: blocks of latents times tokens are encoded, and reduced
to the pairs that move. What moves a site, and what is scored, is summed over these pairs alone. A
pair's score is its change times the gradient's dot product with the latent's direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..dictionaries.latents import Dictionary, cast, index_tensor
from ..kernel.encode import encode
from ..kernel.frozen import plainly
from ..kernel.read import Norm, lift

CHUNK, ELSEWHERE = 1024, 8192
"""Latents encoded at a time, on a CPU and elsewhere: more costs memory, fewer costs launches."""
TOKENS = 1024
"""Tokens encoded at a time: with CHUNK it bounds memory, however long the prompts."""
REMEMBERED = 512
"""Pairs a token that are remembered from the path's end to the scores; more are encoded again."""
DENSE = 64
"""Above one wanted pair in so many a dense product is faster than a gather."""

Span = tuple[int, int]


class Part(NamedTuple):
    """One dictionary's latents, the places it reads and writes, and which tokens are scored.

    What it writes at several places lies side by side: directions [k, d_out · places], and so do
    the places' values and gradients. So one product sums a latent's effect over all of them.
    """

    dictionary: Dictionary
    indices: Sequence[int]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    norms: tuple[Norm, ...]
    rule: tuple

    def read_at(self, values: Mapping[int, Tensor], mask: Tensor) -> Tensor:
        """[n, d_in]: what is read of values [b, t, d] a place, where the mask [b, t] holds."""
        found = []
        for place, norm in zip(self.reads, self.norms, strict=True):
            x = values[place]  # where its block is; the mask is where the model's inputs are
            found.append(lift(x[mask.to(x.device)], norm))
        return _beside(found)

    def written_at(self, values: Mapping[int, Tensor], mask: Tensor) -> Tensor:
        """[n, ..., d_out · places]: the same of places that are written."""
        return _beside([values[n][mask.to(values[n].device)] for n in self.writes])

    def directions(self, latents: Tensor) -> Tensor:
        """[k, d_out · places]."""
        return _beside(list(self.dictionary.writes(latents).values()))

    def by_place(self, values: Tensor) -> dict[int, Tensor]:
        """Values [..., d_out · places] at each written place."""
        return dict(zip(self.writes, values.chunk(len(self.writes), -1), strict=True))


def _beside(values: Sequence[Tensor]) -> Tensor:
    """Side by side, where the last one is."""
    if len(values) == 1:
        return values[0]
    return torch.cat([value.to(values[-1].device) for value in values], -1)


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


class Target(NamedTuple):
    """What one part's latents are moved to, at n scored tokens.

    ``after`` [n, d_in] is what the dictionary reads in the baseline run; ``fixed`` [1 or n, k]
    are given values; with neither it is zero. ``pairs`` are those that move, once they were found.
    """

    after: Tensor | None = None
    fixed: Tensor | None = None
    pairs: Pairs | None = None


class Block(NamedTuple):
    """Some latents [k] at some tokens [t]: the m pairs that move, by token.

    ``span`` is where the latents lie among the part's. ``token`` [m] counts from the block's first,
    ``column`` [m] in its latents, whose ``directions`` are [k, d_out]. ``scale`` and ``then``
    [t, 1 or d_out] are what directions carry before and after, if anything. ``own`` [m] are the
    columns among the span's, where ``latents`` are only those that move.
    """

    tokens: slice
    span: Span
    latents: Tensor
    directions: Tensor
    token: Tensor
    column: Tensor
    was: Tensor
    will: Tensor
    scale: Tensor | None
    then: Tensor | None
    own: Tensor

    def step(self, tokens: int) -> Tensor:
        """[t, d_out]: what moving all pairs adds to the written site; ``tokens`` is t."""
        if self.scale is None or self.then is None:
            return self._sum(self.will - self.was, tokens)
        return self._sum(self.will, tokens) * self.then - self._sum(self.was, tokens) * self.scale

    def effect(self, gradient: Tensor) -> Tensor:
        """[m]: change of each latent times its direction's part of the gradient [t, d_out]."""
        if self.scale is None or self.then is None:
            return (self.will - self.was) * self._dot(gradient)
        # the difference of two contributions
        after = self.will * self._dot(gradient * self.then)
        return after - self.was * self._dot(gradient * self.scale)

    def _dot(self, slope: Tensor) -> Tensor:
        """[m]: each pair's direction times its token's slope [t, d_out]."""
        if len(self.token) * DENSE > len(slope) * len(self.latents):
            with plainly(slope.device.type):
                return (slope @ self.directions.T)[self.token, self.column]
        step = max(1, (1 << 18) // slope.shape[1])  # 1 MiB of float32 at a time
        pieces = [
            (slope[self.token[i : i + step]] * self.directions[self.column[i : i + step]]).sum(-1)
            for i in range(0, max(len(self.token), 1), step)
        ]
        return torch.cat(pieces)

    def _sum(self, weight: Tensor, tokens: int) -> Tensor:
        """[t, d_out]: each token's weighted sum of directions."""
        if len(self.token) * DENSE > tokens * len(self.latents):
            every = weight.new_zeros(tokens, len(self.latents))
            with plainly(weight.device.type):
                return every.index_put_((self.token, self.column), weight) @ self.directions
        bags = torch.searchsorted(self.token, torch.arange(tokens, device=weight.device))
        # Neither a gathered [m, d_out] nor, on a GPU, sums whose order changes between runs.
        return embedding_bag(
            self.column, self.directions, bags, mode="sum", per_sample_weights=weight
        )


class Pairs(NamedTuple):
    """All pairs of one part, block after block: its span of latents → where its pairs end."""

    ends: dict[Span, int]
    columns: Sequence[Tensor]
    scale: Tensor | None
    then: Tensor | None


class GrowingColumns:
    """Columns that grow by pieces, in storage that doubles.

    Small tensors kept between large passing ones leave a heap in holes that none of the large ones
    fits: with a list of pieces 64k latents took 300 MB, nearly all of it such holes.
    """

    def __init__(self) -> None:
        self._columns: list[Tensor] = []
        self.size = 0

    def add(self, columns: Sequence[Tensor]) -> None:
        """Add rows: one tensor [m] a column."""
        stop = self.size + len(columns[0])
        capacity = len(self._columns[0]) if self._columns else -1
        if stop > capacity:
            grown = [column.new_empty(max(stop, 2 * capacity, 1024)) for column in columns]
            for new, old in zip(grown, self._columns, strict=bool(self._columns)):
                new[: self.size] = old[: self.size]
            self._columns = grown
        for stored, column in zip(self._columns, columns, strict=True):
            stored[self.size : stop] = column
        self.size = stop

    def columns(self) -> list[Tensor]:
        """The rows so far."""
        return [column[: self.size] for column in self._columns]


def blocks(part: Part, before: Tensor, target: Target) -> Iterator[Block]:
    """What moves, block by block; ``before`` [n, d_in] is what is read in the clean run."""
    if target.pairs is None:
        yield from _encoded(part, before, target)
        return
    pairs, start = target.pairs, 0
    dtype = torch.promote_types(before.dtype, torch.float32)
    everything, scales = slice(0, len(before)), (pairs.scale, pairs.then)
    for span, stop in pairs.ends.items():
        latents = index_tensor(part.indices[slice(*span)])
        token, own, was, will = (rows[start:stop] for rows in pairs.columns)
        latents, column = _moving(part, latents, own)
        directions = part.directions(latents).to(before.device, dtype)
        moves = (token, column, was, will)
        yield Block(everything, span, latents, directions, *moves, *scales, own)
        start = stop


def _moving(part: Part, latents: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """A block's latents and the pairs' columns in them: for a dictionary written at several places
    only those that move, since its directions are as many times as wide.
    """
    if len(part.writes) == 1:
        return latents, column
    used, column = torch.unique(column, return_inverse=True)
    return latents[used.cpu()], column


def _encoded(part: Part, before: Tensor, target: Target) -> Iterator[Block]:
    dtype = torch.promote_types(before.dtype, torch.float32)
    most = CHUNK if before.device.type == "cpu" else ELSEWHERE
    # A joint dictionary computes all of its latents for any of them: one block has them all.
    chunk = len(part.indices) if part.dictionary.joint else most
    for first in range(0, len(part.indices), chunk):
        span = (first, first + chunk)
        latents = index_tensor(part.indices[slice(*span)])
        columns = cast(part.dictionary.columns(latents), dtype, before.device)
        width = columns["encoder"].shape[1] if "encoder" in columns else part.dictionary.d_sae
        count = max(1, most * TOKENS // max(width, most))
        for start in range(0, max(len(before), 1), count):
            tokens = slice(start, start + count)
            was, scale = _activations(columns, before[tokens])
            # At the zero baseline the latent is zero, though x − f · directions may encode to more.
            will, then = was.new_zeros(()).expand_as(was), scale
            if target.after is not None:
                will, then = _activations(columns, target.after[tokens])
            elif target.fixed is not None:
                fixed = target.fixed if len(target.fixed) == 1 else target.fixed[tokens]
                will = fixed[:, slice(*span)].to(was).expand_as(was)
            # A scaled direction moves itself, though its latent may not.
            moved = will != was if scale is None else (will != 0) | (was != 0)
            token, column = moved.nonzero(as_tuple=True)
            # The caller works while this waits: nothing of the block's whole size is held.
            was, will = was[token, column], will[token, column]
            used, own, directions = latents, column, columns["directions"]
            if len(part.writes) > 1:
                used, column = _moving(part, latents, own)
                directions = part.directions(used).to(before.device, dtype)
            moves = (token, column, was, will)
            yield Block(tokens, span, used, directions, *moves, scale, then, own)


def _activations(columns: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The latents of tokens [n, d], and their directions' scale; n may be 0.

    Torch warns of a standard deviation over no rows at all, each of which would have one (2.13).
    """
    if len(x):
        return encode(columns, x)
    f, scale = encode(columns, x.new_zeros(1, x.shape[1]))
    return f[:0], None if scale is None else scale[:0]


def moved_by(part: Part, before: Tensor, target: Target, out: Tensor) -> tuple[Tensor, Target]:
    """The written places' value ``out`` [n, d_out] with everything moved; the target with pairs.

    The pairs are remembered unless they are many, so that scores need not encode again.
    """
    out, kept, limit = out.clone(), GrowingColumns(), REMEMBERED * len(before)
    ends: dict[Span, int] = {}
    scales: dict[int, tuple[Tensor, Tensor]] = {}
    for block in blocks(part, before, target):
        value = out[block.tokens]
        out[block.tokens] = value + block.step(len(value)).to(out)
        if block.scale is not None and block.then is not None:
            scales[block.tokens.start] = block.scale, block.then
        if kept.size <= limit:
            token = block.token + block.tokens.start
            kept.add((token, block.own, block.was, block.will))
            ends[block.span] = kept.size
    if kept.size > limit or not ends:
        return out, target
    scale, then = map(torch.cat, zip(*scales.values(), strict=True)) if scales else (None, None)
    return out, target._replace(pairs=Pairs(ends, kept.columns(), scale, then))


def score(
    part: Part, before: Tensor, target: Target, gradient: Tensor | None, keep: int | None = None
) -> tuple[Rows, Tensor]:
    """Rows of latents that moved, and each token's sums [n, 2] of the scores that ``keep`` rows a
    token leave out, and of their sizes.

    ``before`` [n, d_in] is what is read in the clean run, ``gradient`` [n, d_out] the metric's at
    the written site; of [n, ways, d_out] the scores' sizes are averaged. None scores nothing.
    """
    rows, left = GrowingColumns(), before.new_zeros(len(before), 2)
    for block in blocks(part, before, target):
        effect = torch.zeros_like(block.was)
        if gradient is not None:
            slope = gradient[block.tokens].to(before)
            if slope.ndim == 2:
                effect = block.effect(slope)
            else:
                sizes = (block.effect(one).abs() for one in slope.unbind(1))
                effect = sum(sizes, effect) / slope.shape[1]
        token = block.token + block.tokens.start
        latent = block.latents.to(token.device)[block.column]
        scored = Rows(token, latent, effect, block.was, block.will - block.was)
        if keep is not None:
            earlier = rows.columns() or [column[:0] for column in scored]
            every = Rows(*map(torch.cat, zip(earlier, scored, strict=True)))
            scored, dropped = _largest(every, keep)
            sums = torch.stack([dropped.score, dropped.score.abs()], 1)
            left.index_add_(0, dropped.token, sums.to(left))
            rows = GrowingColumns()
        rows.add(scored)
    return Rows(*rows.columns()), left


def _largest(rows: Rows, keep: int) -> tuple[Rows, Rows]:
    """The ``keep`` rows with the largest scores, by size, of each token; and the others."""
    order = rows.score.abs().argsort(descending=True, stable=True)
    order = order[rows.token[order].argsort(stable=True)]
    token = rows.token[order]
    rank = torch.arange(len(token), device=token.device) - torch.searchsorted(token, token)
    return rows.at(order[rank < keep]), rows.at(order[rank >= keep])
