"""Hooks that act on a Hugging Face module while a block lasts, and on no copy of it.

A site's value counts only inside a forward pass of the whole model: that pass says which tokens the
value belongs to. ``generate`` is watched too, for what its passes do not tell: that another text
begins, which tokens end a row, and that beams are searched.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from ..generation.decoding import require_beamable
from ..generation.task import no_numbers
from ..kernel.program import Program, Visit, generating
from ..kernel.sequences import Sequences, require_own_loop
from ..kernel.state import Log, State, cache_of, require_sequential, window
from ..verbs.base import Intervention
from ..verbs.lower import ends_of
from .virtual import require_real_tokens


class Hooks:
    """What the hooks of one program on one model share.

    Attributes:
        log: what the program's actions record.
        called: whether the model was called at all, also by a pass that was refused.
        broken: whether any pass gave logits that are no numbers, a bool on the model's device; it
            is looked at when the block ends, since a look at each pass would wait for it.
    """

    broken: Tensor | None

    def __init__(
        self, around: Sequence[nn.Module], intervention: Intervention, program: Program
    ) -> None:
        self.log, self.called, self.broken = Log(), False, None
        self._around, self._module = around, around[-1]
        self._intervention, self._program = intervention, program
        self._entry: nn.Module | None = None  # what the pass that is under way began with
        self._sequences, self._ends = Sequences(), program.ends
        self._state: State | None = None  # of the forward pass that is under way
        self._running: dict[str, int] = {}  # "thread": the one whose pass is under way
        self._decodes = False  # whether a generation is under way
        self._left: set[tuple[str, str]] = set()

    def put(self, stack: ExitStack) -> None:
        """Put the hooks on the model until the stack is closed."""
        module = self._module
        for caller in self._around:
            begin = caller.register_forward_pre_hook(_Hook(caller, self._begin), with_kwargs=True)
            stack.callback(begin.remove)
        for visit in self._program.visits:
            stack.callback(self._at(visit).remove)
        for caller in self._around:
            end = caller.register_forward_hook(_Hook(caller, self._end), always_call=True)
            stack.callback(end.remove)
        generate: Any = getattr(module, "generate", None)
        if generate is not None:
            before = vars(module).get("generate")
            vars(module)["generate"] = _Generate(module, partial(self._generate, generate))
            stack.callback(_put_back, module, before)

    def _at(self, visit: Visit) -> Any:
        """One hook on the module of a visit, at its input or its output."""
        target = self._module.get_submodule(visit.path)
        if visit.end == "input":
            hook = _Hook(target, partial(self._on_input, visit))
            return target.register_forward_pre_hook(hook, with_kwargs=True)
        return target.register_forward_hook(_Hook(target, partial(self._on_output, visit)))

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """At the start of a forward pass: where are we in which sequence?"""
        self.called = True
        own = threading.get_ident()
        if self._running.setdefault("thread", own) != own:  # in one step: no thread comes between
            raise ModelError(
                "hooked: `model` is called by two threads at once, wanted one forward pass after"
                " the other. Likely cause: a server or a data loader that runs the model in"
                " threads. Try: a lock around the calls, or a model for each"
            )
        if self._entry is not None and module is not self._entry:  # a wrapper's pass, under way
            return
        named = _by_name(module, self._module, args, kwargs)
        require_sequential(named)
        ids, mask, cache = named.get("input_ids"), named.get("attention_mask"), cache_of(named)
        shown = ids if ids is not None else named["inputs_embeds"]
        # a `generate` that was bound before the block is not watched, but its passes tell of it
        shape, decodes = (
            (shown.shape[0], shown.shape[1]),
            self._decodes or generating(self._program.keeps, named),
        )
        memory, past = self._sequences.at(cache, shape, ids, decodes, one=self._decodes)
        if memory.seen is None and (past or ids is None):
            require_real_tokens(module)
        if self._program.beams is not None:
            self._program.beams.follow(cache, memory)
        view = window(ids, mask, shape, past, memory, self._ends)
        self._state = State(view, self.log, self._program.placed)
        self._entry = module
        self._left = {(visit.path, visit.end) for visit in self._program.visits}
        self.log.view = view
        self.log.passes += 1

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        """At the end of a forward pass, well or badly: was every site reached?"""
        if self._running.get("thread") != threading.get_ident():  # of a call that was refused
            return
        if self._entry is not None and module is not self._entry:  # within a wrapper's pass
            return
        state, self._state, self._entry = self._state, None, None
        self._running.clear()
        if state is None or output is None:  # the pass has failed
            return
        cache, memory = cache_of(output), state.view.memory
        self._sequences.keep(cache, memory)
        if self._program.beams is not None:
            self._program.beams.note(cache, memory)
        if self._left:
            path, end = min(self._left)
            raise ModelError(
                f"hooked: `model` is a {type(module).__name__} that did not pass through"
                f" {path}.{end}, wanted every site of the intervention reached in every forward"
                " pass. Likely cause: skipped layers, or code compiled before the hooks were there."
                " Try: hooked on the model as it was loaded"
            )
        self._look(output, state.view.real)

    def _look(self, output: Any, real: Tensor) -> None:
        """Note whether a pass gives numbers, at its real tokens: a pad's may be none."""
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
        # a tensor of a class of its own, such as a fake one, may have no numbers here to look at
        if type(logits) is not Tensor or logits.is_meta or logits.ndim != 3 or not logits.shape[1]:
            return
        bad = no_numbers(logits) & real[:, -logits.shape[1] :].to(logits.device)
        self.broken = bad.any() if self.broken is None else self.broken | bad.any()

    def _on_input(self, visit: Visit, _: nn.Module, args: tuple, kwargs: Any) -> Any:
        if args:
            return (self._act(visit, args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._act(visit, kwargs[name])}

    def _on_output(self, visit: Visit, _: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._act(visit, output)
        return (self._act(visit, output[0]), *output[1:])

    def _act(self, visit: Visit, x: Tensor) -> Tensor:
        """At one place."""
        if self._state is None or self._running.get("thread") != threading.get_ident():
            raise ModelError(
                f"hooked: `model` is called in part: {visit.path} runs outside of a forward pass of"
                f" the {type(self._module).__name__}, wanted calls of the whole model, which say"
                " whose tokens these are. Likely cause: model.model(...), a layer called alone, or"
                " a wrapper such as a PeftModel, which skips the model's own call. Try: call the"
                " model that hooked was given"
            )
        self._left.discard((visit.path, visit.end))
        return visit.act(x, self._state)

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``: each call begins a text of its own."""
        require_own_loop(kwargs)
        config = _settings(self._module, kwargs)
        require_beamable("hooked", self._intervention, config.num_beams or 1)
        before = self._sequences, self._ends, self._decodes
        otherwise = bool(config.stop_strings) or kwargs.get("stopping_criteria") is not None
        self._sequences, self._decodes = Sequences(), True
        self._ends = ends_of(config).replace(honored=True, otherwise=otherwise)
        try:
            return generate(*args, **kwargs)
        finally:
            begun = self._sequences
            self._sequences, self._ends, self._decodes = before
            self._sequences.take(begun)


def _settings(module: Any, kwargs: dict[str, Any]) -> Any:
    """The generation configuration that a call of ``generate`` with these arguments uses."""
    given = kwargs.get("generation_config")
    config = copy.deepcopy(module.generation_config if given is None else given)
    config.update(**module.generation_config.to_dict(), defaults_only=True)
    config.update(**kwargs)
    return config


def _by_name(
    module: nn.Module, inside: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name: what stands second is Llama's mask, and GPT-2's cache.

    A wrapper that names none hands them on to the model inside.
    """
    names = _names(module) or _names(inside) or ["input_ids"]
    return dict(zip(names, args, strict=False)) | kwargs


def _names(module: nn.Module) -> list[str]:
    # of the class: transformers' decorators make a bound method's signature begin with self
    _, *listed = inspect.signature(type(module).forward).parameters.values()
    return [one.name for one in listed if one.kind is one.POSITIONAL_OR_KEYWORD]


# ---------------------------------------------------------------- copies


class _Hook:
    """A hook on a module. In a copy of the module it does nothing, and it is taken off there."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module, self._call = module, call

    def __call__(self, module: nn.Module, *rest: Any) -> Any:
        return self._call(module, *rest) if module is self._module else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        strip_when_copied(self._module, memo)
        return _NOTHING

    def __reduce__(self) -> Any:  # needs nothing of this library where it is read
        return getattr, (nullcontext(), "__exit__")


class _Generate:
    """A model's ``generate``, watched. A copy of the model has its own back."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        strip_when_copied(self._module, memo)
        return memo.get(id(self._module), self._module).generate

    def __reduce__(self) -> Any:
        return getattr, (self._module, "generate")


_NOTHING = nullcontext().__exit__
"""A hook that takes anything and changes nothing."""


class _Copied:
    """Lives as long as the memo of a deepcopy."""


def strip_when_copied(module: nn.Module, memo: dict[int, Any]) -> None:
    """Take our hooks off a module's copy as soon as it is complete: when the memo is let go."""
    made = memo.get(id(module))
    if made is None:  # the hook is copied without its module
        return
    marker = _Copied()
    memo[id(marker)] = marker
    weakref.finalize(marker, _strip, made)


def _strip(module: nn.Module) -> None:
    state = vars(module)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        for number in [n for n, hook in state.get(name, {}).items() if hook is _NOTHING]:
            tables = [table for key, table in state.items() if key.startswith(name)]
            for table in tables:
                table.pop(number, None)
    if getattr(state.get("generate"), "__self__", None) is module:
        del state["generate"]


def _put_back(module: nn.Module, before: Any) -> None:
    vars(module).pop("generate", None)
    if before is not None:
        vars(module)["generate"] = before
