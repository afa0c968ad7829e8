"""What an action remembers by row, where beam search moves rows between passes.

Beam search drops and copies rows, and tells nobody but the key-value cache. The cache shows it: the
key of the newest token stays as it was in every row, unless another row has been put there. So the
new order is read off the keys, of the last layer, which depend on every token before. Nothing is
left on the cache, which outlives a block and may be copied; and a copy shows the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import SaefeatError
from .frozen import Frozen
from .state import Memory, past_length


class Beams(Frozen):
    """What is remembered by row moves along with the rows of the key-value cache."""

    def note(self, cache: Any, memory: Memory) -> None:
        """After a pass, which has filled the cache: how its rows can be told apart."""
        if cache is None or isinstance(cache, int):  # a number comes with requests without beams
            return
        layer = last_full(cache)
        if layer is None:
            require_single(memory)
            return
        past = past_length(cache)
        memory.keys = (past, layer, column(cache, layer, past, past - 1))

    def follow(self, cache: Any, memory: Memory) -> None:
        """Before the next one: reorder the memory as the cache's rows have been reordered."""
        if memory.keys is None or cache is None or isinstance(cache, int):
            return
        past, layer, old = memory.keys
        now = column(cache, layer, past_length(cache), past - 1)
        if not torch.equal(old, now):
            reorder_memory(memory, moves(old, now))


def moves(old: Tensor, now: Tensor) -> Tensor:
    """[b]: which of the old rows [b, d] each row is now."""
    same = (now[:, None] == old[None]).all(-1)
    if not bool(same.any(1).all()):
        raise SaefeatError(
            "saefeat: rows have changed between two passes, and none of the key-value cache's rows"
            " is what it was. Likely cause: a cache that keeps its keys in another form, with a"
            " held condition, a chat role or a temporal SAE. Try: the default dynamic cache; greedy"
            " decoding or sampling."
        )
    stay = torch.arange(len(old), device=same.device)
    return torch.where(same.diagonal(), stay, same.int().argmax(1))


def last_full(cache: Any) -> int | None:
    """The last layer that keeps keys for every token, or for most of them."""
    kept = [kept_columns(layer) for layer in getattr(cache, "layers", ())]
    most = max(kept, default=0)
    return None if not most else max(n for n, columns in enumerate(kept) if columns == most)


def kept_columns(layer: Any) -> int:
    """For how many tokens a layer of a cache keeps keys [b, heads, s, d]."""
    keys = getattr(layer, "keys", None)
    return keys.shape[2] if isinstance(keys, Tensor) and keys.ndim == 4 and keys.numel() else 0


def column(cache: Any, layer: int, past: int, place: int) -> Tensor:
    """[b, heads · d]: the key at an absolute column, of a cache that has seen ``past`` of them."""
    keys = cache.layers[layer].keys
    kept = keys.shape[2]
    # a static cache has room for more, at the right; a sliding window has dropped the oldest
    place = place if kept >= past else place - (past - kept)
    if place < 0:
        raise SaefeatError(
            "saefeat: the key-value cache has dropped the token by which its rows are told apart."
            " Likely cause: a sliding window of one token. Try: generate without beams, or with a"
            " larger window."
        )
    return torch.nan_to_num(keys[:, :, place].flatten(1))


def require_single(memory: Memory) -> None:
    """Refuse several rows in a cache without keys: if they changed places, nobody could tell."""
    if memory.lengths is not None and len(memory.lengths) > 1:
        raise SaefeatError(
            "saefeat: a held condition, a chat role or a temporal SAE looks back over its row, and"
            " this cache does not show whether rows have changed places, as beam search does."
            " Likely cause: a state-space model. Try: one prompt at a time."
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
