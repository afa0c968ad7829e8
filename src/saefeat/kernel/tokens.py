"""Which positions a token rule selects.

Positions are absolute sequence coordinates of real tokens, resolved for each row through the
attention mask and the prompt's length: a left pad has no position, and a decode step's single
column is not position 0. A rule is a nested tuple, so that it travels as plain data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


def window(
    ids: Int[Tensor, "b t"] | None,
    attention_mask: Any,
    shape: tuple[int, int],
    past: int,
    before: dict[str, Any] | None,
    ends: dict[str, Any] | None,
) -> dict[str, Any]:
    """What this forward pass shows of the sequence: b rows, the newest t columns of s.

    Args:
        ids: the tokens fed in this pass, or None for embeddings.
        attention_mask: [b, s] over past and new columns, or None. generate drops a mask of ones,
            and then ``past`` is all that tells a new token from the first.
        shape: (b, t).
        past: how many columns the key-value cache already holds.
        before: the view of the pass before, or what is known of one.
        ends: what a finished row looks like (see ``finished``), or None.

    Returns:
        ``ids`` [b, t] (or None), ``position`` [b, t], ``shown`` [b, t], what is no padding,
        ``real`` [b, t], what of it belongs to a row that is not finished, and ``lengths`` [b, 1],
        the prompts' lengths in real tokens, counted on the first pass. ``selected`` remembers for
        this pass what each rule selected; ``memory`` what later passes must know; ``whole`` is
        true where the pass shows the sequence from its start, ``begins`` where it is its first.
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
    known = before or {"lengths": (attention_mask != 0).sum(1, keepdim=True), "memory": {}}
    lengths, memory = known["lengths"].to(position.device), known["memory"]
    count_columns(memory, past, columns)
    if ids is not None:  # with a cache a pass shows only new tokens; rules may look further back
        whole = ids.shape[1] == attention_mask.shape[1] or "ids" not in memory
        memory["ids"] = ids if whole else torch.cat([memory["ids"].to(ids.device), ids], 1)
        if ends is not None:
            real = real & ~finished(ids, position >= lengths, ends, memory)
    found = {"ids": ids, "position": position, "shown": shown, "real": real, "lengths": lengths}
    begins = "position" not in known
    return {**found, "whole": past == 0, "begins": begins, "selected": {}, "memory": memory}


