"""A layout that nobody knows, by two functions of its user's: what is declared, and the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import got
from ..dictionaries.sae import SAE
from ..dictionaries.weights import InMemory, Weights
from ..errors import DictionaryError
from ..model.sites import Site
from .declaration import Origin, no_site

OwnLayout = tuple[
    Callable[[Path], Mapping[str, Any]], Callable[[Path], "Mapping[str, Tensor] | Weights"]
]
"""What a folder declares, as arguments of ``SAE``, and its tensors under sae-lens's names."""

_SETTINGS = (
    *("architecture", "site", "write_site", "norm", "subtract_bias", "centered", "k", "rescale"),
    *("excluded", "name"),
)


def load_own(
    folder: Path, layout: OwnLayout, site: Site | str | None, write_site: Site | str | None
) -> SAE:
    """The SAE that two functions read; sites given by the caller win over those declared.

    Raises:
        DictionaryError: for functions that are none, or settings that are unknown or missing.
    """
    if not isinstance(layout, tuple) or len(layout) != 2 or not all(map(callable, layout)):
        raise _wrong(got(layout), "two functions of the folder", "one of the two left out")
    declare, read = layout
    settings = dict(declare(folder))
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise _wrong(f"declares {', '.join(unknown)}", f"some of {', '.join(_SETTINGS)}", "a typo")
    transcoder = "transcoder" in settings.get("architecture", "standard")
    if "subtract_bias" not in settings and not transcoder:
        cause = "libraries differ in whether b_dec is taken from the input, and none can be guessed"
        raise _wrong("declares no subtract_bias", "True or False, as the SAE was trained", cause)
    chosen = {"site": site, "write_site": write_site}
    settings |= {"subtract_bias": settings.get("subtract_bias", False)}
    settings |= {key: value for key, value in chosen.items() if value is not None}
    if settings.get("site") is None:
        raise no_site(folder)
    tensors = read(folder)
    weights = tensors if isinstance(tensors, Weights) else InMemory(dict(tensors))
    name = settings.pop("name", folder.name)
    sae = SAE(weights, name=name, **settings)
    sae.origin = Origin(f"{declare.__module__}.{declare.__qualname__}", str(folder), name)
    return sae


def _wrong(found: str, wanted: str, cause: str) -> DictionaryError:
    return DictionaryError(
        f"load_sae: `layout` is {found}, wanted {wanted}. Likely cause: {cause}. Try:"
        " load_sae(folder, layout=(declare, tensors)), where declare(folder) gives"
        ' {"site": "resid_post.3", "subtract_bias": True} and tensors(folder) W_enc, b_enc, W_dec'
        " and b_dec"
    )
