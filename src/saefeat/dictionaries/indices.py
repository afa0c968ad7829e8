"""Indices of latents: read, checked and printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import eq

import torch
from torch import Tensor

from ..errors import LatentError
from ..model.sites import Site


def index_tensor(indices: Iterable[int]) -> Tensor:
    """Indices as a long tensor [k]."""
    if isinstance(indices, range):
        return torch.arange(indices.start, indices.stop, indices.step)
    return torch.tensor(list(indices), dtype=torch.long)


def checked(site: Site, d_sae: int, given: object) -> tuple[int, ...]:
    """Indices as plain integers; numpy's and torch's own integers are integers too.

    Raises:
        LatentError: for an index that is negative, out of range, repeated or not whole.
    """
    tolist = getattr(given, "tolist", None)  # torch's and numpy's
    flat = tolist() if callable(tolist) else given
    listed = (
        list(flat) if isinstance(flat, Iterable) and not isinstance(flat, str | bytes) else None
    )
    whole = [given] if listed is None else [index for index in listed if not _is_whole(index)]
    indices = [] if listed is None or whole else [index.__index__() for index in listed]
    wrong = whole or [index for index in indices if not 0 <= index < d_sae]
    if not wrong and len(set(indices)) == len(indices):
        return tuple(indices)
    got, cause = "a list with repeats", "one latent listed twice would be edited twice"
    if wrong:
        got, cause = repr(wrong[0]), "an index from a dictionary of another width"
    raise LatentError(
        f"latents of {site}: `indices` is {got}, wanted distinct integers in 0..{d_sae - 1}. Likely"
        f" cause: {cause}. Try: dictionary.latents([0, 1])"
    )


def _is_whole(index: object) -> bool:
    return hasattr(index, "__index__") and not isinstance(index, bool)


def compact(d_sae: int, indices: Sequence[int]) -> Sequence[int]:
    """A whole dictionary as a range: its numbers as objects would take 36 bytes each."""
    every = range(d_sae)
    if isinstance(indices, range) or len(indices) != d_sae:
        return indices
    return every if all(map(eq, indices, every)) else indices


def brief(indices: Sequence[int]) -> str:
    """The first few, and how many there are."""
    head = ", ".join(str(i) for i in indices[:5])
    return head + (f", ... {len(indices)} in all" if len(indices) > 5 else "")
