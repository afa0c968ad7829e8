"""``CrossLayer``: cross-layer transcoders and crosscoders, latents of several sites."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import DictionaryError, SiteError
from ..files.hashing import digest
from ..model.sites import Site
from .exclusion import Excluded, untrained
from .latents import Dictionary
from .places import distinct, named
from .weights import InMemory, Weights, require_shape

ACTIVATIONS = ("relu", "jumprelu", "topk")
BLOCK = 4096
"""Latents of which the directions are hashed at a time."""


@checked(own=("excluded", "indices"))
@final
class CrossLayer(Dictionary):
    """Latents read at one site or several, and written at one or several.

    A cross-layer transcoder reads one site and writes at many: f = act(x · W_enc + b_enc), and an
    edit adds (f′ − f) · W_dec[n] at every write site n. A crosscoder reads several, f = act(Σ x_n ·
    W_enc[n] + b_enc), and its latents are known where the model reaches the last of them: only at
    that site and behind it can an edit be written. ``encode`` takes the read sites' values side by
    side, [..., d_in · sites].

    Args:
        weights: ``W_enc.<n>`` [d_in, d_sae] a read site, ``b_enc`` [d_sae], ``W_dec.<n>`` [d_sae,
            d_out] a write site, and ``threshold`` [d_sae] for jumprelu; n counts from 0.
        read_sites: in the order in which the model reaches them.
        write_sites: likewise.
        activation: ``relu``, ``jumprelu`` or ``topk``.
        k: active latents, for topk.
        excluded: tokens it was not trained on: ids, ``"special"``, or a token rule.
        name: a label for reports.

    Raises:
        DictionaryError: for missing or unused tensors, wrong shapes or an unknown activation.
        SiteError: for no site, or one listed twice.

    Examples:
        >>> tensors = {"W_enc": torch.randn(1, 8, 32), "b_enc": torch.zeros(32),
        ...            "W_dec": torch.randn(3, 32, 8)}
        >>> writes = ["mlp_out.0", "mlp_out.1", "mlp_out.2"]
        >>> sf.dictionaries.CrossLayer.from_tensors(tensors, read=["mlp_in.0"], write=writes)
        CrossLayer('cross-layer', mlp_in.0 → mlp_out.0 to mlp_out.2 (3 sites), 8 x 32)
    """

    def __init__(
        self,
        weights: Weights,
        *,
        read_sites: Sequence[Site | str],
        write_sites: Sequence[Site | str],
        activation: str = "relu",
        k: int | None = None,
        excluded: Excluded = (),
        name: str = "cross-layer",
    ) -> None:
        self._reads, self._writes = distinct(read_sites), distinct(write_sites)
        if not (self._reads and self._writes):
            raise SiteError(
                f"CrossLayer: `read_sites and write_sites` is {read_sites!r} and {write_sites!r},"
                " wanted at least one of each, none listed twice. Likely cause: layers counted"
                ' from another number. Try: read_sites=["mlp_in.0"], write_sites=["mlp_out.0"]'
            )
        self.site, self.write_site = self._reads[-1], self._writes[0]
        self._columns = tuple(range(len(self._writes)))  # the numbers of the written W_dec
        self.activation, self.k, self.excluded, self.name = activation, k, excluded, name
        self.joint, self._weights = activation == "topk", weights
        self._hashed: tuple[object, str] | None = None
        untrained(excluded)
        self._check()
        d_in, self.d_sae = weights.shape("W_enc.0")
        self.d_in, self.d_out = d_in * len(self._reads), weights.shape("W_dec.0")[1]

    @classmethod
    def from_tensors(
        cls,
        tensors: dict[str, Tensor],
        *,
        read: Sequence[Site | str],
        write: Sequence[Site | str],
        activation: str = "relu",
        k: int | None = None,
        name: str = "cross-layer",
    ) -> CrossLayer:
        """One from tensors in memory.

        Args:
            tensors: ``W_enc`` [read sites, d_in, d_sae], ``b_enc`` [d_sae], ``W_dec`` [write
                sites, d_sae, d_out], and ``threshold`` [d_sae] for jumprelu.
            read: the read sites, in the order in which the model reaches them.
            write: the write sites, likewise.
            activation: ``relu``, ``jumprelu`` or ``topk``.
            k: active latents, for topk.
            name: a label for reports.

        Raises:
            DictionaryError: for missing tensors, or stacks of another number than the sites.
        """
        single: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            sites = {"W_enc": read, "W_dec": write}.get(key)
            if sites is None:
                single[key] = tensor
                continue
            if tensor.ndim != 3 or len(tensor) != len(sites):
                require_shape(key, tuple(tensor.shape), (len(sites), "d", "d"))
            single |= {f"{key}.{n}": plane for n, plane in enumerate(tensor)}
        return cls(
            InMemory(single),
            read_sites=read,
            write_sites=write,
            activation=activation,
            k=k,
            name=name,
        )

    @property
    def read_sites(self) -> tuple[Site, ...]:
        return self._reads

    @property
    def write_sites(self) -> tuple[Site, ...]:
        return self._writes

    def written_at(self, *sites: Site | str) -> CrossLayer:
        """The same latents, written at some of their sites alone.

        Raises:
            SiteError: for a site that they are not written at.

        Examples:
            >>> tensors = {"W_enc": torch.randn(1, 8, 32), "b_enc": torch.zeros(32),
            ...            "W_dec": torch.randn(2, 32, 8)}
            >>> both = sf.dictionaries.CrossLayer.from_tensors(
            ...     tensors, read=["mlp_in.0"], write=["mlp_out.0", "mlp_out.1"])
            >>> both.written_at("mlp_out.1")
            CrossLayer('cross-layer', mlp_in.0 → mlp_out.1, 8 x 32)
        """
        wanted = distinct(sites)
        if not wanted or not set(wanted) <= set(self._writes):
            raise SiteError(
                f"CrossLayer.written_at: `sites` is {', '.join(map(str, sites)) or 'none'}, wanted"
                f" some of {', '.join(map(str, self._writes))}. Likely cause: another layer. Try:"
                f' written_at("{self._writes[-1]}")'
            )
        found = copy.copy(self)
        kept = [n for n, site in enumerate(self._writes) if site in wanted]
        found._writes = tuple(self._writes[n] for n in kept)
        found._columns = tuple(self._columns[n] for n in kept)
        found.write_site, found._hashed = found._writes[0], None
        return found

    def columns(self, indices: Tensor) -> dict[str, Any]:
        take, encoded = self._weights.take, self._encoded(indices)
        parts = [take(f"W_enc.{n}", encoded, axis=1) for n in range(len(self._reads))]
        columns: dict[str, Any] = {
            "activation": self.activation,
            "norm": "none",
            "encoder": parts[0] if len(parts) == 1 else torch.cat(parts),  # [Σ d_in, k]
            "bias": take("b_enc", encoded),
            "directions": self._rows(0, indices),  # [k, d_out], of the first write site
        }
        if self.activation == "jumprelu":
            columns["threshold"] = take("threshold", encoded)
        return columns | ({"k": self.k, "selected": indices.clone()} if self.joint else {})

    def directions(self, indices: Iterable[int] | Tensor | None = None) -> Tensor:
        """What one unit of each latent adds to the first write site: [k, d_out], float32."""
        return self._rows(0, self._index(indices))

    def writes(self, indices: Iterable[int] | Tensor | None = None) -> dict[Site, Tensor]:
        index = self._index(indices)
        return {site: self._rows(n, index) for n, site in enumerate(self._writes)}

    def contributions(self, x: Tensor) -> dict[Site, Tensor]:
        """What all latents together add at each write site, [..., d_out], without any bias.

        Args:
            x: [..., d_in], the read sites' values side by side.
        """
        f = self.encode(x)
        return {
            site: f @ self._rows(n, torch.arange(self.d_sae)).to(f)
            for n, site in enumerate(self._writes)
        }

    def content(self, indices: Tensor) -> object:
        weights, encoded = self._weights, self._encoded(indices)
        names = [f"W_enc.{n}" for n in range(len(self._reads))]
        tensors = [digest(weights.take(name, encoded, axis=1)) for name in names]
        tensors += [digest(weights.take(name, encoded)) for name in sorted(self._vectors())]
        for n in range(len(self._writes)):
            tensors += [digest(self._rows(n, some)) for some in indices.split(BLOCK)]
        settings = (self.activation, self.k)
        return "cross-layer", settings, tensors, indices.tolist() if self.joint else len(indices)

    def fingerprint(self, indices: Iterable[int] | Tensor | None = None) -> str:
        stamp = self._weights.stamp()
        every = indices is None or (isinstance(indices, range) and len(indices) == self.d_sae)
        if not every or stamp is None:
            return super().fingerprint(indices)
        if self._hashed is None or self._hashed[0] != (stamp, self.excluded):  # hashed once
            self._hashed = (stamp, self.excluded), super().fingerprint()
        return self._hashed[1]

    def _rows(self, number: int, index: Tensor) -> Tensor:
        return self._weights.take(f"W_dec.{self._columns[number]}", index)

    def _encoded(self, indices: Tensor) -> Tensor:
        """The latents that must be encoded to know these: of topk all."""
        return torch.arange(self.d_sae) if self.joint else indices

    def _vectors(self) -> set[str]:
        return {"b_enc", "threshold"} if self.activation == "jumprelu" else {"b_enc"}

    def _check(self) -> None:
        """Refuse tensors that are missing, unused or of other shapes than each other's."""
        shape, there = self._weights.shape, self._weights.names()
        read = [f"W_enc.{n}" for n in range(len(self._reads))]
        written = [f"W_dec.{n}" for n in range(len(self._writes))]
        wanted = {*read, *written, *self._vectors()}
        got = ""
        if self.activation not in ACTIVATIONS:
            got = f"with activation {self.activation!r}, of {', '.join(ACTIVATIONS)}"
        elif wanted != there:
            lacks, more = sorted(wanted - there), sorted(there - wanted)
            got = f"without {', '.join(lacks[:4])}" if lacks else f"with {', '.join(more[:4])}"
        elif self.joint and not 1 <= (self.k or 0) <= shape("b_enc")[0]:
            got = f"of topk with k = {self.k}"
        if got:
            raise DictionaryError(
                f"CrossLayer {self.name!r}: `weights` is {got}, wanted the tensors of a"
                f" {self.activation} dictionary that reads {named(self._reads)} and writes"
                f" {named(self._writes)}. Likely cause: another number of sites, or activation="
                " left at its default. Try: a matrix for every site, and activation= as trained"
            )
        for name in (*read, *written):
            if len(shape(name)) != 2:
                require_shape(name, shape(name), ("d", "d"))
        d_in, d_sae = shape(read[0])
        d_out = shape(written[0])[-1]
        for names, size in ((read, (d_in, d_sae)), (written, (d_sae, d_out))):
            for name in names:
                require_shape(name, shape(name), size)
        for name in self._vectors():
            require_shape(name, shape(name), (d_sae,))
