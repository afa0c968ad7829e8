"""Which positions a token rule selects.

Positions are absolute sequence coordinates of real tokens, resolved for each row through the
attention mask and the prompt's length: a left pad has no position, and a decode step's single
column is not position 0. A rule is a nested tuple, so that it travels as plain data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import SaefeatError
from .frozen import Frozen
from .state import View

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


class Everywhere(Frozen):
    """Every real token: the rule of most edits, which needs none of the others to travel."""

    rule: tuple = ("all",)

    def at(self, view: View, device: torch.device) -> tuple[Bool[Tensor, "b t 1"], bool]:
        """The tokens, and whether they are all of the pass."""
        if self.rule not in view.selected:
            view.selected[self.rule] = (view.real.unsqueeze(-1), bool(view.real.all()))
        mask, everywhere = view.selected[self.rule]
        return mask.to(device), everywhere


class Where(Frozen):
    """The tokens that a rule selects."""

    rule: tuple

    def at(self, view: View, device: torch.device) -> tuple[Bool[Tensor, "b t 1"], bool]:
        """The tokens, and whether they are all of the pass."""
        return selected(self.rule, view, device)


def select(rule: tuple, view: View) -> Bool[Tensor, "b t"]:
    """The positions the rule selects among the real tokens of this pass."""
    return matches(rule, view) & view.real


def matches(rule: tuple, view: View) -> Bool[Tensor, "b t"]:
    """The rule alone, before padding is taken away."""
    kind, *rest = rule
    position, lengths = view.position, view.lengths
    if kind == "all":
        return torch.ones_like(position, dtype=torch.bool)
    if kind == "positions":  # of the whole text: needs no prompt's length, unlike the next ones
        start, stop = rest
        late = position >= start
        return late if stop is None else late & (position < stop)
    if kind == "not":
        return ~matches(rest[0], view)
    if kind == "and":
        return matches(rest[0], view) & matches(rest[1], view)
    if kind == "or":
        return matches(rest[0], view) | matches(rest[1], view)
    if kind in ("prompt", "last", "generated"):
        whole_prompt(view)
    if kind == "prompt":
        return position < lengths
    if kind == "first":
        early = (position < rest[0]) & view.shown
        if view.memory.blocks and bool(
            early.any()
        ):  # later positions are none of the first, however long the prompt
            whole_prompt(view)
        return early & (position < lengths)
    if kind == "last":
        return (position >= lengths - rest[0]) & (position < lengths)
    if kind == "generated":
        start, stop = rest
        late = position >= lengths + start
        return late if stop is None else late & (position < lengths + stop)
    if view.ids is None:
        raise SaefeatError(
            "saefeat: this token rule looks at token ids, but the model was called with"
            " embeddings. Try: call it with input_ids, or use a rule over positions."
        )
    if kind == "between":
        return between(whole_text(view), *rest)[:, -position.shape[1] :]
    if kind == "ids":
        wanted = torch.tensor(rest[0], dtype=view.ids.dtype, device=view.ids.device)
        return torch.isin(view.ids, wanted)
    return as_mask(rest[0](view.ids, position), position)


def as_mask(given: Any, position: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """What a function of ``Tokens.where`` gave: numbers are no truths, and a column is no mask."""
    shape = tuple(getattr(given, "shape", ()))
    if isinstance(given, Tensor) and given.dtype == torch.bool and shape == position.shape:
        return given
    raise SaefeatError(
        f"saefeat: a function of Tokens.where gave a {type(given).__name__} of shape {shape},"
        f" wanted a bool tensor {tuple(position.shape)}, as the ids it is given. Likely cause:"
        " numbers, an array or a column in place of a mask. Try: lambda ids, position: ids > 5"
    )


def selected(rule: tuple, view: View, device: torch.device) -> tuple[Bool[Tensor, "b t 1"], bool]:
    """Which tokens a rule selects, and whether that is all of them: once a pass for each rule.

    Most edits of a chain share a rule, and most rules select every token of a decode step.
    """
    if rule not in view.selected:
        mask = select(rule, view).unsqueeze(-1)
        view.selected[rule] = (mask.to(device), bool(mask.all()))
    mask, everywhere = view.selected[rule]
    return mask.to(device), everywhere


def reads_turns(rule: tuple) -> bool:
    """Whether a rule holds a role's turns, somewhere."""
    kind, *rest = rule
    nested = kind in ("not", "and", "or")
    return kind == "between" or (nested and any(reads_turns(part) for part in rest))


def whole_prompt(view: View) -> None:
    """Refuse a rule that counts from the prompt's end where that end is not known."""
    if view.memory.blocks:
        raise SaefeatError(
            "saefeat: this token rule needs the prompt's length, which is not known: several tokens"
            " came behind the first forward pass at once, or the first went on with a cache that"
            " was filled outside of the intervention. Likely cause: prefill_chunk_size, a second"
            " turn on the same cache, or a copy of a prefix's cache in a loop of your own. Try: the"
            " whole prompt in one pass; generate, which is given the whole prompt; or a rule that"
            " needs no length (Tokens.all, Tokens.ids)."
        )


def whole_text(view: View) -> Int[Tensor, "b s"]:
    """All tokens so far; an error where those before this pass were never shown."""
    ids, seen = view.memory.ids, view.memory.seen
    if ids is None or (seen is not None and ids.shape[1] != seen):
        raise SaefeatError(
            "saefeat: this token rule looks back over the whole text, but the model was given a"
            " key-value cache or embeddings for part of it. Try: run the whole text under the"
            " intervention, or use a rule over positions."
        )
    return ids


def between(ids: Int[Tensor, "b s"], start: tuple, stop: tuple) -> Bool[Tensor, "b s"]:
    """Tokens after a run of ids ``start`` and before the next run ``stop``, in every row.

    Either may be a tuple of runs, any of which opens or closes; of those that open at one token
    the longest counts.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    opened = closed = torch.full_like(ids, -1, dtype=torch.long)
    for run in start if isinstance(start[0], tuple) else (start,):
        opened = torch.where(runs(ids, run), place + len(run), opened).maximum(opened)
    for run in stop if isinstance(stop[0], tuple) else (stop,):
        closed = torch.where(runs(ids, run), place, closed)
    opened, closed = opened.cummax(1).values, closed.cummax(1).values
    return (opened >= 0) & (opened <= place) & (closed < opened)


def runs(ids: Int[Tensor, "b s"], wanted: tuple[int, ...]) -> Bool[Tensor, "b s"]:
    """Where a run of ids begins."""
    found = torch.ones_like(ids, dtype=torch.bool)
    for offset, token in enumerate(wanted):
        shifted = torch.full_like(ids, -1)
        shifted[:, : ids.shape[1] - offset] = ids[:, offset:]
        found &= shifted == token
    return found
