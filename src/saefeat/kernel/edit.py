"""Edits: f → f', the value of the site that follows from it, and the record of what was done.

The delta form: x' = x + (f' − f) · directions. No reconstruction is written, so whatever the
dictionary does not explain stays as it was, and an edit that changes nothing returns x itself,
bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .encode import top
from .errors import SaefeatError
from .frozen import Frozen, plainly
from .state import Log, State, View
from .values import ByToken

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

MOST_LATENTS = 64
"""Latents of one dictionary up to which an edit's receipt lists its changes."""

PAIRS = 1 << 22
"""(token, latent) pairs of a log whose values are kept for the receipt: 32 MiB of float32."""


# ---------------------------------------------------------------- how latents change


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
    """f' = clip(scale · f + shift, low, high), where each of the four may be absent."""

    # Each is a number or a tensor that broadcasts to f: [k], or [b, t, k or 1].
    scale: float | Tensor = 1.0
    shift: float | Tensor = 0.0
    low: float | Tensor | None = None
    high: float | Tensor | None = None
    active_only: bool = False  # latents at zero stay there
    known: Tensor | None = None  # [b, t, k], where f changes at all

    def at(self, f: Float[Tensor, "b t k"], view: View) -> Change:
        return self

    def new(self, f: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """f'."""
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


class ChangeByRow(Frozen):
    """A change by numbers that are others for each prompt [b, 1, k], or at each token."""

    scale: float | Tensor | ByToken
    shift: float | Tensor | ByToken
    low: float | Tensor | None
    high: float | Tensor | None
    active_only: bool
    known: Tensor | None = None

    def at(self, f: Float[Tensor, "b t k"], view: View) -> Change:
        """The change with numbers, known where all that differ by token have a value."""
        numbers: dict[str, Any] = vars(self) | {"known": None}
        require_batch(numbers, len(f))
        for name in ("scale", "shift"):
            value: ByToken = numbers[name]
            if isinstance(value, Frozen):
                require_batch(vars(value), len(f))
                numbers[name], some = value.at(view, f.device)
                known = numbers["known"]
                if some is not None:
                    numbers["known"] = some if known is None else known & some
        return Change(**numbers)

    def steps(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("a change by row has no steps before its tokens are known")


def require_batch(values: dict[str, Any], rows: int) -> None:
    """Values made for other prompts would broadcast into other rows without a word."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] != rows:
            raise SaefeatError(
                f"saefeat: `{name}` holds values for {value.shape[0]} prompts, and the batch has"
                f" {rows}. Likely cause: the prompts were filtered or split after the values were"
                " made. Try: run, which splits both together."
            )


class Reselect(Frozen):
    """An edit of a topk kind before its selection: who enters and who leaves is decided anew.

    The edited latents compete with what the change makes of them, so a latent that fell just short
    is scaled from there and not from zero. ``active_only`` still means those that were selected.
    """

    change: Change | ChangeByRow
    kind: str  # topk or abstopk
    k: int  # how many latents stay active
    selected: Tensor  # [k], which of the d_sae latents are edited

    @property
    def known(self) -> Tensor | None:
        return self.change.known

    def at(self, f: Float[Tensor, "b t d_sae"], view: View) -> Reselect:
        return self.replace(change=self.change.at(f, view))

    def steps(
        self, f: Float[Tensor, "*batch d_sae"]
    ) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch d_sae"]]:
        """f are the activations of all latents that compete."""
        selected, before = self.selected, top(self.kind, self.k, f)
        was = before[..., selected]
        new = self.change.replace(active_only=False).new(f[..., selected])  # type: ignore[union-attr]
        if self.change.active_only:
            new = torch.where(was != 0, new, f[..., selected])
        step = top(self.kind, self.k, f.index_copy(-1, selected, new)) - before
        return was, step[..., selected], step


# ---------------------------------------------------------------- writing the change


def moved(
    x: Float[Tensor, "*batch d_out"],
    step: Float[Tensor, "*batch k"],
    directions: Float[Tensor, "k d_out"],
    scale: Float[Tensor, "*batch _"] | None,
    mask: Bool[Tensor, "*batch 1"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """x + step · directions where the mask holds, x elsewhere, in x's own dtype."""
    # Summed in the compute dtype and rounded once: x converts there and back without loss, so a
    # zero step returns x exactly.
    delta = step @ directions
    if scale is not None:
        delta = delta * scale
    new = x.to(delta.dtype) + delta
    return (new if mask is None else torch.where(mask, new, x)).to(x.dtype)


class Write(Frozen):
    """Add the change of latents that were read; a transcoder may write on another device."""

    number: int  # of the dictionary whose latents were read
    change: AnyChange
    directions: Tensor  # [n, d_out]
    when: str | None  # the condition that must be met, by name

    def apply(self, x: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        directions = state.placed.at(self.directions, x)
        f, scale, mask, everywhere = state.held[self.number]
        f, mask = f.to(x.device), mask.to(x.device)
        scale = None if scale is None else scale.to(x.device)
        if self.when is not None:
            mask, everywhere = mask & state.met[self.when][0].to(x.device), False
        change = state.placed.at(self.change, x).at(f, state.view)
        if change.known is not None:
            mask, everywhere = mask & change.known.any(-1, keepdim=True), False
        steps = change.steps(f)
        if state.log is not None:
            self.note(state.log, Acted(steps, mask, directions, scale, state.view))
        return moved(x, steps[2], directions, scale, None if everywhere else mask)

    def note(self, log: Log, acted: Acted) -> None:
        """Put what was done on record."""
        entries, budget = log.acted.setdefault(self.number, []), log.budget
        budget.pairs += acted.written.numel()
        few = acted.step.shape[-1] <= MOST_LATENTS and budget.pairs <= PAIRS
        entries.append(acted if few else acted.counts())


# ---------------------------------------------------------------- the record


class Acted:
    """What an edit did in one pass. Counting waits until the run is over, or its log leaves."""

    before: Tensor  # [b, t, k], the edited latents as they were
    step: Tensor  # [b, t, k], how they changed
    written: Tensor  # [b, t, n], the steps of all latents that were written: a topk may reselect

    def __init__(
        self,
        steps: tuple[Tensor, Tensor, Tensor],
        mask: Tensor,
        directions: Tensor,
        scale: Tensor | None,
        view: View,
    ) -> None:
        self.before, self.step, self.written = (f.detach() for f in steps)
        self.mask, self.directions, self.scale = mask, directions, scale
        self.ids, self.position, self.lengths = view.ids, view.position, view.lengths
        self.rows, self.begins = len(mask), view.begins

    def counts(self) -> Float[Tensor, "3"]:
        """Tokens selected, (token, latent) pairs changed, largest change of a latent."""
        change = torch.where(self.mask, self.step, 0.0)
        counts = torch.stack([self.mask.sum(), (change != 0).sum()])
        return torch.cat([counts.to(change.dtype), change.abs().amax()[None]])

    def changes(self) -> dict[str, Tensor]:
        """A tensor [m] a column, one row a changed (token, latent) pair."""
        # ``row`` is the row of the batch, ``latent`` the latent's place in the selection; the
        # others are as saefeat.results.receipt documents them.
        change = torch.where(self.mask, self.step, 0.0)
        row, column, latent = (change != 0).nonzero(as_tuple=True)
        token = (change != 0).any(-1)
        written = torch.where(self.mask, self.written, 0.0)
        with plainly(change.device.type):  # a receipt may be asked for under autocast
            delta = written[token] @ self.directions.to(change.device)
        if self.scale is not None:
            delta = delta * self.scale[token]
        norm = torch.zeros_like(change[..., 0]).masked_scatter(token, delta.norm(dim=-1))
        before = self.before[row, column, latent]
        after = before + change[row, column, latent]
        columns = {"row": row, "latent": latent, "before": before, "after": after}
        columns = {n: v.cpu() for n, v in (columns | {"norm": norm[row, column]}).items()}
        place = (columns["row"], column.cpu())
        position, lengths = self.position.cpu()[place], self.lengths.cpu()[columns["row"], 0]
        step = torch.where(position < lengths, -1, position - lengths)
        ids = torch.full_like(position, -1) if self.ids is None else self.ids.cpu()[place]
        return columns | {"position": position, "step": step, "token": ids}
