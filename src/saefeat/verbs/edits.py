"""Ablate and Clamp: latents set, scaled, shifted or bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from ..errors import LatentError, explain
from ..latents import as_latents
from ..tokens import Tokens
from .base import Step, per_latent
from .steps import Change, When


@final
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Ablate(Step):
    """Set latents to zero, or to given values: x' = x + (to − f) · directions.

    On a direction this is x − (x·v̂)v̂. It misleads where latents overlap: removing a set one by one
    and at once are different edits, and an ablated latent may be rebuilt by later layers, which is
    why one usually ablates at every layer at which a latent lives.

    Args:
        latents: ``Latents``, or a dictionary (all its latents).
        to: ``"zero"``, a number, or one value a latent [k].
        where: which tokens; every real token by default, prompt and generated.
        when: a condition on other latents, token by token.

    Raises:
        LatentError: for an empty selection or values that do not fit it.

    Examples:
        >>> sf.Ablate(sf.Direction(torch.ones(8), site="resid_post.1"), where=sf.Tokens.last(5))
        Ablate(Latents(1: resid_post.1 [0]), where=Tokens.last(5))
    """

    to: Any
    where: Tokens | None
    when: When | None

    def __init__(
        self,
        latents: Any,
        *,
        to: str | float | Tensor = "zero",
        where: Tokens | None = None,
        when: When | None = None,
    ) -> None:
        chosen = as_latents(latents, "Ablate")
        if isinstance(to, str) and to != "zero":
            raise LatentError(
                explain(
                    "Ablate",
                    "to",
                    got=repr(to),
                    wanted='"zero", a number, or one value a latent',
                    cause="a mean has to come from data: measure it with a Probe",
                    call="Ablate(latents, to=readings.mean())",
                )
            )
        value = 0.0 if isinstance(to, str) else per_latent("Ablate", "to", to, chosen)
        for name, given in (("latents", chosen), ("to", value), ("where", where), ("when", when)):
            object.__setattr__(self, name, given)

    @property
    def change(self) -> Change:
        return Change(scale=0.0, shift=self.to)

    @property
    def rule(self) -> Tokens | None:
        return self.where

    @property
    def condition(self) -> When | None:
        return self.when

    def __repr__(self) -> str:
        to = "" if isinstance(self.to, float) and self.to == 0 else f", to={self.to!r}"
        return f"Ablate({self.latents!r}{to}{_where(self.where, self.when)})"


@final
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Clamp(Step):
    """Set, scale, shift or bound latents: f' = clip(scale · f + shift, low, high).

    One of ``value``, ``scale`` and ``add`` at most; bounds combine with any. ``active_only`` leaves
    latents at zero alone, so that nothing is switched on. It misleads at values the latent never
    takes by itself: look at ``Probe`` readings before choosing one.

    Args:
        latents: ``Latents``, or a dictionary (all its latents).
        value: f' = value.
        scale: f' = scale · f.
        add: f' = f + add. With a ``Direction`` and its norm this is activation steering.
        low: the least f' may be.
        high: the most f' may be.
        active_only: act only where f is not zero.
        where: which tokens; every real token by default, prompt and generated.
        when: a condition on other latents, token by token.

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

    def __init__(
        self,
        latents: Any,
        value: float | Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        add: float | Tensor | None = None,
        low: float | Tensor | None = None,
        high: float | Tensor | None = None,
        active_only: bool = False,
        where: Tokens | None = None,
        when: When | None = None,
    ) -> None:
        chosen = as_latents(latents, "Clamp")
        given = {"value": value, "scale": scale, "add": add, "low": low, "high": high}
        _one_change(given)
        object.__setattr__(self, "latents", chosen)
        for name, number in given.items():
            object.__setattr__(self, name, per_latent("Clamp", name, number, chosen))
        object.__setattr__(self, "active_only", active_only)
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "when", when)

    @property
    def change(self) -> Change:
        scale, shift = 1.0, 0.0
        if self.value is not None:
            scale, shift = 0.0, self.value
        if self.scale is not None:
            scale = self.scale
        if self.add is not None:
            shift = self.add
        return Change(scale, shift, self.low, self.high, self.active_only)

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
        return f"Clamp({self.latents!r}{shown}{only}{_where(self.where, self.when)})"


def _where(where: Tokens | None, when: When | None) -> str:
    shown = "" if where is None else f", where={where!r}"
    return shown if when is None else f"{shown}, when={when!r}"


def _one_change(given: dict[str, Any]) -> None:
    """Exactly one of value, scale, add; or bounds alone."""
    low, high = given["low"], given["high"]
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        raise LatentError(
            explain(
                "Clamp",
                "low",
                got=f"{low}, above high = {high}",
                wanted="low <= high",
                cause="bounds swapped",
                call=f"Clamp(latents, low={high}, high={low})",
            )
        )
    changes = [name for name in ("value", "scale", "add") if given[name] is not None]
    bounds = [name for name in ("low", "high") if given[name] is not None]
    if len(changes) == 1 or (not changes and bounds):
        return
    raise LatentError(
        explain(
            "Clamp",
            "value",
            got=" and ".join(changes) if changes else "not given, nor scale, add, low or high",
            wanted="one of value, scale, add; or a bound",
            cause="two changes whose order would be a guess" if changes else "no change asked for",
            call="Clamp(latents, 4.0), or compose two with |",
        )
    )
