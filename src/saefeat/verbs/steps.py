"""What a step says of itself: its latents, how they change, where, and on what condition.

These are plain values, below the verbs that carry them and the lowering that reads them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from ..dictionaries.given import selection
from ..dictionaries.latents import Latents
from ..errors import LatentError
from ..kernel.edit import Change, ChangeByRow
from ..text.tokens import Tokens
from ..values.base import Value
from ..values.declared import Declared, argument
from .when import When

Number = float | Tensor | Value
"""A number, values [k] or [prompts, k], or a value that differs by token."""
Bound = float | Tensor | None


class Formula(NamedTuple):
    """f' = clip(scale · f + shift, low, high).

    Each is a number, a tensor [k] in latent order, or a tensor [prompts, k]; scale and shift may
    be a ``Value`` too. ``how`` says what is written: ``frozen``, the change of these latents;
    ``reselect``, the change of all latents of a topk kind once these have new values; or
    ``orthogonal``, the change of x's part in the span of these latents' directions.
    """

    scale: Number = 1.0
    shift: Number = 0.0
    low: Bound = None
    high: Bound = None
    active_only: bool = False
    how: str = "frozen"

    def take(self, latents: Latents, span: slice, rows: slice | Tensor) -> Change | ChangeByRow:
        """The kernel's form for some latents and some prompts, in storage of its own."""
        numbers: dict[str, Any] = {"active_only": self.active_only}
        for name, value in zip(("scale", "shift", "low", "high"), self[:4], strict=True):
            if isinstance(value, Value):
                numbers[name] = value.plain(latents, span, rows)
            else:
                numbers[name] = _cut(value, span, rows) if isinstance(value, Tensor) else value
        varying = any(isinstance(value, Value) or _by_prompt(value) for value in self[:4])
        return (ChangeByRow if varying else Change)(**numbers)

    def prompts(self) -> int | None:
        """How many prompts the values are for, or None if they fit any."""
        sizes = [v.prompts() for v in self if isinstance(v, Value)]
        sizes += [v.shape[0] for v in self if isinstance(v, Tensor) and _by_prompt(v)]
        return next((size for size in sizes if size is not None), None)

    def numbered(self) -> bool:
        """Whether values depend on the prompt's number, so that each batch has its own program."""
        own = any(isinstance(v, Value) and v.numbered for v in self)
        return own or self.prompts() is not None


def _by_prompt(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def _cut(value: Tensor, span: slice, rows: slice | Tensor) -> Tensor:
    """[k] or, for values that differ by prompt, [b, 1, k]."""
    return value[span].clone() if value.ndim == 1 else value[rows, span].unsqueeze(1).clone()


@dataclass(frozen=True, repr=False, eq=False)
class StepBase(Declared, ABC):
    """What lowering needs of a step: a selection, how it changes, where, and on what condition."""

    latents: Latents = argument(converter=selection)

    WRITTEN: ClassVar[tuple[str, ...]] = ("frozen",)
    """How the verb may write a selection: what ``Latents.written`` may be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents.written not in self.WRITTEN:
            verb, plain = type(self).__name__, replace(self.latents, written="frozen")
            raise LatentError(
                f"{verb}: `latents` is {self.latents!r}, wanted {plain!r}. Likely cause: span()"
                " belongs to Ablate, and reselect() to Ablate and Clamp: they say how an edit is"
                f" written. Try: {verb}(latents)"
            )

    @property
    @abstractmethod
    def change(self) -> Formula | None:
        """How f becomes f', or None for a reading."""

    @property
    @abstractmethod
    def rule(self) -> Tokens | None:
        """Where it acts; None means every real token the dictionary was trained on."""

    @property
    def condition(self) -> When | None:
        """Where else it depends on; None means nothing."""
        return None

    @property
    def reduction(self) -> str | None:
        """How a reading is reduced over tokens; None keeps every token."""
        return None


AnyStep = TypeVar("AnyStep", bound=StepBase)


def numbered(steps: Iterable[AnyStep]) -> Iterator[tuple[AnyStep, list[int]]]:
    """Each step with the numbers its dictionaries have in a lowered program."""
    number = 0
    for step in steps:
        count = len(step.latents.parts)
        yield step, list(range(number, number + count))
        number += count
