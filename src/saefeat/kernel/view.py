"""What one forward pass shows of a sequence, and what is remembered of it from pass to pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .frozen import Frozen

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


class Memory:
    """What later passes must know of a sequence.

    Attributes:
        lengths: [b, 1], the prompts' lengths in real tokens; None before the first pass.
        seen: columns shown so far; None before the first pass.
        prompt: columns of the first pass.
        blocks: whether a pass has added several columns to a sequence already begun. Then the first
            pass was not all of the prompt, and nobody can tell where the prompt ended.
        ids: [b, s], the tokens shown so far.
        stopped: [b, 1], rows that have come to their end.
        copied: whether a module goes on with a copy of the key-value cache.
        keys: columns that the key-value cache held, and a number [b, s] for each.
        kept: what actions remember, by their keys: tensors by row, or tuples of them.
        parts: the memories of some rows alone.
    """

    lengths: Tensor | None = None
    seen: int | None = None
    prompt: int = 0
    blocks: bool = False
    ids: Tensor | None = None
    stopped: Tensor | None = None
    copied: bool = False
    keys: tuple[int, Tensor] | None = None
    kept: dict[Any, Any]
    parts: dict[tuple[int, int], Memory]

    def __init__(self, lengths: Tensor | None = None) -> None:
        self.lengths, self.kept, self.parts = lengths, {}, {}

    def reorder(self, rows: Tensor) -> None:
        """Other rows, as beam search chooses them."""
        for name, value in vars(self).items():
            setattr(self, name, reordered(value, rows))
        self.kept = {key: reordered(value, rows) for key, value in self.kept.items()}


class Ends(Frozen):
    """How a finished row is filled while other rows go on generating.

    Attributes:
        stops: the ids that end a row.
        pad: the id it is filled with.
        honored: whether generation is known to stop there. Then the stop token itself, fed back
            only because other rows go on, is filling too. Where it is not known, filling is padding
            behind a stop, so that a caller who ignores stop tokens has every token edited.
    """

    stops: tuple[int, ...]
    pad: int
    honored: bool

    def finished(
        self, ids: Int[Tensor, "b t"], generated: Bool[Tensor, "b t"], memory: Memory
    ) -> Bool[Tensor, "b t"]:
        """The columns that are filling."""
        stops = torch.tensor(self.stops, dtype=ids.dtype, device=ids.device)
        stop = torch.isin(ids, stops) & generated
        carry = torch.zeros_like(stop[:, :1]) if memory.stopped is None else memory.stopped
        carry = carry.to(ids.device)
        over = stop.int().cummax(1).values.bool() | carry
        memory.stopped = over[:, -1:]
        if self.honored:
            return over
        behind = torch.cat([carry, over[:, :-1]], 1)
        return behind & (ids == self.pad)


class View(Frozen):
    """What a forward pass shows of the sequence: b rows, the newest t columns.

    Attributes:
        ids: [b, t], or None for embeddings.
        position: [b, t], of real tokens from 0; a left pad has none.
        shown: [b, t], what is no padding.
        real: [b, t], what of it belongs to a row that is not finished.
        lengths: [b, 1], the prompts' lengths in real tokens.
        whole: whether the pass shows the sequence from its start.
        begins: whether it is the sequence's first pass.
        memory: what later passes must know.
        selected: what each rule selects in this pass, once it is known.
    """

    ids: Tensor | None
    position: Tensor
    shown: Tensor
    real: Tensor
    lengths: Tensor
    whole: bool
    begins: bool
    memory: Memory
    selected: dict[tuple, tuple[Tensor, bool]]


def window(
    ids: Int[Tensor, "b t"] | None,
    attention_mask: Any,
    shape: tuple[int, int],
    past: int,
    memory: Memory,
    ends: Ends | None,
) -> View:
    """The view of a pass.

    Args:
        ids: the tokens fed in this pass, or None for embeddings.
        attention_mask: [b, s] over past and new columns, or None. generate drops a mask of ones,
            and then ``past`` is all that tells a new token from the first.
        shape: (b, t).
        past: how many columns the key-value cache already holds.
        memory: of the passes before; a new one for a new sequence.
        ends: what a finished row looks like.
    """
    rows, columns = shape
    if attention_mask is None:
        device = None if ids is None else ids.device
        attention_mask = torch.ones(rows, past + columns, dtype=torch.long, device=device)
    if getattr(attention_mask, "ndim", 0) != 2:
        raise ValueError(
            "saefeat: the attention mask of this forward pass is not [batch, sequence], so padding"
            " cannot be told from tokens. Likely cause: a compiled or static cache, or a 4-D mask"
            " of your own. Try: the default dynamic cache, and the tokenizer's own mask."
        )
    shown = real = attention_mask[:, -columns:] != 0
    position = (attention_mask != 0).long().cumsum(1)[:, -columns:] - 1
    lengths, begins = memory.lengths, memory.seen is None
    if lengths is None:
        lengths = memory.lengths = (attention_mask != 0).sum(1, keepdim=True)
    lengths = lengths.to(position.device)
    count_columns(memory, past, columns)
    if ids is not None:  # with a cache a pass shows only new tokens; rules may look further back
        text, new = memory.ids, ids.shape[1] == attention_mask.shape[1]
        memory.ids = ids if new or text is None else torch.cat([text.to(ids.device), ids], 1)
        if ends is not None:
            real = real & ~ends.finished(ids, position >= lengths, memory)
    return View(
        ids=ids, position=position, shown=shown, real=real, lengths=lengths, whole=past == 0,
        begins=begins, memory=memory, selected={},
    )  # fmt: skip


def count_columns(memory: Memory, past: int, columns: int) -> None:
    """Keep account of the columns of a sequence, pass by pass."""
    if past and memory.seen is not None:
        if past != memory.seen:
            raise ValueError(
                f"saefeat: the key-value cache holds {past} columns where {memory.seen} have been"
                " seen, so tokens that were edited and read have been taken back. Likely cause:"
                " assisted generation, or a cache cropped between passes. Try: generate without an"
                " assistant, or begin anew for each sequence."
            )
        memory.blocks = memory.blocks or columns > 1
    memory.seen = past + columns
    memory.prompt = memory.prompt or past + columns


def past_length(cache: Any) -> int:
    """How many columns a key-value cache holds; none without a cache. A number is that number."""
    if isinstance(cache, int):
        return cache
    return 0 if cache is None else int(cache.get_seq_length())


def require_sequential(kwargs: dict[str, Any]) -> None:
    """Refuse a forward pass whose columns are not simply the next tokens of one text a row.

    transformers' generate passes ``return_dict`` on every path but one: assisted generation and
    prompt lookup, which feed guesses and take them back (5.23, tried).
    """
    cached = kwargs.get("past_key_values") is not None and "use_cache" in kwargs
    if cached and "logits_to_keep" in kwargs and "return_dict" not in kwargs:
        raise ValueError(
            "saefeat: this forward pass may hold guessed tokens that are taken back later, which"
            " would be edited, read and counted. Likely cause: assisted generation or prompt"
            " lookup. Try: generate without assistant_model and prompt_lookup_num_tokens; in a"
            " loop of your own, call the model with return_dict=True."
        )
    places = kwargs.get("position_ids")
    packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
    if isinstance(places, Tensor) and places.ndim == 2 and places.shape[1] > 1 and not packed:
        falls = places[:, 1:] < places[:, :-1]  # a left pad's place is 0 or 1, whichever it is
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            falls = falls & (mask[:, -places.shape[1] :][:, :-1] != 0).to(falls.device)
        packed = bool(falls.any())
    if packed:
        raise ValueError(
            "saefeat: several texts lie in one row of this forward pass, and positions are counted"
            " along the row. Likely cause: packed sequences (position_ids that start again). Try:"
            " one text a row, padded, with an attention mask."
        )


def follow_rows(cache: Any, memory: Memory) -> None:
    """Move what is remembered by row along with the rows of the key-value cache.

    Beam search drops and copies rows between passes, and tells nobody but the cache. So the cache's
    own reordering is made to reorder the memory too; a cache lives for one generation.
    """
    if cache is None or not hasattr(cache, "reorder_cache"):
        return
    followers = cache.__dict__.setdefault("followers", [])
    if not followers:
        reorder = cache.reorder_cache

        def reorder_all(rows: Any) -> None:
            reorder(rows)
            for follower in followers:
                follower.reorder(rows)

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


def reordered(value: Any, rows: Any) -> Any:
    """What is remembered by row with other rows; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(reordered(part, rows) for part in value)
    if isinstance(value, Tensor) and len(value) == len(rows):
        return value.index_select(0, rows.to(value.device))
    return value
