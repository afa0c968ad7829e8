"""What an action remembers by row, where beam search moves rows between passes.

Beam search drops and copies rows, and tells nobody but the key-value cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .frozen import Frozen
from .state import Memory, past_length


class Beams(Frozen):
    """What is remembered by row moves along with the rows of the key-value cache."""

    def follow(self, cache: Any, memory: Memory) -> None:
        """Have the cache's own reordering reorder the memory too; it lives for one generation."""
        if cache is None or not hasattr(cache, "reorder_cache"):
            return
        followers = cache.__dict__.setdefault("followers", [])
        if not followers:
            reorder = cache.reorder_cache

            def reorder_all(rows: Any) -> None:
                reorder(rows)
                for follower in followers:
                    reorder_memory(follower, rows)

            cache.reorder_cache = reorder_all
        if not any(follower is memory for follower in followers):
            followers.append(memory)
            require_unmoved(cache, memory)


def require_unmoved(cache: Any, memory: Memory) -> None:
    """Refuse a generation whose rows have changed places unseen.

    A block that runs apart from the model is given another copy of the cache at each pass, and no
    copy tells of a reordering. But it shows one: what the cache holds of earlier tokens stays as it
    was in every row, unless beam search has put another row there.
    """
    layers = getattr(cache, "layers", ())
    keys = next((k for k in (getattr(x, "keys", None) for x in layers) if k is not None), None)
    if not isinstance(keys, Tensor) or keys.ndim != 4:
        return
    before, memory.keys = memory.keys, (past_length(cache), keys[:, 0, :, 0].clone())
    if before is None:
        return
    total, now = memory.keys
    old, kept = before[1], now[:, : now.shape[1] - (total - before[0])]
    columns = min(old.shape[1], kept.shape[1])  # a sliding window drops the oldest
    if not torch.equal(old[:, old.shape[1] - columns :], kept[:, kept.shape[1] - columns :]):
        raise RuntimeError(
            "saefeat: rows have changed places between two passes, and this block, which runs apart"
            " from the model, cannot follow them. Likely cause: num_beams, with a held condition, a"
            " chat role or a temporal SAE. Try: greedy decoding or sampling; or a trusted key."
        )


def reorder_memory(memory: Memory, rows: Tensor) -> None:
    """Other rows, as beam search chooses them."""
    for name, value in vars(memory).items():
        setattr(memory, name, reordered(value, rows))
    memory.kept = {key: reordered(value, rows) for key, value in memory.kept.items()}


def reordered(value: Any, rows: Any) -> Any:
    """What is remembered by row with other rows; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(reordered(part, rows) for part in value)
    if isinstance(value, Tensor) and len(value) == len(rows):
        return value.index_select(0, rows.to(value.device))
    return value
