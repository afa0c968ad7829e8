"""A pass on fake tensors: shapes, dtypes and sites as they will be, and no numbers.

nnsight's own ``scan`` runs the model, so that a skeleton without weights will do. The program is
the one that is sent, and the kernel that applies it is the one that travels. Which tokens a rule
selects is worked out beforehand on the real ids; everything else there is fake.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from nnsight.intervention.iterator import Iterations
from torch import Tensor

from ..kernel.log import Log
from ..kernel.program import Program
from ..kernel.read import Read
from ..kernel.tokens import selected
from ..kernel.trace import locate, visits
from ..kernel.view import Memory, View, window

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
        return _blamed(model, program, batch, new > 1, error)
    return Dry()


def _blamed(
    model: TransformersModel,
    program: Program,
    batch: dict[str, Tensor],
    more: bool,
    error: Exception,
) -> Dry:
    """Whose fault a failure is: a model that cannot be run so says nothing of the program."""
    try:
        _passes(model, program.replace(visits=()), batch, more)
    except Exception as own:
        return Dry(untried=f"the model itself does not run on fake tensors: {_short(own)}")
    return Dry(fails=_short(error))


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
            visits(model, program, log, views[number], None, number == 0)


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
