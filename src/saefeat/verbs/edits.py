"""Ablate and Clamp: latents set, scaled, shifted or bounded."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import final

from torch import Tensor

from ..arguments import checked
from ..checks import one_of
from ..errors import LatentError
from ..text.tokens import Tokens
from ..values.base import Value
from ..values.declared import same
from .base import Step, per_latent
from .steps import Formula
from .when import When


@checked(error=LatentError, own=("to",))
@final
@dataclass(frozen=True, repr=False, eq=False)
class Ablate(Step):
    """Set latents to zero, or to given values: x' = x + (to − f) · directions.

    With ``latents.span()`` x loses its whole part in the span of the latents' directions at the
    write site: x' = x − P x. Nothing is left along any of them, at tokens where f = 0 too, so it
    removes more than the latents: whatever else has a part there. All latents of one write site
    span one space, however they depend on one another. A latent's row in the receipt is then x's
    part along what its direction adds to those of the latents before it.

    On a direction this is x − (x·v̂)v̂. It misleads where latents overlap: removing a set one by one
    and at once are different edits, and an ablated latent may be rebuilt by later layers, which is
    why one usually ablates at every layer at which a latent lives.

    Args:
        latents: ``Latents``, or a dictionary (all its latents). ``latents.span()`` and
            ``latents.reselect()`` say that something else than these latents is written.
        to: a number, one value a latent [k] or [prompts, k], a ``Schedule``, ``Patch`` or
            ``Resample``; ``"zero"`` is 0.
        where: which tokens; every real token by default, prompt and generated.
        when: a condition on latents or on a score of a site, token by token.

    Raises:
        LatentError: for an empty selection or values that do not fit it; when it is lowered, for
            ``latents.reselect()`` of a dictionary that selects nothing.

    Examples:
        >>> v = sf.Direction(torch.ones(8), site="resid_post.1")
        >>> sf.Ablate(v, where=sf.Tokens.last(5))
        Ablate(Latents(1: resid_post.1 [0]), where=Tokens.last(5))
        >>> sf.Ablate(v.latents().span())
        Ablate(Latents(1: resid_post.1 [0]).span())
    """

    _: KW_ONLY
    to: float | Tensor | Value | str = 0.0
    where: Tokens | None = None
    when: When | None = None

    WRITTEN = ("frozen", "reselect", "span")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.to, str) and self.to != "zero":
            raise LatentError(
                f'Ablate: `to` is {self.to!r}, wanted a number, one value a latent, or "zero".'
                " Likely cause: a mean or other activations have to come from data: read them with"
                " a Probe. Try: Ablate(latents, to=readings.mean()), to=Resample(readings), or"
                " Ablate(latents.span()) for an orthogonal ablation"
            )
        to = 0.0 if isinstance(self.to, str) else self.to
        if to is None:
            one_of("Ablate", "to", to, ("zero",), error=LatentError)
        self._set(to=per_latent("Ablate", "to", to, self.latents))
        if self.latents.written == "span" and not same(self.to, 0.0):
            raise LatentError(
                f"Ablate: `to` is {self.to!r}, for {self.latents!r}, wanted no value: the part of x"
                " in a span is removed, and no latent is set. Try: Ablate(latents.span()), or"
                " Ablate(latents, to=...)"
            )

    @property
    def change(self) -> Formula:
        assert not isinstance(self.to, str)  # "zero" has become 0.0
        return Formula(scale=0.0, shift=self.to, how=_how(self))

    @property
    def rule(self) -> Tokens | None:
        return self.where

    @property
    def condition(self) -> When | None:
        return self.when


@checked(error=LatentError, own=("value", "scale", "add", "low", "high"))
@final
@dataclass(frozen=True, repr=False, eq=False)
class Clamp(Step):
    """Set, scale, shift or bound latents: f' = clip(scale · f + shift, low, high).

    One of ``value``, ``scale`` and ``add`` at most; bounds combine with any. ``active_only`` leaves
    latents at zero alone, so that nothing is switched on. It misleads at values the latent never
    takes by itself: look at ``Probe`` readings before choosing one.

    Args:
        latents: ``Latents``, or a dictionary (all its latents); ``latents.reselect()`` edits a
            topk dictionary before its k largest latents are selected.
        value: f' = value; a number, [k], [prompts, k], or a ``Schedule``, ``Patch`` or
            ``Resample``.
        scale: f' = scale · f; likewise.
        add: f' = f + add; likewise. With a ``Direction`` and its norm this is activation steering.
        low: the least f' may be.
        high: the most f' may be.
        active_only: act only where f is not zero.
        where: which tokens; every real token by default, prompt and generated.
        when: a condition on latents or on a score of a site, token by token.

    Raises:
        LatentError: for no change, two changes, or values that do not fit the selection.

    Examples:
        >>> sf.Clamp(sf.Direction(torch.ones(8), site="resid_post.1"), add=4.0)
        Clamp(Latents(1: resid_post.1 [0]), add=4.0)
    """

    value: float | Tensor | Value | None = None
    _: KW_ONLY
    scale: float | Tensor | Value | None = None
    add: float | Tensor | Value | None = None
    low: float | Tensor | None = None
    high: float | Tensor | None = None
    active_only: bool = False
    where: Tokens | None = None
    when: When | None = None

    WRITTEN = ("frozen", "reselect")

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_change(self)
        _ordered_bounds(self.low, self.high)
        for name in ("value", "scale", "add", "low", "high"):
            given = getattr(self, name)
            if given is not None:
                self._set(**{name: per_latent("Clamp", name, given, self.latents)})

    @property
    def change(self) -> Formula:
        scale, shift = 1.0, 0.0
        if self.value is not None:
            scale, shift = 0.0, self.value
        if self.scale is not None:
            scale = self.scale
        if self.add is not None:
            shift = self.add
        return Formula(scale, shift, self.low, self.high, self.active_only, _how(self))

    @property
    def rule(self) -> Tokens | None:
        return self.where

    @property
    def condition(self) -> When | None:
        return self.when


def _how(step: Ablate | Clamp) -> str:
    """How the change is written, in the words of the lowering."""
    return "orthogonal" if step.latents.written == "span" else step.latents.written


def _one_change(clamp: Clamp) -> None:
    """Exactly one of value, scale, add; or bounds alone."""
    changes = [name for name in ("value", "scale", "add") if getattr(clamp, name) is not None]
    bounded = clamp.low is not None or clamp.high is not None
    if len(changes) == 1 or (not changes and bounded):
        return
    got = " and ".join(changes) if changes else "not given, nor scale, add, low or high"
    cause = "two changes whose order would be a guess" if changes else "no change asked for"
    raise LatentError(
        f"Clamp: `value` is {got}, wanted one of value, scale, add; or a bound. Likely cause:"
        f" {cause}. Try: Clamp(latents, 4.0), or compose two with |"
    )


def _ordered_bounds(low: object, high: object) -> None:
    """Bounds are the same at every token, and low is not above high."""
    for parameter, bound in (("low", low), ("high", high)):
        if isinstance(bound, Value):
            raise LatentError(
                f"Clamp: `{parameter}` is {bound!r}, wanted a number, [k] or [prompts, k]. Likely"
                " cause: bounds do not change from token to token. Try: Clamp(latents,"
                " Patch(readings)), which sets them"
            )
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        raise LatentError(
            f"Clamp: `low` is {low}, above high = {high}, wanted low <= high. Likely cause: bounds"
            f" swapped. Try: Clamp(latents, low={high}, high={low})"
        )