def narrowed(view: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The view of some rows alone, made once a pass; it has a memory of its own."""
    key = ("rows", start, stop)
    if key not in view["selected"]:
        names = ("ids", "position", "shown", "real", "lengths")
        part = {name: None if view[name] is None else view[name][start:stop] for name in names}
        shared = view["memory"]
        memory = shared.setdefault(key, {})
        memory |= {name: shared[name] for name in ("seen", "prompt", "blocks") if name in shared}
        if "ids" in shared:
            memory["ids"] = shared["ids"][start:stop]
        view["selected"][key] = {**view, **part, "selected": {}, "memory": memory}
    return view["selected"][key]


def count_columns(memory: dict[str, Any], past: int, columns: int) -> None:
    """Keep account of the columns of a sequence, pass by pass.

    ``seen`` columns have been shown so far, ``prompt`` in the first pass. ``blocks`` is true once a
    pass has added several to a sequence already begun: then the first pass was not all of the
    prompt, and nobody can tell where the prompt ended (see ``whole_prompt``).
    """
    seen = memory.get("seen")
    if past and seen is not None:
        if past != seen:
            raise ValueError(
                f"saefeat: the key-value cache holds {past} columns where {seen} have been seen, so"
                " tokens that were edited and read have been taken back. Likely cause: assisted"
                " generation, or a cache cropped between passes. Try: generate without an"
                " assistant, or begin anew for each sequence."
            )
        memory["blocks"] = memory.get("blocks", False) or columns > 1
    memory["seen"] = past + columns
    memory.setdefault("prompt", past + columns)


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


def finished(
    ids: Int[Tensor, "b t"],
    generated: Bool[Tensor, "b t"],
    ends: dict[str, Any],
    memory: dict[str, Any],
) -> Bool[Tensor, "b t"]:
    """Columns with which a finished row is filled while other rows go on generating.

    ``ends`` holds ``stops``, the ids that end a row, ``pad``, the id it is filled with, and
    ``honored``: whether generation is known to stop there. Then the stop token itself, fed back
    only because other rows go on, is filling too. Where it is not known, filling is padding
    behind a stop, so that a caller who ignores stop tokens has every token edited.
    """
    stops = torch.tensor(ends["stops"], dtype=ids.dtype, device=ids.device)
    stop = torch.isin(ids, stops) & generated
    carry = memory.get("stopped", torch.zeros_like(stop[:, :1])).to(ids.device)
    over = stop.int().cummax(1).values.bool() | carry
    memory["stopped"] = over[:, -1:]
    if ends["honored"]:
        return over
    behind = torch.cat([carry, over[:, :-1]], 1)
    return behind & (ids == ends["pad"])


def follow_rows(cache: Any, memory: dict[Any, Any]) -> None:
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
                for name, value in follower.items():
                    follower[name] = reordered(value, rows)

        cache.reorder_cache = reorder_all
    if not any(follower is memory for follower in followers):
        followers.append(memory)


def reordered(value: Any, rows: Any) -> Any:
    """What is remembered by row with other rows; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(reordered(part, rows) for part in value)
    if isinstance(value, Tensor) and len(value) == len(rows):
        return value.index_select(0, rows.to(value.device))
    return value


def remembers(program: dict[str, Any]) -> bool:
    """Whether an action looks back over its row, so that beams must be followed."""
    if "remembers" not in program:  # asked at every pass
        program["remembers"] = looks_back(program)
    return program["remembers"]


def looks_back(program: dict[str, Any]) -> bool:
    """Whether any action must know passes before its own.

    A held condition must, a chat role, and a latent that depends on every token before its own.
    """
    actions = [action for visit in program["visits"] for action in visit["actions"]]
    rules = [action["rule"] for action in actions if "rule" in action]
    held = any(a.get("hold") or a.get("tensors", {}).get("prefix") for a in actions)
    return held or any(map(reads_turns, rules))


def reads_turns(rule: tuple) -> bool:
    """Whether a rule holds a role's turns, somewhere."""
    kind, *rest = rule
    nested = kind in ("not", "and", "or")
    return kind == "between" or (nested and any(reads_turns(part) for part in rest))


def past_length(cache: Any) -> int:
    """How many columns a key-value cache holds; none without a cache. A number is that number."""
    if isinstance(cache, int):
        return cache
    return 0 if cache is None else int(cache.get_seq_length())


def select(rule: tuple, view: dict[str, Any]) -> Bool[Tensor, "b t"]:
    """The positions the rule selects among the real tokens of this pass."""
    return matches(rule, view) & view["real"]


def matches(rule: tuple, view: dict[str, Any]) -> Bool[Tensor, "b t"]:
    """The rule alone, before padding is taken away."""
    kind, *rest = rule
    position, lengths = view["position"], view["lengths"]
    if kind == "all":
        return torch.ones_like(position, dtype=torch.bool)
    if kind == "not":
        return ~matches(rest[0], view)
    if kind == "and":
        return matches(rest[0], view) & matches(rest[1], view)
    if kind == "or":
        return matches(rest[0], view) | matches(rest[1], view)
    if kind in ("prompt", "first", "last", "generated"):
        whole_prompt(view)
    if kind == "prompt":
        return position < lengths
    if kind == "first":
        return (position < rest[0]) & (position < lengths)
    if kind == "last":
        return (position >= lengths - rest[0]) & (position < lengths)
    if kind == "generated":
        start, stop = rest
        late = position >= lengths + start
        return late if stop is None else late & (position < lengths + stop)
    if view["ids"] is None:
        raise ValueError(
            "saefeat: this token rule looks at token ids, but the model was called with"
            " embeddings. Try: call it with input_ids, or use a rule over positions."
        )
    if kind == "between":
        whole_text(view)
        return between(view["memory"]["ids"], *rest)[:, -position.shape[1] :]
    if kind == "ids":
        wanted = torch.tensor(rest[0], dtype=view["ids"].dtype, device=view["ids"].device)
        return torch.isin(view["ids"], wanted)
    return rest[0](view["ids"], position).to(torch.bool)


def whole_prompt(view: dict[str, Any]) -> None:
    """Refuse a rule that counts from the prompt's end where that end is not known."""
    if view["memory"].get("blocks"):
        raise ValueError(
            "saefeat: this token rule needs the prompt's length, but several tokens came after the"
            " first forward pass at once, so the first was not all of the prompt. Likely cause:"
            " prefill_chunk_size, or a second turn on the same cache. Try: the whole prompt in one"
            " pass, a `hooked` block for each turn, or a rule that needs no length (Tokens.all,"
            " Tokens.ids)."
        )


def whole_text(view: dict[str, Any]) -> None:
    """Refuse a rule over the text before this pass where its tokens were never shown."""
    memory = view["memory"]
    if memory["ids"].shape[1] != memory.get("seen", memory["ids"].shape[1]):
        raise ValueError(
            "saefeat: this token rule looks back over the whole text, but the model was given a"
            " key-value cache or embeddings for part of it. Try: run the whole text under the"
            " intervention, or use a rule over positions."
        )


def between(
    ids: Int[Tensor, "b s"], start: tuple[int, ...], stop: tuple[int, ...]
) -> Bool[Tensor, "b s"]:
    """Tokens after a run of ids ``start`` and before the next run ``stop``, in every row."""
    place = torch.arange(ids.shape[1], device=ids.device)
    opened = torch.where(runs(ids, start), place + len(start), -1).cummax(1).values
    closed = torch.where(runs(ids, stop), place, -1).cummax(1).values
    return (opened >= 0) & (opened <= place) & (closed < opened)


def runs(ids: Int[Tensor, "b s"], wanted: tuple[int, ...]) -> Bool[Tensor, "b s"]:
    """Where a run of ids begins."""
    found = torch.ones_like(ids, dtype=torch.bool)
    for offset, token in enumerate(wanted):
        shifted = torch.full_like(ids, -1)
        shifted[:, : ids.shape[1] - offset] = ids[:, offset:]
        found &= shifted == token
    return found
