"""What stands for latents where they are an argument: a selection, or all of a dictionary."""

from __future__ import annotations

from dataclasses import replace

from ..errors import LatentError
from ..model.sites import Site
from .latents import Latents


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
    """Refuse one file's dictionary as two objects: its latents would be edited twice."""
    seen: dict[tuple[object, Site], set[int]] = {}
    for basis, indices in latents.parts:
        origin = getattr(basis, "origin", None)
        if origin is None:
            continue
        others = seen.setdefault((origin, basis.site), set())
        if not others.isdisjoint(indices):
            raise LatentError(
                f"{function}: `latents` is latents of {origin} twice, wanted each latent once."
                " Likely cause: the dictionary was loaded twice, and is two objects. Try: select"
                " from one load_saes(...)"
            )
        others.update(indices)
