"""When two dictionaries are one: a file that was loaded twice, a direction that was made twice.

It matters wherever a latent must not be met twice, and wherever values that were read of one
object are used for another.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.hashing import digest
from .latents import Dictionary, index_tensor

BLOCK = 1024
"""Latents that are compared at a time: dictionaries that differ do so in their first ones."""


def twins(one: Dictionary, other: Dictionary, indices: Sequence[int]) -> bool:
    """Whether two dictionaries are one, as far as these latents go.

    They are if they are one object, or read and write at the same sites and compute these latents
    by the same numbers, to rounding: as an excerpt of a file does, which folds a bias over fewer
    columns. Where they came from and what they are called says nothing: a file can be written
    anew, and two objects in memory can share a name. Nor do the tokens that they skip.
    """
    if one is other:
        return True
    if _form(one) != _form(other):
        return False
    blocks = [indices[start : start + BLOCK] for start in range(0, len(indices), BLOCK)]
    return all(_alike(_columns(one, some), _columns(other, some)) for some in blocks)


def shared(
    one: Dictionary, indices: Sequence[int], other: Dictionary, theirs: Sequence[int]
) -> tuple[int, ...]:
    """The latents that are in both selections; none if these are two dictionaries."""
    if one is not other and _form(one) != _form(other):
        return ()
    both = tuple(sorted(set(indices).intersection(theirs)))
    return both if both and twins(one, other, both) else ()


def rivals(
    one: Dictionary, indices: Sequence[int], other: Dictionary, theirs: Sequence[int]
) -> bool:
    """Whether two selections' latents compete for one dictionary's k places, shared or not."""
    if one is other:
        return True
    own = {"selected", "directions"}  # each selection's
    return _form(one) == _form(other) and _alike(
        _columns(one, indices, own), _columns(other, theirs, own)
    )


def _form(basis: Dictionary) -> tuple[object, ...]:
    return basis.read_sites, basis.write_sites, basis.d_in, basis.d_out, basis.d_sae


def _columns(
    basis: Dictionary, indices: Sequence[int], but: Collection[str] = ()
) -> dict[str, Any]:
    columns = basis.columns(index_tensor(indices))
    if len(basis.write_sites) > 1 and "directions" not in but:
        columns["directions"] = torch.cat(tuple(basis.writes(indices).values()), 1)
    aside = {"local", *but}  # what is local is a sentence with the dictionary's name
    return {name: value for name, value in columns.items() if name not in aside}


def _alike(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(_close(ours[name], theirs[name]) for name in ours)


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.is_floating_point() == other.is_floating_point()
        if not same or not one.is_floating_point():
            return same and torch.equal(one.cpu(), other.cpu())
        size = float(one.abs().max()) if one.numel() else 0.0
        return torch.allclose(one.cpu().double(), other.cpu().double(), rtol=1e-5, atol=1e-6 * size)
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, partial):  # a function of torch's own cannot be hashed, and is one object
        return _close((one.func, *one.args), (other.func, *other.args))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_close, one, other))
    try:
        return digest(one) == digest(other)
    except CheckpointError:  # a function that holds what cannot be read
        return False
