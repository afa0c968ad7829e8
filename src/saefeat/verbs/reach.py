"""Whether a model reaches a dictionary's sites in an order in which it can be read and written."""

from __future__ import annotations

from collections.abc import Mapping

from ..dictionaries.latents import Dictionary
from ..errors import SiteError
from ..model.sites import Order, Site


def apart(dictionary: Dictionary) -> bool:
    """Whether it is read upstream of where it writes."""
    return dictionary.write_sites != (dictionary.site,)


def require_reached(subject: str, dictionary: Dictionary, orders: Mapping[Site, Order]) -> None:
    """Refuse sites that are listed in another order than the model reaches them in.

    Raises:
        SiteError: with the model's order.
    """
    for sites in (dictionary.read_sites, dictionary.write_sites):
        wanted = sorted(sites, key=lambda site: orders[site])
        if wanted != list(sites):
            raise SiteError(
                f"{subject}: `latents` is of {dictionary!r}, whose sites are listed as"
                f" {', '.join(map(str, sites))}, wanted {', '.join(map(str, wanted))}, the order in"
                " which the model reaches them. Likely cause: matrices and sites that do not"
                " belong together. Try: both in the model's order"
            )


def require_behind(subject: str, dictionary: Dictionary, orders: Mapping[Site, Order]) -> None:
    """Refuse directions that belong where the model has not reached the latents yet.

    Raises:
        SiteError: naming both sites.
    """
    behind = [s for s in dictionary.write_sites if orders[s] >= orders[dictionary.site]]
    if len(behind) == len(dictionary.write_sites):
        return
    cause = "read and write sites swapped, or of different layers"
    call = 'load_sae(folder, site="mlp_norm.3", write_site="mlp_out.3")'
    if len(dictionary.read_sites) > 1:
        cause = "a crosscoder, whose latents are known at the last of its read sites"
        call = "Probe, which only reads"
        if behind:
            listed = ", ".join(f'"{site}"' for site in behind)
            call = f"crosscoder.written_at({listed}), these alone, or {call}"
    raise SiteError(
        f"{subject}: `latents` is read at {dictionary.site} and written at"
        f" {dictionary.write_site}, wanted a write site the model reaches no earlier than the read"
        f" site. Likely cause: {cause}. Try: {call}"
    )
