"""Frozen values with typed fields, whose whole code has a source; and tensors where they are used.

``dataclass`` and ``NamedTuple`` write methods that have no source. nnsight would send those as
bytecode: 2.5 kB a class, and only the client's own version of Python could run it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, dataclass_transform

import torch
from torch import Tensor


def plainly(kind: str) -> Any:
    """A context in which products of float32 are float32 on a kind of device, also under autocast.

    Under autocast, as some servers run blocks, they would be bfloat16: other latents would fire.
    """
    # not every device knows of it; the meta device does not
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


AnyFrozen = TypeVar("AnyFrozen", bound="Frozen")
AnyTensors = TypeVar("AnyTensors")


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
class Frozen:
    """A frozen dataclass: fields are the class's annotations, given by keyword.

    Two of them are equal only if they are one object, since tensors have no single truth.
    """

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} is frozen")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in vars(self).items())})"

    def replace(self: AnyFrozen, **changes: Any) -> AnyFrozen:
        """The same value with other fields."""
        return type(self)(**(vars(self) | changes))


def mapped(value: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """The value with ``change(name, tensor)`` for every tensor in its fields and dictionaries."""
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, dict):
        return {key: mapped(part, change, key) for key, part in value.items()}
    if isinstance(value, Frozen):
        return value.replace(**mapped(vars(value), change))
    return value


class Placed:
    """Copies of a program's tensors where runs needed them, each made once.

    They are no part of a program: one that is pickled or copied begins without any.
    """

    copies: dict[Any, tuple[Any, Any]]

    def __init__(self) -> None:
        self.copies = {}

    def at(self, tensors: AnyTensors, x: Tensor) -> AnyTensors:
        """The tensors on the device of x, floating ones in its compute dtype."""
        device, dtype = x.device, torch.promote_types(x.dtype, torch.float32)
        key = (id(tensors), device, dtype)  # an id is good as long as its object is held
        if key not in self.copies:

            def moved(_: str, tensor: Tensor) -> Tensor:
                return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

            self.copies[key] = (tensors, mapped(tensors, moved))
        return self.copies[key][1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Placed, ()
