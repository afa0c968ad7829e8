"""A dictionary from a sae-lens object in memory."""

from __future__ import annotations

from typing import Any

from ..dictionaries.sae import SAE
from ..dictionaries.weights import InMemory
from ..model.sites import Site
from .declaration import Origin, assemble
from .native import declared
from .whole import ARCHITECTURES, Whole


def from_object(
    sae: Any, *, site: Site | str | None = None, write_site: Site | str | None = None
) -> SAE | Whole:
    """A dictionary from a sae-lens object; its tensors are shared, its state is never used.

    Args:
        sae: a ``sae_lens.SAE``.
        site: overrides the hook name it declares.
        write_site: overrides the output hook a transcoder declares.

    Raises:
        DictionaryError: for an architecture this version cannot compute.
        SiteError: for a hook name this version has no place for.
    """
    name = sae.get_name()
    facts = declared(sae.cfg.to_dict(), name)
    origin = Origin(layout="sae_lens", file="memory", id=name)
    if facts.architecture in ARCHITECTURES:
        return Whole(sae, facts, origin, name=name, site=site)
    state = sae.state_dict()
    sae.process_state_dict_for_saving(state)
    return assemble(facts, InMemory(state), origin, name=name, site=site, write_site=write_site)
