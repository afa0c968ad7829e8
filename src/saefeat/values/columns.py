"""Readings as the source of a value: which of their columns hold the latents of an edit."""

from __future__ import annotations

from typing import Any

from ..dictionaries.latents import Latents
from ..errors import LatentError
from ..results.readings import Readings


def columns_of(readings: Readings, latents: Latents, function: str) -> list[int]:
    """Which columns of the readings hold these latents, in their order.

    Raises:
        LatentError: naming the first latent that was not read.
    """
    place = {key: column for column, key in enumerate(_keys(readings.latents))}
    wanted = _keys(latents)
    missing = [key for key in wanted if key not in place]
    if not missing:
        return [place[key] for key in wanted]
    _, site, index = missing[0]
    raise LatentError(
        f"{function}: `readings` is of {readings.latents!r}, without latent {index} of {site},"
        " wanted readings of all latents of the edit. Likely cause: another selection, or another"
        " dictionary of the same site. Try: run(model, prompts, Probe(latents)).readings[0], with"
        " the edit's own latents"
    )


def _keys(latents: Latents) -> list[tuple[Any, Any, int]]:
    """One key a latent; a dictionary loaded twice from one place is the same dictionary."""
    return [
        (getattr(basis, "origin", None) or id(basis), basis.site, index)
        for basis, indices in latents.parts
        for index in indices
    ]


def require_readings(function: str, given: object) -> None:
    """Refuse what is no ``Readings``, or holds no number where it says it does."""
    got = type(given).__name__
    if isinstance(given, Readings):
        if bool(given.values[given.mask].isfinite().all()):
            return
        got = "Readings that are not finite"
    parameter, also = ("activations", ", or a tensor [n, k]")
    if function == "Patch":
        parameter, also = "readings", ""
    raise LatentError(
        f"{function}: `{parameter}` is {got}, wanted the Readings of a Probe, finite{also}. Likely"
        " cause: a tensor without its tokens, or a model whose activations overflow. Try:"
        f" {function}(run(model, prompts, Probe(latents)).readings[0])"
    )
