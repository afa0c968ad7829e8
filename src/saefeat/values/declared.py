"""What verbs, conditions and values have in common: they are their fields.

``Declared`` is the base of frozen dataclasses that print as the call that makes them and are equal
where every field is, tensors in every element. ``saefeat.hub.fields`` reads what a file may hold
off the same fields, so a new verb or argument is written down once, in its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, dataclass_transform

import torch
from torch import Tensor

from ..hashing import digest
from ..model.sites import Site
from ..results.readings import Readings

SHOWN = 32
"""Elements of a tensor that a repr prints; of a larger one it prints the shape and a hash."""


def argument(*, converter: Callable[..., Any], default: Any = MISSING) -> Any:
    """A field that takes what its converter takes, and holds what that gives.

    The converter is called with the argument and the class's name, for its errors.
    """
    return field(default=default, metadata={"converter": converter})


@dataclass_transform(frozen_default=True, field_specifiers=(field, argument))
@dataclass(frozen=True, repr=False, eq=False)
class Declared:
    """Base of ``@dataclass(frozen=True, repr=False, eq=False)``: one repr, equality and hash."""

    def __post_init__(self) -> None:
        for declared in fields(self):
            convert = declared.metadata.get("converter")
            if convert is not None:
                given = getattr(self, declared.name)
                self._set(**{declared.name: convert(given, type(self).__name__)})

    def _set(self, **values: Any) -> None:
        """Put normalized arguments in place; only ``__post_init__`` may."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        first, *rest = fields(self)
        shown = [show(getattr(self, first.name))]
        for declared in rest:
            value = getattr(self, declared.name)
            if not same(value, declared.default):
                shown.append(f"{declared.name}={show(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    def __hash__(self) -> int:
        values = [getattr(self, declared.name) for declared in fields(self)]
        return hash((type(self), *(v for v in values if not isinstance(v, (Tensor, Readings)))))


def same(a: object, b: object) -> bool:
    """Equal, where tensors are equal in every element and dataclasses in every field."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, (Declared, Readings)) and is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


def show(value: object) -> str:
    """A value as its class's constructor takes it; one too long to print, by shape and hash.

    The hash is there so that two records of a run differ where its values did.
    """
    if isinstance(value, Readings):
        tensors = digest(value.values, value.mask)[:8]
        return f"<{list(value.values.shape)} of {value.latents!r}, {tensors}>"
    if isinstance(value, Tensor):
        if value.numel() <= SHOWN:
            return repr(_numbers(value))
        return f"<{list(value.shape)}, {digest(value)[:8]}>"
    if isinstance(value, Site):
        return repr(str(value))
    if callable(value) and not isinstance(value, Declared):
        return getattr(value, "__name__", None) or type(value).__name__
    return repr(value)


def _numbers(tensor: Tensor) -> Any:
    """A tensor as lists, each number in the fewest digits that tell it apart in its dtype."""
    if tensor.ndim:
        return [_numbers(row) for row in tensor]
    wide = tensor.double() if tensor.dtype == torch.float64 else tensor.float()
    return float(str(wide.numpy())) if tensor.is_floating_point() else tensor.item()
