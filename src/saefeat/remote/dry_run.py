"""What a request will do, as far as that is known before it is sent.

A pass on fake tensors tells shapes, dtypes and sites, and no numbers. nnsight's own ``scan`` runs
the model, so a skeleton without weights will do, under the very program and kernel that travel.
Which tokens of a prompt a rule selects is known exactly, by the kernel's own rules on the real ids
and masks; of a token that is still to be generated its place is known, and not what it will be.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from nnsight.intervention.iterator import Iterations
from torch import Tensor

from ..kernel.program import Program, locate, visit_all
from ..kernel.read import Read
from ..kernel.state import Log, Memory, View, window
from ..kernel.tokens import matches, select, selected
from ..values.patch import Patch
from ..verbs.base import Intervention
from ..verbs.steps import StepBase, numbered

if TYPE_CHECKING:
    from nnsight import TransformersModel


class Dry(NamedTuple):
    """What a dry run found: what ``fails``, and what could not be ``untried``; empty is good."""

    fails: str = ""
    untried: str = ""


def dry_run(model: TransformersModel, program: Program, batch: dict[str, Tensor], new: int) -> Dry:
    """A prompt's pass, and one of a generated token where there are any, on fake tensors."""
    try:
        _passes(model, program, batch, new > 1)
    except Exception as error:
        if _asks_numbers(error):
            return Dry(untried=_short(error))
        try:  # a model that cannot be run so at all says nothing of the program
            _passes(model, program.replace(visits=()), batch, new > 1)
        except Exception as own:
            return Dry(untried=f"the model itself does not run on fake tensors: {_short(own)}")
        return Dry(fails=_short(error))
    return Dry()


def _asks_numbers(error: Exception) -> bool:
    """Whether code asked what a tensor holds: then nothing is known, for good or bad."""
    from torch._subclasses import fake_tensor  # as late as nnsight: it brings sympy
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    kinds = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedFakeTensorException,
        fake_tensor.UnsupportedOperatorException,
        GuardOnDataDependentSymNode,
    )
    words = ("FakeTensor", "tensor subclass", "meta tensor")  # how .numpy() and others refuse
    # a type checker's message shows the fake tensors it was given, which says nothing of them
    checker = type(error).__module__.partition(".")[0] in ("jaxtyping", "beartype")
    named = not checker and any(word in str(error) for word in words)
    return isinstance(error, kinds) or named


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _passes(
    model: TransformersModel, program: Program, batch: dict[str, Tensor], more: bool
) -> None:
    """One pass, or two, in nnsight's scan."""
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    views = [view for _, view in zip(range(1 + more), _views(program, batch), strict=False)]
    log = Log()
    with torch.no_grad(), model.scan(**batch, fn=partial(_called, model, more)):
        for number in Iterations()[: 1 + more]:
            if number and program.embedding:
                locate(model, program.embedding).input  # noqa: B018  (as the server's block does)
            visit_all(model, program, log, views[number], None, number == 0)


def _called(model: TransformersModel, more: bool, **inputs: Any) -> Any:
    """The model as ``generate`` calls it: for a prompt, then for one more token."""
    module = model._module
    takes = inspect.signature(module.forward).parameters
    own = {"use_cache": True, "logits_to_keep": 1}
    own = {name: value for name, value in own.items() if name in takes}
    out = module(**inputs, **own)
    if not more:
        return out
    mask = inputs["attention_mask"]
    late = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": out.past_key_values}
    late["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    if "position_ids" in inputs:
        late["position_ids"] = inputs["position_ids"][:, -1:] + 1
    return module(**late, **own)


def _views(program: Program, batch: dict[str, Tensor]) -> Iterator[View]:
    """The views of a prompt's pass and of those behind it, with real selections."""
    ids, mask, memory, past = batch["input_ids"], batch["attention_mask"], Memory(), 0
    rules = [action.tokens.rule for action in program.actions if isinstance(action, Read)]
    while True:
        shape = (ids.shape[0], ids.shape[1])
        view = window(ids, mask, shape, past, memory, program.ends)
        for rule in rules:
            selected(rule, view, ids.device)
        yield view
        past, ids = mask.shape[1], batch["input_ids"][:, -1:]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


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
    if kind in ("all", "positions", "prompt", "first", "last", "generated"):
        found = matches(rule, view)
        return found, found
    shape = torch.zeros_like(view.position, dtype=torch.bool)
    return shape, ~shape
