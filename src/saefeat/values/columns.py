"""Readings as the source of a value: which of their columns hold the latents of an edit."""

from __future__ import annotations

from ..dictionaries.latents import Latents
from ..dictionaries.twins import shared
from ..errors import LatentError
from ..model.sites import Site
from ..results.readings import Readings


def columns_of(readings: Readings, latents: Latents, function: str) -> list[int]:
    """Which columns of the readings hold these latents, in their order.

    Raises:
        LatentError: naming the first latent that was not read.
    """
    found: list[int] = []
    for basis, indices in latents.parts:
        place: dict[int, int] = {}  # of the same dictionary, made or loaded twice
        start = 0
        for read, theirs in readings.latents.parts:
            column = {index: start + n for n, index in enumerate(theirs)}
            place |= {index: column[index] for index in shared(read, theirs, basis, indices)}
            start += len(theirs)
        missing = [index for index in indices if index not in place]
        if missing:
            raise _unread(readings, basis.site, missing[0], function)
        found += [place[index] for index in indices]
    return found


def _unread(readings: Readings, site: Site, index: int, function: str) -> LatentError:
    return LatentError(
        f"{function}: `readings` is of {readings.latents!r}, without latent {index} of {site},"
        " wanted readings of all latents of the edit. Likely cause: another selection, or another"
        " dictionary of the same site. Try: run(model, prompts, Probe(latents)).readings[0], with"
        " the edit's own latents"
    )


def require_readings(function: str, given: object) -> None:
    """Refuse what is no ``Readings`` of tokens, or holds no number where it says it does.

    A value made from readings is what latents were at one token. A reduced reading has none: each
    of its latents may have its largest value at another token.
    """
    got = type(given).__name__
    if isinstance(given, Readings):
        finite = bool(given.values[given.mask].isfinite().all())
        if finite and given.starts is not None:
            return
        got = "Readings that are not finite"
        if finite:
            got = "Readings without starts, the column at which each prompt begins"
    parameter, also = ("activations", ", or a tensor [n, k]")
    if function == "Patch":
        parameter, also = "readings", ""
    raise LatentError(
        f"{function}: `{parameter}` is {got}, wanted the Readings of a Probe without reduce=, one"
        f" value a token, finite{also}. Likely cause: a tensor without its tokens, a reduced probe,"
        " or Readings made by hand, or a model whose activations overflow. Try:"
        f" {function}(run(model, prompts, Probe(latents)).readings[0])"
    )
