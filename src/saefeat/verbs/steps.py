"""What a step says of itself: its latents, how they change, where, and on what condition.

These are plain values, below the verbs that carry them and the lowering that reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, final

from torch import Tensor

from ..latents import Latents, as_latents
from ..tokens import Tokens


class Change(NamedTuple):
    """f' = clip(scale · f + shift, low, high).

    Each is a number, a tensor [k] in latent order, or a tensor [prompts, k].
    """

    scale: Any = 1.0
    shift: Any = 0.0
    low: Any = None
    high: Any = None
    active_only: bool = False

    def take(self, span: slice, rows: slice) -> dict[str, Any]:
        """The kernel's plain form for some latents and some prompts, in storage of its own."""
        return {
            name: _cut(value, span, rows) if isinstance(value, Tensor) else value
            for name, value in self._asdict().items()
        }

    def prompts(self) -> int | None:
        """How many prompts the values are for, or None if they fit any."""
        sizes = [v.shape[0] for v in self if isinstance(v, Tensor) and v.ndim == 2]
        return sizes[0] if sizes else None


def _cut(value: Tensor, span: slice, rows: slice) -> Tensor:
    """[k] or, for values that differ by prompt, [b, 1, k]."""
    return value[span].clone() if value.ndim == 1 else value[rows, span].unsqueeze(1).clone()


@final
@dataclass(frozen=True, init=False)
class When:
    """A condition on other latents: an edit acts only at tokens where it is met.

    It is met where any of the latents is above the threshold; for all of them, chain two edits.
    A direction is a latent too, so a probe's weight vector is a condition.

    Args:
        latents: ``Latents``, or a dictionary (all its latents), read no later than the edit writes.
        above: the threshold.
        hold: once met, met for the rest of the sequence, generated tokens included.

    Raises:
        LatentError: for an empty selection.

    Examples:
        >>> harm = sf.Direction(torch.ones(8), site="resid_post.0")
        >>> sf.Clamp(harm, 0.0, when=sf.When(harm, above=2.0))
        ... # doctest: +NORMALIZE_WHITESPACE
        Clamp(Latents(1: resid_post.0 [0]), value=0.0,
              when=When(Latents(1: resid_post.0 [0]), above=2.0))
    """

    latents: Latents
    above: float
    hold: bool

    def __init__(self, latents: Any, *, above: float = 0.0, hold: bool = False) -> None:
        object.__setattr__(self, "latents", as_latents(latents, "When"))
        object.__setattr__(self, "above", float(above))
        object.__setattr__(self, "hold", hold)

    def __repr__(self) -> str:
        hold = ", hold=True" if self.hold else ""
        return f"When({self.latents!r}, above={self.above!r}{hold})"


class StepLike(Protocol):
    """What lowering needs of a step; ``verbs.base.Step`` documents each."""

    @property
    def latents(self) -> Latents: ...

    @property
    def change(self) -> Change | None: ...

    @property
    def rule(self) -> Tokens | None: ...

    @property
    def condition(self) -> When | None: ...

    @property
    def reduction(self) -> str | None: ...


AnyStep = TypeVar("AnyStep", bound=StepLike)


def numbered(steps: Iterable[AnyStep]) -> Iterator[tuple[AnyStep, list[int]]]:
    """Each step with the numbers its dictionaries have in a lowered program."""
    number = 0
    for step in steps:
        count = len(step.latents.parts)
        yield step, list(range(number, number + count))
        number += count
