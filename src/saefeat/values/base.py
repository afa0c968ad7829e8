"""What an edit may set latents to where it is not a number, and what each such value must answer.

Each is accepted wherever a verb takes a number. A value is plain and holds no model; what it is
at a token is worked out in ``kernel.values``, in the forward pass, from the token's place in its
row's text. So all ways of running, any batching and any padding give the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..dictionaries.latents import Latents
from ..errors import LatentError
from ..kernel.values import ByToken
from .declared import Declared


class Value(Declared, ABC):
    """What a verb's ``Formula`` needs of a value that is no number."""

    numbered: ClassVar[bool] = False
    """Whether it depends on the prompt's number, so that each batch needs its own program."""

    @abstractmethod
    def check(self, function: str, parameter: str, latents: Latents) -> None:
        """Refuse a value that was made for other latents (``LatentError``)."""

    @abstractmethod
    def plain(self, latents: Latents, span: slice, rows: slice | Tensor) -> ByToken:
        """The kernel's form, for the latents in ``span`` and the prompts in ``rows``."""

    def prompts(self) -> int | None:
        """How many prompts it is for, or None if it fits any."""
        return None


def numbers(function: str, parameter: str, given: object, dims: tuple[int, ...]) -> Tensor:
    """Finite numbers as a tensor, copied, float64 so that 0.7 stays 0.7 in any model.

    Raises:
        LatentError: for another number of dimensions, none at all, NaN or infinity.
    """
    try:
        values = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0, dtype=torch.float32)
    if isinstance(given, bool) or getattr(given, "dtype", None) is torch.bool:
        values = torch.empty(0, dtype=torch.float32)  # True is no 1.0
    finite = bool(values.isfinite().all())
    if values.ndim in dims and values.numel() and finite:
        return values
    got = f"{type(given).__name__} of shape {tuple(getattr(given, 'shape', values.shape))}"
    got += "" if finite else ", not finite"
    wanted = f"finite numbers of {' or '.join(map(str, dims))} dimensions, at least one"
    raise LatentError(
        f"{function}: `{parameter}` is {got}, wanted {wanted}. Likely cause: an empty list, ragged"
        " rows, or a mean over nothing. Try: Schedule([8.0, 4.0, 0.0]), Resample(values[mask])"
    )
