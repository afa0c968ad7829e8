"""When: a condition on latents, or on any score of a site."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

from ..dictionaries.latents import Latents, as_latents
from ..errors import LatentError
from ..model.sites import Site


@final
@dataclass(frozen=True, init=False)
class When:
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

    latents: Latents
    scorer: Any
    site: Site | None
    above: float | None
    below: float | None
    match: str
    hold: bool

    def __init__(
        self,
        subject: Any,
        *,
        site: Site | str | None = None,
        above: float | None = None,
        below: float | None = None,
        match: str = "any",
        hold: bool = False,
    ) -> None:
        scores = callable(subject) and not callable(getattr(subject, "latents", None))
        if above is None and below is None:
            above = 0.0
        _check_when(scores, site, above, below, match)
        given = {
            "latents": Latents(()) if scores else as_latents(subject, "When"),
            "scorer": subject if scores else None,
            "site": None if site is None else Site.parse(site),
            "above": None if above is None else float(above),
            "below": None if below is None else float(below),
            "match": match,
            "hold": hold,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        name = getattr(self.scorer, "__name__", None) or type(self.scorer).__name__
        shown = [f"{self.latents!r}" if self.scorer is None else f"{name}, site={str(self.site)!r}"]
        bounds = (("above", self.above), ("below", self.below))
        shown += [f"{name}={bound!r}" for name, bound in bounds if bound is not None]
        shown += [] if self.match == "any" else [f"match={self.match!r}"]
        return f"When({', '.join(shown + (['hold=True'] if self.hold else []))})"


def _check_when(scores: bool, site: Any, above: Any, below: Any, match: str) -> None:
    """A function has a site and latents have none; bounds that something can meet."""
    bounds = [bound for bound in (above, below) if bound is not None]
    if scores != (site is not None):
        problem = ("site", repr(site), "a site for a function, and none for latents")
    elif not all(isinstance(bound, (int, float)) and not math.isnan(bound) for bound in bounds):
        problem = ("above", f"{above!r}, and below {below!r}", "numbers that are not NaN")
    elif len(bounds) == 2 and above >= below:
        problem = ("above", f"{above!r}, and below {below!r}", "above < below")
    elif match not in ("any", "all"):
        problem = ("match", repr(match), '"any" or "all"')
    else:
        return
    raise LatentError(
        f"When: `{problem[0]}` is {problem[1]}, wanted {problem[2]}. Likely cause: a scorer reads"
        ' one site\'s value, where latents bring their own. Try: When(scorer, site="resid_post.3",'
        " above=0.5), or When(latents, below=2.0)"
    )
