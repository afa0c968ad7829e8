"""When: a condition on latents, or on any score of a site."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, final

from torch import Tensor

from ..arguments import checked, fits
from ..checks import one_of
from ..dictionaries.given import as_latents
from ..dictionaries.latents import Latents
from ..errors import LatentError
from ..model.sites import Site
from ..values.declared import Declared, argument

Scorer = Callable[[Tensor], Tensor]
"""A site's value [batch, tokens, d] → a score [batch, tokens]."""


def _subject(given: Any, function: str = "When") -> Latents | Scorer:
    return given if _scores(given) else as_latents(given, function)


def _scores(given: object) -> bool:
    """Whether it is a function, and no dictionary that can be called."""
    return callable(given) and not callable(getattr(given, "latents", None))


def _site(given: Site | str | None, function: str = "When") -> Site | None:
    return None if given is None else Site.parse(given)


@checked(error=LatentError, own=("above", "below"))
@final
@dataclass(frozen=True, repr=False, eq=False)
class When(Declared):
    """A condition on latents, or on any score of a site: an edit acts only where it is met.

    It is read at every real token, no later than the edit writes. A direction is a latent too, so
    a probe's weight vector is a condition; a probe of any other form is a scorer.

    Args:
        subject: ``Latents``, a dictionary (all its latents), or a function that takes the site's
            value [batch, tokens, d], float32 or wider, and gives a score [batch, tokens]. It runs
            without gradients, and sees one pass: after the prompt, one token at a time.
        site: where a function reads; latents know their own.
        above: met where f or the score is above it; 0 if neither bound is given.
        below: met where it is below; with ``above``, where it lies between them.
        match: ``"any"`` of the latents, or ``"all"`` of them at the same token.
        hold: once met, met for the rest of the sequence, generated tokens included.

    Raises:
        LatentError: for an empty selection, a function without a site, or bounds that nothing
            can meet.

    Examples:
        >>> harm = sf.Direction(torch.ones(8), site="resid_post.0")
        >>> sf.Clamp(harm, 0.0, when=sf.When(harm, above=2.0))
        ... # doctest: +NORMALIZE_WHITESPACE
        Clamp(Latents(1: resid_post.0 [0]), value=0.0,
              when=When(Latents(1: resid_post.0 [0]), above=2.0))
        >>> def norm(x):
        ...     return x.norm(dim=-1)
        >>> sf.When(norm, site="resid_post.0", below=40.0, hold=True)
        When(norm, site='resid_post.0', below=40.0, hold=True)
    """

    subject: Latents | Scorer = argument(converter=_subject)
    _: KW_ONLY
    site: Site | None = argument(converter=_site, default=None)
    above: float | None = None
    below: float | None = None
    match: str = "any"
    hold: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.above is None and self.below is None:
            self._set(above=0.0)
        self._check_site()
        _check_bounds(self.above, self.below)
        one_of("When", "match", self.match, ("any", "all"), error=LatentError)
        for name in ("above", "below"):
            bound = getattr(self, name)
            self._set(**{name: None if bound is None else float(bound)})

    @property
    def latents(self) -> Latents:
        """The latents it reads; none, where it scores a site."""
        return self.subject if isinstance(self.subject, Latents) else Latents(())

    @property
    def scorer(self) -> Scorer | None:
        """The function that scores a site; None, where it reads latents."""
        return None if isinstance(self.subject, Latents) else self.subject

    def _check_site(self) -> None:
        """A function has a site, and latents have none."""
        if (self.scorer is None) == (self.site is None):
            return
        raise LatentError(
            f"When: `site` is {self.site}, wanted a site for a function, and none for latents."
            " Likely cause: a scorer reads one site's value, where latents bring their own. Try:"
            ' When(scorer, site="resid_post.3", above=0.5), or When(latents, below=2.0)'
        )


def _check_bounds(above: Any, below: Any) -> None:
    """Numbers that some score can meet."""
    bounds = [bound for bound in (above, below) if bound is not None]
    numbers = [b for b in bounds if fits(b, float) and not math.isnan(b)]
    wanted = "numbers that are not NaN" if len(numbers) < len(bounds) else "above < below"
    if len(numbers) < len(bounds) or (len(numbers) == 2 and numbers[0] >= numbers[1]):
        raise LatentError(
            f"When: `above` is {above!r}, and below {below!r}, wanted {wanted}. Try: When(latents,"
            " above=0.5, below=2.0)"
        )
