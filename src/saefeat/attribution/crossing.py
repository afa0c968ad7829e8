"""Modules that gradients do not cross: each would take its part out of every score behind it.

A module under ``torch.no_grad``, or one that detaches, still lets gradients by on the residual
stream, so the scores would be finite, plausible and partial. Its output tells: the input has a
graph and what comes out has none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import GradientError


@contextmanager
def crossed(function: str, model: nn.Module) -> Iterator[None]:
    """Within the block, refuse a forward pass in which a gradient ends at a module.

    Raises:
        GradientError: naming the module.
    """
    with ExitStack() as stack:
        _look(stack, function, model)
        yield


def crossed_now(function: str, model: nn.Module, owner: object) -> ExitStack:
    """The same in what is left of the forward pass that is under way.

    Each hook leaves with its module's first call, and all when the stack is closed, when a gradient
    ends, or with ``owner``: torch does not look for new hooks on the whole model by then.
    """
    stack = ExitStack()
    _look(stack, function, model, once=True)
    weakref.finalize(owner, stack.close)
    return stack


def _look(stack: ExitStack, function: str, model: nn.Module, once: bool = False) -> None:
    """Look at what each module gives until the stack is closed."""
    for name, module in model.named_modules():
        if not _is_table(module):
            look = _Look(function, name, stack)
            look.handle = module.register_forward_hook(look, with_kwargs=True)
            look.once = once
            stack.callback(look.handle.remove)


def _is_table(module: nn.Module) -> bool:
    """Whether a module only gives constants, such as rotary angles: it reads its input's dtype.

    A layer with packed weights has no parameters either, but matrices or integers for buffers.
    """
    buffers = list(module.buffers())
    constants = all(buffer.is_floating_point() and buffer.ndim < 2 for buffer in buffers)
    return next(module.parameters(), None) is None and bool(buffers) and constants


class _Look:
    """A hook that refuses a module's output without a graph where its input has one."""

    handle: RemovableHandle
    once: bool

    def __init__(self, function: str, name: str, stack: ExitStack) -> None:
        self._function, self._name, self._stack = function, name, stack

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.once:
            self.handle.remove()
        given = any(x.requires_grad for x in _floats([*args, *kwargs.values()]))
        made = list(_floats(output if isinstance(output, tuple) else [output]))
        if given and made and not any(x.requires_grad for x in made):
            self._stack.close()
            _refuse(self._function, self._name, module)


def _refuse(function: str, name: str, module: nn.Module) -> None:
    raise GradientError(
        f"{function}: `model` is one in which gradients end at {name or type(module).__name__}, a"
        f" {type(module).__name__}, wanted modules that they cross: its part would be missing from"
        " the scores. Likely cause: torch.no_grad, torch.inference_mode or detach in its forward."
        " Try: the module without it; or, for few latents, method=Exact() or FiniteDifference(),"
        " which take no gradient"
    )


def _floats(values: Iterable[Any]) -> Iterator[Tensor]:
    return (x for x in values if isinstance(x, Tensor) and torch.is_floating_point(x))
