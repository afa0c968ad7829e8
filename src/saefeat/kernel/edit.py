"""f → f', and the value of the site that follows from it.

The delta form: x' = x + (f' − f) · directions. No reconstruction is written, so whatever the
dictionary does not explain stays as it was, and an edit that changes nothing returns x itself,
bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from .encode import top
from .frozen import Frozen
from .values import ByToken, require_batch
from .view import View

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@runtime_checkable
class AnyChange(Protocol):
    """How latents change; ``known`` is where there is a value to give, None for everywhere."""

    @property
    def known(self) -> Tensor | None: ...

    def at(self, f: Tensor, view: View) -> AnyChange:
        """The change with numbers at the tokens of one pass."""
        ...

    def steps(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The edited latents as they were, their steps, and the steps of all that is written."""
        ...


class Change(Frozen):
    """f' = clip(scale · f + shift, low, high), where each of the four may be absent.

    Each is a number or a tensor that broadcasts to f: [k], or [batch, 1, k] for values that differ
    by example. ``active_only`` leaves latents at zero untouched; where ``known`` [batch, tokens, k]
    is given and false there is no value to give, and f stays too.
    """

    scale: float | Tensor = 1.0
    shift: float | Tensor = 0.0
    low: float | Tensor | None = None
    high: float | Tensor | None = None
    active_only: bool = False
    known: Tensor | None = None

    def at(self, f: Float[Tensor, "b t k"], view: View) -> Change:
        """The same at every token."""
        require_batch(vars(self), len(f))
        return self

    def new(self, f: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """F'."""
        new = f * self.scale + self.shift
        if self.low is not None:
            new = torch.clamp(new, min=self.low)
        if self.high is not None:  # apart: torch.clamp takes no tensor with a number
            new = torch.clamp(new, max=self.high)
        if self.active_only:
            new = torch.where(f != 0, new, f)
        return new if self.known is None else torch.where(self.known, new, f)

    def steps(
        self, f: Float[Tensor, "*batch k"]
    ) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch k"]]:
        step = self.new(f) - f
        return f, step, step


class ChangeByToken(Frozen):
    """A change whose scale or shift is another at each token."""

    scale: float | Tensor | ByToken
    shift: float | Tensor | ByToken
    low: float | Tensor | None
    high: float | Tensor | None
    active_only: bool
    known: Tensor | None = None

    def at(self, f: Float[Tensor, "b t k"], view: View) -> Change:
        """The change with numbers [b, t, k or 1], known where all of them have a value."""
        require_batch(vars(self), len(f))
        numbers, known = vars(self) | {}, None
        for name in ("scale", "shift"):
            value = numbers[name]
            if isinstance(value, Frozen):
                require_batch(vars(value), len(f))
                numbers[name], some = value.at(view, f.device)  # type: ignore[attr-defined]
                known = some if known is None or some is None else known & some
        return Change(**numbers, known=known)

    def steps(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("a change by token has no steps before its tokens are known")


class Reselect(Frozen):
    """An edit of a topk kind before its selection: who enters and who leaves is decided anew.

    The edited latents compete with what the change makes of them, so a latent that fell just short
    is scaled from there and not from zero. ``active_only`` still means those that were selected.

    Attributes:
        change: of the edited latents.
        kind: topk or abstopk.
        k: how many latents stay active.
        selected: [k], which of the d_sae latents are edited.
    """

    change: Change | ChangeByToken
    kind: str
    k: int
    selected: Tensor

    @property
    def known(self) -> Tensor | None:
        return self.change.known

    def at(self, f: Float[Tensor, "b t d_sae"], view: View) -> Reselect:
        """The change with numbers at the tokens of one pass."""
        return self.replace(change=self.change.at(f, view))

    def steps(
        self, f: Float[Tensor, "*batch d_sae"]
    ) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch d_sae"]]:
        """``f`` are the activations of all latents that compete."""
        selected, before = self.selected, top(self.kind, self.k, f)
        was = before[..., selected]
        new = self.change.replace(active_only=False).new(f[..., selected])  # type: ignore[union-attr]
        if self.change.active_only:
            new = torch.where(was != 0, new, f[..., selected])
        step = top(self.kind, self.k, f.index_copy(-1, selected, new)) - before
        return was, step[..., selected], step


def moved(
    x: Float[Tensor, "*batch d_out"],
    step: Float[Tensor, "*batch k"],
    directions: Float[Tensor, "k d_out"],
    scale: Float[Tensor, "*batch _"] | None,
    mask: Bool[Tensor, "*batch 1"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """x + step · directions where the mask holds, x elsewhere, in x's own dtype.

    The sum is taken in the compute dtype and rounded once; since x converts there and back
    without loss, a zero step still returns x exactly.
    """
    delta = step @ directions  # [*batch, d_out]
    if scale is not None:
        delta = delta * scale
    new = x.to(delta.dtype) + delta
    return (new if mask is None else torch.where(mask, new, x)).to(x.dtype)
