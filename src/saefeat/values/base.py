"""What an edit may set latents to where it is not a number, and what each such value must answer.

Each is accepted wherever a verb takes a number. A value is plain and holds no model; what it is
at a token is worked out in ``kernel.values``, in the forward pass, from the token's place in its
row's text. So all ways of running, any batching and any padding give the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..dictionaries.latents import Latents
from ..errors import LatentError
from ..kernel.values import ByToken
from ..results.readings import Readings


class Value(ABC):
    """What ``Change`` needs of a value that is no number."""

    numbered: ClassVar[bool] = False
    """Whether it depends on the prompt's number, so that each batch needs its own program."""

    @abstractmethod
    def check(self, where: str, parameter: str, latents: Latents) -> None:
        """Refuse a value that was made for other latents (``LatentError``)."""

    @abstractmethod
    def plain(self, latents: Latents, span: slice, rows: slice | Tensor) -> ByToken:
        """The kernel's form, for the latents in ``span`` and the prompts in ``rows``."""

    def prompts(self) -> int | None:
        """How many prompts it is for, or None if it fits any."""
        return None

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    def __hash__(self) -> int:
        return hash(type(self))


def numbers(where: str, parameter: str, given: Any, dims: tuple[int, ...]) -> Tensor:
    """Finite numbers as a tensor of its own, float64 so that 0.7 stays 0.7 in any model.

    Raises:
        LatentError: for another number of dimensions, none at all, NaN or infinity.
    """
    try:
        found = torch.as_tensor(given, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.ndim in dims and found.numel() and bool(torch.isfinite(found).all()):
        return found
    got = f"{type(given).__name__} of shape {tuple(getattr(given, 'shape', found.shape))}" + (
        "" if torch.isfinite(found).all() else ", not finite"
    )
    raise LatentError(
        f"{where}: `{parameter}` is {got}, wanted finite numbers of {' or '.join(map(str, dims))}"
        " dimensions, at least one. Likely cause: an empty list, ragged rows, or a mean over"
        " nothing. Try: Schedule([8.0, 4.0, 0.0]), Resample(values[mask])"
    )


def same(a: Any, b: Any) -> bool:
    """Equal, where tensors are equal in every element and dataclasses in every field."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is type(b) and isinstance(a, (Value, Readings)) and is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b
