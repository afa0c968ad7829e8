"""The sites of dictionaries that read or write at several: how they print, and who takes one alone.

What knows nothing of several sites would read or write at one of them and be wrong without a word,
so it refuses such a dictionary by name (``require_one_site``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SiteError
from ..model.sites import Site


def named(sites: Sequence[Site]) -> str:
    """One site by its name, several by the first and the last."""
    more = f" to {sites[-1]} ({len(sites)} sites)" if len(sites) > 1 else ""
    return f"{sites[0]}{more}"


def lengths(dictionary: Any, indices: Any = None) -> Tensor:
    """[k]: the length of what one unit of each latent adds, over all its write sites."""
    every = [own.norm(dim=1).double() for own in dictionary.writes(indices).values()]
    return every[0] if len(every) == 1 else torch.stack(every).norm(dim=0)


def require_one_site(
    function: str, parameter: str, latents: Any, *, reads: bool = False, writes: bool = False
) -> None:
    """Refuse dictionaries that read, or write, at several sites.

    Raises:
        SiteError: naming the first of them.
    """
    for basis, _ in latents.parts:
        several = basis.read_sites if reads and len(basis.read_sites) > 1 else ()
        verb, call = "read", "sf.Attribute, sf.Probe and edits, which take several"
        if writes and len(basis.write_sites) > 1:
            several, verb = basis.write_sites, "written"
            call = f'dictionary.written_at("{basis.write_site}"), that site\'s share alone'
        if several:
            raise SiteError(
                f"{function}: `{parameter}` is latents of {basis!r}, {verb} at {len(several)}"
                f" sites, wanted latents {verb} at one. Likely cause: a cross-layer transcoder or"
                f" a crosscoder, whose other sites would be left out. Try: {call}"
            )


def distinct(sites: Iterable[Site | str]) -> tuple[Site, ...]:
    """Sites from their names; empty where one is listed twice."""
    found = tuple(Site.parse(site) for site in sites)
    return found if len(set(found)) == len(found) else ()
