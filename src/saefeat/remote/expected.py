"""How many tokens each step will act on, as far as that is known before a run.

Which tokens of a prompt a rule selects is known exactly, by the kernel's own rules on the real ids
and masks. Of a token that is still to be generated its place is known, and not what it will be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernel.program import Program
from ..kernel.read import Read
from ..kernel.tokens import matches, select
from ..kernel.view import Memory, View, window
from ..values.patch import Patch
from ..verbs.base import Intervention
from ..verbs.steps import StepBase, numbered


class Expected(NamedTuple):
    """What a step will act on: the least and the most tokens, in prompts and in generated text."""

    step: str
    prompt: tuple[int, int]
    generated: tuple[int, int]

    @property
    def least(self) -> int:
        """At least so many tokens in all."""
        return self.prompt[0] + self.generated[0]

    @property
    def most(self) -> int:
        """At most so many."""
        return self.prompt[1] + self.generated[1]

    def __str__(self) -> str:
        late = f", {_span(self.generated)} generated" if self.generated[1] else ""
        return f"{_span(self.prompt)} prompt tokens{late}"


def _span(ends: tuple[int, int]) -> str:
    least, most = ends
    return f"{most:,}" if least == most else f"{least:,}..{most:,}"


def expected(
    intervention: Intervention,
    program: Program,
    batches: Sequence[dict[str, Tensor]],
    new: int,
    stops: Sequence[int],
) -> tuple[Expected, ...]:
    """For each step, the tokens it will act on in all batches.

    A condition, or a value that is given for some tokens alone, may leave none of those its rule
    selects. A generated token is fed back but for the last one, unless a stop token comes first.
    """
    rules = {
        action.number: action.tokens.rule for action in program.actions if isinstance(action, Read)
    }
    prompts: dict[int, int] = dict.fromkeys(rules, 0)
    late: dict[int, tuple[int, int]] = dict.fromkeys(rules, (0, 0))
    for batch in batches:
        shape = (batch["input_ids"].shape[0], batch["input_ids"].shape[1])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        view = window(ids, mask, shape, 0, Memory(), program.ends)
        after = generated(view.lengths, max(new - 1, 0))
        for number, rule in rules.items():
            prompts[number] += int(select(rule, view).sum())
            some, every = (int(m.sum()) for m in reversed(bounds(rule, after)))
            late[number] = (late[number][0] + (0 if stops else every), late[number][1] + some)
    return tuple(
        _of_step(step, [prompts[n] for n in numbers], [late[n] for n in numbers])
        for step, numbers in numbered(intervention.parts())
    )


def _of_step(step: StepBase, prompts: list[int], late: list[tuple[int, int]]) -> Expected:
    """A step's dictionaries together, counted as a receipt does: by the one that acts most."""
    values = () if step.change is None else step.change
    open_ended = step.condition is not None or any(isinstance(v, Patch) for v in values)
    least, most = max((low for low, _ in late), default=0), max((m for _, m in late), default=0)
    prompt = max(prompts, default=0)
    floor = (0, 0) if open_ended else (prompt, least)
    return Expected(repr(step), (floor[0], prompt), (floor[1], most))


def generated(lengths: Tensor, count: int) -> View:
    """The view [b, count] of tokens that come after prompts of these lengths [b, 1]."""
    position = lengths + torch.arange(count)
    real = torch.ones_like(position, dtype=torch.bool)
    return View(
        ids=None, position=position, shown=real, real=real, lengths=lengths, whole=False,
        begins=False, memory=Memory(lengths), selected={},
    )  # fmt: skip


def bounds(rule: tuple, view: View) -> tuple[Tensor, Tensor]:
    """[b, t] twice: where a rule surely selects tokens of unknown ids, and where it may."""
    kind, *rest = rule
    if kind == "not":
        sure, may = bounds(rest[0], view)
        return ~may, ~sure
    if kind in ("and", "or"):
        (a, b), (c, d) = bounds(rest[0], view), bounds(rest[1], view)
        return (a & c, b & d) if kind == "and" else (a | c, b | d)
    if kind in ("all", "prompt", "first", "last", "generated"):
        found = matches(rule, view)
        return found, found
    shape = torch.zeros_like(view.position, dtype=torch.bool)
    return shape, ~shape
