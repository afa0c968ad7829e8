"""edit and hooked: an intervention that stays on a model, whoever calls the model then."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import FiringError, ModelError
from ..kernel.program import Program, Visit, generating
from ..kernel.state import Log, Memory, State, past_length, require_sequential, window
from ..model.modules import torch_module
from ..model.sharded import require_whole
from ..shipping.program import Carried
from ..verbs.base import Intervention
from ..verbs.lower import lower

if TYPE_CHECKING:
    from nnsight import TransformersModel


def edit(model: TransformersModel, intervention: Intervention) -> Any:
    """A copy of the model that applies the intervention to every token of every run.

    The copy shares the weights; the original is untouched. Several edits stack, in order. The copy
    is used like any nnsight model: ``trace``, ``generate``, ``session``, remotely.

    Args:
        model: an nnsight ``TransformersModel``.
        intervention: what to apply. Readings are not returned this way: use ``run`` or apply the
            probe inside the block.

    Returns:
        The edited copy.

    Raises:
        SiteError: a layer the model lacks, or a dictionary of another width.
        ModelError: an unknown family, or train mode with dropout.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> edited = sf.edit(model, sf.Ablate(saes.latents({1: [0, 1]})))
        >>> with edited.trace("how do i bake bread"):
        ...     logits = nnsight.save(edited.output.logits)
        >>> logits.ndim
        3
    """
    carried = Carried(lower(intervention, model), model)
    with model.edit() as (_, edited):
        carried(edited)
    return edited


@contextmanager
def hooked(model: nn.Module, intervention: Intervention) -> Iterator[Log]:
    """Apply an intervention to every forward pass made inside the ``with`` block.

    Args:
        model: a Hugging Face module (an nnsight model's module is used if one is passed).
        intervention: what to apply.

    Yields:
        The log, for ``intervention.readings(log)``, of the last sequence run, and
        ``intervention.receipt(log)``, of all. Hooks are gone when the block ends, also after an
        error or Ctrl-C.

    Raises:
        SiteError: a layer the model lacks, a dictionary of another width, or a place that a
            tensor-parallel model has spread over processes.
        ModelError: an unknown family, or train mode with dropout; a forward pass that does not
            reach every site.
        FiringError: if no forward pass was made at all: results came from somewhere else.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model, tokenizer = tiny.load("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> batch = tokenizer(["how do i bake bread"], return_tensors="pt")
        >>> probe = sf.Probe(saes.latents({1: [0]}))
        >>> with torch.no_grad(), sf.hooked(model, probe) as log:
        ...     _ = model(**batch)
        >>> probe.readings(log)[0].values.shape[0]
        1
    """
    module = torch_module(model)
    program = lower(intervention, model)
    for visit in program.visits:
        require_whole(module, visit.path, visit.end)
    hooks = _Hooks(program)
    with ExitStack() as stack:
        start = module.register_forward_pre_hook(hooks.begin, with_kwargs=True)
        stack.callback(start.remove)
        for visit in program.visits:
            stack.callback(_install(module, visit, hooks).remove)
        stack.callback(module.register_forward_hook(hooks.end).remove)
        yield hooks.log
    if not hooks.called:
        raise FiringError(
            "hooked: `model` is never called inside the block, wanted at least one forward pass."
            " Likely cause: results from a cache, or another copy of the model was called. Try:"
            " with hooked(model, intervention): model(...)"
        )


class _Hooks:
    """What the hooks of one program share."""

    def __init__(self, program: Program) -> None:
        self.program, self.log = program, Log()
        self.memory: Memory | None = None
        self.state: State | None = None
        self.left: set[tuple[str, str]] = set()
        self.called = False

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """At the start of a forward pass: where are we in the sequence?"""
        self.called = True  # also by a pass that is refused below
        kwargs = _by_name(module, args, kwargs)
        require_sequential(kwargs)
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        shown = ids if ids is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past, shape = past_length(cache), (shown.shape[0], shown.shape[1])
        if self.memory is None or not _continues(module, self.memory, past, shape, ids, kwargs):
            self.memory = Memory()
        view = window(ids, mask, shape, past, self.memory, self.program.ends)
        if self.program.beams is not None:
            self.program.beams.follow(cache, self.memory)
        self.state = State(view, self.log, self.program.placed)
        self.left = {(visit.path, visit.end) for visit in self.program.visits}
        self.log.view = view
        self.log.passes += 1

    def end(self, module: nn.Module, _: Any, __: Any) -> None:
        """At the end of a forward pass: was every site reached?"""
        if not self.left:
            return
        path, end = min(self.left)
        raise ModelError(
            f"hooked: `model` is a {type(module).__name__} that did not pass through {path}.{end},"
            " wanted every site of the intervention reached in every forward pass. Likely cause:"
            " skipped layers, or code compiled before the hooks were there. Try: hooked on the"
            " model as it was loaded"
        )

    def act(self, visit: Visit, x: Tensor) -> Tensor:
        """At one place."""
        assert self.state is not None
        self.left.discard((visit.path, visit.end))
        return visit.act(x, self.state)


def _by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name: what stands second is Llama's mask, and GPT-2's cache."""
    # of the class: transformers' decorators make a bound method's signature begin with self
    _, *listed = inspect.signature(type(module).forward).parameters.values()
    names = [one.name for one in listed if one.kind is one.POSITIONAL_OR_KEYWORD]
    return dict(zip(names or ["input_ids"], args, strict=False)) | kwargs


def _continues(
    module: nn.Module,
    memory: Memory,
    past: int,
    shape: tuple[int, int],
    ids: Tensor | None,
    kwargs: Any,
) -> bool:
    """Whether a pass goes on with the sequence of the pass before.

    With a cache, if the cache holds just what has been seen here; without one, if generate feeds
    the last sequence with one token more. Beams change rows within a prompt's own, so what is
    compared then is the prompt.
    """
    assert memory.lengths is not None and memory.seen is not None
    if len(memory.lengths) != shape[0]:
        return False
    if past:
        return memory.seen == past
    last = memory.ids
    if not generating(module, kwargs) or last is None or ids is None or memory.seen + 1 != shape[1]:
        return False
    return torch.equal(ids[:, : memory.prompt], last[:, : memory.prompt])


def _install(module: nn.Module, visit: Visit, hooks: _Hooks) -> Any:
    """One hook on the module of a visit, at its input or its output."""
    target = module.get_submodule(visit.path)
    if visit.end == "input":
        return target.register_forward_pre_hook(partial(_on_input, visit, hooks), with_kwargs=True)
    return target.register_forward_hook(partial(_on_output, visit, hooks))


def _on_input(visit: Visit, hooks: _Hooks, _: nn.Module, args: tuple, kwargs: Any) -> Any:
    if args:
        return (hooks.act(visit, args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: hooks.act(visit, kwargs[name])}


def _on_output(visit: Visit, hooks: _Hooks, _: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, Tensor):
        return hooks.act(visit, output)
    return (hooks.act(visit, output[0]), *output[1:])
