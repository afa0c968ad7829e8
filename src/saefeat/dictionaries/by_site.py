"""``Dictionaries``: one dictionary a site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, cast

from torch import Tensor

from ..arguments import checked, got
from ..errors import LatentError, SiteError
from ..model.sites import Site
from .latents import Dictionary, Latents


@checked(own=("indices",))
class Dictionaries(Mapping[Site, Dictionary]):
    """One dictionary a site: what ``load_saes`` returns and ``Attribute`` watches.

    Keys are sites; ``saes["resid_post.3"]`` and, where only one site lies in a layer, ``saes[3]``
    find the same entry.

    Raises:
        SiteError: if two dictionaries read the same site (one would hide the other).

    Examples:
        >>> v = torch.ones(8)
        >>> directions = [sf.Direction(v, site=f"resid_post.{layer}") for layer in range(3)]
        >>> at = sf.dictionaries.Dictionaries(directions)
        >>> print(at[1].site)
        resid_post.1
        >>> at.latents({0: [0], 2: [0]})
        Latents(2: resid_post.0 [0], resid_post.2 [0])
    """

    def __init__(self, dictionaries: Iterable[Dictionary]) -> None:
        self._found: dict[Site, Dictionary] = {}
        for dictionary in sorted(dictionaries, key=lambda d: d.site.order):
            if dictionary.site in self._found:
                raise SiteError(
                    f"Dictionaries: `dictionaries` is two at {dictionary.site}, wanted one a site."
                    " Likely cause: two widths or releases in one mapping. Try: keep them in two"
                    " mappings; edits on both compose with |"
                )
            self._found[dictionary.site] = dictionary

    def __getitem__(self, key: Site | str | int) -> Dictionary:
        return self._found[self.resolve(key)]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: object) -> bool:
        try:
            self.resolve(cast("Site", key))
        except SiteError:
            return False
        return True

    def get(self, key: Any, default: Any = None) -> Any:
        """The dictionary at a site, or the default where there is none."""
        return self[key] if key in self else default  # noqa: SIM401  (it would call itself)

    def resolve(self, key: Site | str | int) -> Site:
        """The site meant by a site, its name, or its layer.

        Raises:
            SiteError: if there is none, or several.
        """
        if isinstance(key, int):
            sites = [site for site in self._found if site.layer == key]
        else:
            sites = [site for site in self._found if site == Site.parse(key)]
        if len(sites) == 1:
            return sites[0]
        names = [str(site) for site in self._found]
        nearest = [*get_close_matches(str(key), names, 1), *names, "resid_post.3"][0]
        cause = "several sites lie in that layer" if sites else "no dictionary there"
        raise SiteError(
            f"Dictionaries: `key` is {key!r}, which matches {len(sites)} sites, wanted one of"
            f' {", ".join(names)}. Likely cause: {cause}. Try: saes["{nearest}"]'
        )

    def latents(
        self, indices: Mapping[Site | str | int, Iterable[int] | Tensor] | None = None
    ) -> Latents:
        """Select latents by site; without an argument, every latent of every dictionary.

        Raises:
            SiteError: for an unknown site.
            LatentError: for a bad index.
        """
        if indices is None:
            return Latents(tuple(p for d in self._found.values() for p in d.latents().parts))
        if not isinstance(indices, Mapping):
            raise LatentError(
                f"Dictionaries.latents: `indices` is {got(indices)}, wanted a mapping from sites to"
                " indices. Likely cause: indices without their site. Try: saes.latents({3: [0, 1]})"
            )
        chosen = Latents(())
        for key, found in indices.items():
            chosen = chosen | self[key].latents(found)
        return chosen

    def at(self, kind: str) -> Dictionaries:
        """Only the dictionaries that read sites of this kind."""
        return Dictionaries(d for d in self._found.values() if d.site.kind == kind)

    def __repr__(self) -> str:
        lines = "\n".join(f"  {dictionary}" for dictionary in self._found.values())
        return f"Dictionaries({len(self)}\n{lines}\n)"
