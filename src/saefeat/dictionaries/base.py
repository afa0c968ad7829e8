"""What every dictionary is: a site, a width, and columns of selected latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DictionaryError, SiteError
from ..hashing import digest
from ..kernel.encode import encode
from ..model.requests import in_requests, stay_here
from ..model.sites import Site
from .latents import Latents, index_tensor


class Dictionary(ABC):
    """A basis for one site's values: d_sae latents, each with an encoder and a direction.

    Subclasses are final and give ``columns``; everything else follows. ``site`` is where latents
    are read, ``write_site`` where their directions are added: the same place except for
    transcoders.

    Attributes:
        site: where values are read.
        write_site: where edits are written.
        d_in: width of the read site.
        d_out: width of the write site.
        d_sae: number of latents.
        name: a short label for reports.
        excluded: token ids the dictionary was not trained on, or ``"special"`` for all special
            tokens; edits and readings skip them by default.
        origin: where it was loaded from, for provenance; None for tensors made in memory.
        declared: what its files say of its training, for ``verify``; None for tensors in memory.
        prefix: whether a latent depends on earlier tokens of its sequence.
        joint: whether encoding some latents computes all of them, so that long work should ask
            for them together.

    Examples:
        >>> isinstance(sf.Direction(torch.ones(8), site="resid_post.2"), sf.dictionaries.Dictionary)
        True
    """

    site: Site
    write_site: Site
    d_in: int
    d_out: int
    d_sae: int
    name: str
    excluded: tuple[int, ...] | str = ()
    origin: Any = None
    declared: Any = None
    prefix: bool = False
    joint: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        in_requests(cls, stay_here)

    @abstractmethod
    def columns(self, indices: Tensor) -> dict[str, Any]:
        """The kernel's plain tensors for these latents, float32 (see ``kernel.encode``)."""

    def content(self, indices: Tensor) -> object:
        """All that encoding and directions of these latents are computed from, to be hashed.

        Their columns, unless a subclass has what they are made of: that is the same on every
        machine, where a product may round otherwise.
        """
        return self.columns(indices)

    def fingerprint(self, indices: Iterable[int] | Tensor | None = None) -> str:
        """A short hash of content, sites and excluded tokens; without an argument, of all latents.

        Whatever changes ``encode`` or ``directions`` of the latents changes it, and the same
        dictionary has the same one from a file and from memory. Of some latents it reads no
        others, so it costs as much as an edit of them.
        """
        where = (str(self.site), str(self.write_site), self.excluded, self.prefix)
        return digest(where, self.content(self._index(indices)))

    @property
    def source(self) -> str:
        """Where it came from, for provenance: its origin, or else its name."""
        return str(self.origin or self.name)

    def latents(self, indices: Iterable[int] | Tensor | None = None) -> Latents:
        """Select latents by index; without an argument, all of them.

        Raises:
            LatentError: for an index that is negative, out of range or repeated.
        """
        return Latents.of(self, range(self.d_sae) if indices is None else indices)

    def encode(self, x: Tensor, indices: Iterable[int] | Tensor | None = None) -> Tensor:
        """Activations of the chosen latents (default: all).

        Args:
            x: [..., d_in], any float dtype; computed in at least float32. Where ``prefix`` is
                true, [..., tokens, d_in]: whole sequences without padding.
            indices: which latents, k of them.

        Returns:
            [..., k] in the compute dtype.
        """
        index = self._index(indices)
        dtype = torch.promote_types(x.dtype, torch.float32)
        columns = cast(self.columns(index), dtype, x.device)
        return encode(columns, x.to(dtype))[0]

    def directions(self, indices: Iterable[int] | Tensor | None = None) -> Tensor:
        """What one unit of each chosen latent adds to the write site: [k, d_out], float32."""
        return self.columns(self._index(indices))["directions"]

    def _index(self, indices: Iterable[int] | Tensor | None) -> Tensor:
        """Indices as a tensor, refused as ``latents`` refuses them."""
        parts = self.latents(indices).parts
        return index_tensor(parts[0][1] if parts else ())

    def __repr__(self) -> str:
        at = f"{self.site}" if self.site == self.write_site else f"{self.site} → {self.write_site}"
        return f"{type(self).__name__}({self.name!r}, {at}, {self.d_in} x {self.d_sae})"


def cast(columns: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Columns on a device, floating tensors in a dtype."""
    return {
        key: (value.to(device, dtype) if value.is_floating_point() else value.to(device))
        if isinstance(value, Tensor)
        else value
        for key, value in columns.items()
    }


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
        >>> at[1].site
        Site(kind='resid_post', layer=1)
        >>> at.latents({0: [0], 2: [0]})
        Latents(2: resid_post.0 [0], resid_post.2 [0])
    """

    def __init__(self, dictionaries: Iterable[Dictionary]) -> None:
        found: dict[Site, Dictionary] = {}
        for dictionary in sorted(dictionaries, key=lambda d: d.site.order):
            if dictionary.site in found:
                raise SiteError(
                    f"Dictionaries: `dictionaries` is two at {dictionary.site}, wanted one a site."
                    " Likely cause: two widths or releases in one mapping. Try: keep them in two"
                    " mappings; edits on both compose with |"
                )
            found[dictionary.site] = dictionary
        self._found = found

    def __getitem__(self, key: Site | str | int) -> Dictionary:
        return self._found[self.resolve(key)]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: object) -> bool:
        try:
            self.resolve(key)  # type: ignore[arg-type]
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
        cause = "several sites lie in that layer" if sites else "no dictionary there"
        raise SiteError(
            f"Dictionaries: `key` is {key!r}, which matches {len(sites)} sites, wanted one of"
            f" {', '.join(str(site) for site in self._found)}. Likely cause: {cause}. Try:"
            ' saes["resid_post.3"]'
        )

    def latents(self, indices: Mapping[Site | str | int, Iterable[int]] | None = None) -> Latents:
        """Select latents by site; without an argument, every latent of every dictionary.

        Raises:
            SiteError: for an unknown site.
            LatentError: for a bad index.
        """
        if indices is None:
            return Latents(tuple(p for d in self._found.values() for p in d.latents().parts))
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


def require_shape(name: str, got: tuple[int, ...], wanted: tuple[int | str, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        DictionaryError: naming both shapes.
    """
    if got != wanted:
        raise DictionaryError(
            f"dictionary: `{name}` is of shape {got}, wanted {wanted}. Likely cause: a transposed"
            " matrix, or tensors of two dictionaries mixed. Try: check the file against its"
            " cfg.json"
        )
