"""Ablate and Clamp: latents set, scaled, shifted or bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from ..dictionaries.latents import as_latents
from ..errors import LatentError
from ..text.tokens import Tokens
from ..values.base import Value
from .base import Step, per_latent
from .steps import Change
from .when import When


@final
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Ablate(Step):
    """Set latents to zero, or to given values: x' = x + (to − f) · directions.

    With ``to="orthogonal"`` x loses its whole part in the span of the latents' directions at the
    write site: x' = x − P x. Nothing is left along any of them, at tokens where f = 0 too, so it
    removes more than the latents: whatever else has a part there. All latents of one write site
    span one space, however they depend on one another. A latent's row in the receipt is then x's
    part along what its direction adds to those of the latents before it.

    On a direction this is x − (x·v̂)v̂. It misleads where latents overlap: removing a set one by one
    and at once are different edits, and an ablated latent may be rebuilt by later layers, which is
    why one usually ablates at every layer at which a latent lives.

    Args:
        latents: ``Latents``, or a dictionary (all its latents).
        to: ``"zero"``, a number, one value a latent [k] or [prompts, k], a ``Schedule``, ``Patch``
            or ``Resample``, or ``"orthogonal"``.
        where: which tokens; every real token by default, prompt and generated.
        when: a condition on latents or on a score of a site, token by token.
        support: what a topk or abstopk dictionary does: ``"frozen"``, its other latents stay as
            they were; or ``"reselect"``, the edit comes before the k largest are selected, so that
            others take the places that become free, and all that changes is written.

    Raises:
        LatentError: for an empty selection or values that do not fit it; when it is lowered, for
            ``"reselect"`` on a dictionary that selects nothing.

    Examples:
        >>> sf.Ablate(sf.Direction(torch.ones(8), site="resid_post.1"), where=sf.Tokens.last(5))
        Ablate(Latents(1: resid_post.1 [0]), where=Tokens.last(5))
    """

    to: Any
    where: Tokens | None
    when: When | None
    support: str

    def __init__(
        self,
        latents: Any,
        *,
        to: str | float | Tensor | Value = "zero",
        where: Tokens | None = None,
        when: When | None = None,
        support: str = "frozen",
    ) -> None:
        chosen = as_latents(latents, "Ablate")
        _check_support("Ablate", support, to)
        if isinstance(to, str) and to not in ("zero", "orthogonal"):
            raise LatentError(
                f'Ablate: `to` is {to!r}, wanted "zero", "orthogonal", a number, or one value a'
                " latent. Likely cause: a mean or other activations have to come from data: read"
                " them with a Probe. Try: Ablate(latents, to=readings.mean()), or"
                " to=Resample(readings)"
            )
        value = 0.0 if isinstance(to, str) and to == "zero" else to
        if not isinstance(value, str):
            value = per_latent("Ablate", "to", value, chosen)
        given = {"latents": chosen, "to": value, "where": where, "when": when, "support": support}
        for name, argument in given.items():
            object.__setattr__(self, name, argument)

    @property
    def change(self) -> Change:
        if isinstance(self.to, str):
            return Change(scale=0.0, shift=0.0, how=self.to)
        return Change(scale=0.0, shift=self.to, how=self.support)

    @property
    def rule(self) -> Tokens | None:
        return self.where

    @property
    def condition(self) -> When | None:
        return self.when

    def __repr__(self) -> str:
        to = "" if isinstance(self.to, float) and self.to == 0 else f", to={self.to!r}"
        return f"Ablate({self.latents!r}{to}{_where(self.where, self.when, self.support)})"


@final
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Clamp(Step):
    """Set, scale, shift or bound latents: f' = clip(scale · f + shift, low, high).

    One of ``value``, ``scale`` and ``add`` at most; bounds combine with any. ``active_only`` leaves
    latents at zero alone, so that nothing is switched on. It misleads at values the latent never
    takes by itself: look at ``Probe`` readings before choosing one.

    Args:
        latents: ``Latents``, or a dictionary (all its latents).
        value: f' = value; a number, [k], [prompts, k], or a ``Schedule``, ``Patch`` or
            ``Resample``.
        scale: f' = scale · f; likewise.
        add: f' = f + add; likewise. With a ``Direction`` and its norm this is activation steering.
        low: the least f' may be.
        high: the most f' may be.
        active_only: act only where f is not zero.
        where: which tokens; every real token by default, prompt and generated.
        when: a condition on latents or on a score of a site, token by token.
        support: ``"frozen"`` or ``"reselect"``, as for ``Ablate``.

    Raises:
        LatentError: for no change, two changes, or values that do not fit the selection.

    Examples:
        >>> sf.Clamp(sf.Direction(torch.ones(8), site="resid_post.1"), add=4.0)
        Clamp(Latents(1: resid_post.1 [0]), add=4.0)
    """

    value: Any
    scale: Any
    add: Any
    low: Any
    high: Any
    active_only: bool
    where: Tokens | None
    when: When | None
    support: str

    def __init__(
        self,
        latents: Any,
        value: float | Tensor | Value | None = None,
        *,
        scale: float | Tensor | Value | None = None,
        add: float | Tensor | Value | None = None,
        low: float | Tensor | None = None,
        high: float | Tensor | None = None,
        active_only: bool = False,
        where: Tokens | None = None,
        when: When | None = None,
        support: str = "frozen",
    ) -> None:
        chosen = as_latents(latents, "Clamp")
        _check_support("Clamp", support, None)
        given = {"value": value, "scale": scale, "add": add, "low": low, "high": high}
        _one_change(given)
        object.__setattr__(self, "latents", chosen)
        for name, number in given.items():
            object.__setattr__(self, name, per_latent("Clamp", name, number, chosen))
        object.__setattr__(self, "active_only", active_only)
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "when", when)
        object.__setattr__(self, "support", support)

    @property
    def change(self) -> Change:
        scale, shift = 1.0, 0.0
        if self.value is not None:
            scale, shift = 0.0, self.value
        if self.scale is not None:
            scale = self.scale
        if self.add is not None:
            shift = self.add
        return Change(scale, shift, self.low, self.high, self.active_only, self.support)

    @property
    def rule(self) -> Tokens | None:
        return self.where

    @property
    def condition(self) -> When | None:
        return self.when

    def __repr__(self) -> str:
        names = ("value", "scale", "add", "low", "high")
        given = [(name, getattr(self, name)) for name in names]
        shown = "".join(f", {name}={value!r}" for name, value in given if value is not None)
        only = ", active_only=True" if self.active_only else ""
        return f"Clamp({self.latents!r}{shown}{only}{_where(self.where, self.when, self.support)})"


def _where(where: Tokens | None, when: When | None, support: str) -> str:
    shown = "" if where is None else f", where={where!r}"
    shown += "" if when is None else f", when={when!r}"
    return shown if support == "frozen" else f"{shown}, support={support!r}"


def _check_support(where: str, support: str, to: object) -> None:
    """One of two words, and no selection of k where no latents are written."""
    orthogonal = isinstance(to, str) and to == "orthogonal"
    if support == "frozen" or (support == "reselect" and not orthogonal):
        return
    got = f'{support!r}, with to="orthogonal"' if orthogonal else repr(support)
    wanted = '"frozen"' if orthogonal else '"frozen" or "reselect"'
    cause = (
        "an orthogonal ablation changes x, and no latent competes"
        if orthogonal
        else "a typing error"
    )
    raise LatentError(
        f"{where}: `support` is {got}, wanted {wanted}. Likely cause: {cause}. Try:"
        f' {where}(latents, support="reselect")'
    )


def _one_change(given: dict[str, Any]) -> None:
    """Exactly one of value, scale, add; or bounds alone, which are the same at every token."""
    low, high = given["low"], given["high"]
    if isinstance(low, Value) or isinstance(high, Value):
        parameter = "low" if isinstance(low, Value) else "high"
        raise LatentError(
            f"Clamp: `{parameter}` is {low if isinstance(low, Value) else high!r}, wanted a number,"
            " [k] or [prompts, k]. Likely cause: bounds do not change from token to token. Try:"
            " Clamp(latents, Patch(readings)), which sets them"
        )
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        raise LatentError(
            f"Clamp: `low` is {low}, above high = {high}, wanted low <= high. Likely cause: bounds"
            f" swapped. Try: Clamp(latents, low={high}, high={low})"
        )
    changes = [name for name in ("value", "scale", "add") if given[name] is not None]
    bounds = [name for name in ("low", "high") if given[name] is not None]
    if len(changes) == 1 or (not changes and bounds):
        return
    got = " and ".join(changes) if changes else "not given, nor scale, add, low or high"
    cause = "two changes whose order would be a guess" if changes else "no change asked for"
    raise LatentError(
        f"Clamp: `value` is {got}, wanted one of value, scale, add; or a bound. Likely cause:"
        f" {cause}. Try: Clamp(latents, 4.0), or compose two with |"
    )
