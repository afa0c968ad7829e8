"""What stands for latents where they are an argument: a selection, or all of a dictionary."""

from __future__ import annotations

from dataclasses import replace

from ..errors import LatentError
from .latents import Latents
from .twins import shared


def as_latents(subject: object, function: str) -> Latents:
    """Latents as they are; a dictionary or a mapping of them as all its latents."""
    latents = selection(subject, function)
    if latents.written == "frozen":
        return latents
    raise LatentError(
        f"{function}: `latents` is {latents!r}, wanted {replace(latents, written='frozen')!r}."
        " Likely cause: span() and reselect() say how an edit is written, and this is no edit. Try:"
        f" {function}(latents)"
    )


def selection(subject: object, function: str = "latents") -> Latents:
    """The same, where it may also say how edits write it."""
    select = None if isinstance(subject, Latents) else getattr(subject, "latents", None)
    latents = select() if callable(select) else subject
    if isinstance(latents, Latents) and len(latents):
        _require_distinct(latents, function)
        return latents
    got = "empty" if isinstance(latents, Latents) else type(subject).__name__
    raise LatentError(
        f"{function}: `latents` is {got}, wanted at least one latent. Likely cause: a search that"
        " found nothing, or indices passed without their dictionary. Try: dictionary.latents([12,"
        " 40]) or saes.latents({site: [12]})"
    )


def _require_distinct(latents: Latents, function: str) -> None:
    """Refuse one dictionary as two objects: its latents would be edited twice."""
    for n, (basis, indices) in enumerate(latents.parts):
        for other, theirs in latents.parts[:n]:
            if shared(other, theirs, basis, indices):
                raise LatentError(
                    f"{function}: `latents` is latents of {basis!r} twice, wanted each latent once."
                    " Likely cause: the dictionary was loaded twice, and is two objects. Try:"
                    " select from one load_saes(...)"
                )
