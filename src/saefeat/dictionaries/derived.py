"""Tensors of an SAE made from another's as they are read: the first latents, or unit directions."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..checks import whole
from ..errors import DictionaryError
from .weights import Weights

_ENCODER, _SHARED = ("W_enc",), ("b_dec", "W_skip")


@final
class First(Weights):
    """The first latents alone, as a Matryoshka SAE was trained to be cut."""

    def __init__(self, source: Weights, count: int) -> None:
        self._source, self._count = source, count

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._source.shape(name)
        if name in _SHARED:
            return shape
        return (shape[0], self._count) if name in _ENCODER else (self._count, *shape[1:])

    def read(self, name: str) -> Tensor:
        if name in _SHARED:
            return self._source.read(name)
        return self._source.take(name, torch.arange(self._count), int(name in _ENCODER))

    def take(self, name: str, index: Tensor, axis: int = 0) -> Tensor:
        return self._source.take(name, index, axis)

    def stamp(self) -> object:
        stamp = self._source.stamp()
        return None if stamp is None else (stamp, self._count)


@final
class UnitNorms(Weights):
    """Directions of length 1, and latents in units of it: f is multiplied by what directions lose.

    Of a gated SAE the magnitude alone is scaled, by its gain and bias; of others the encoder, its
    bias and the threshold. A direction of zeros stays one, with its latent as it was.
    """

    def __init__(self, source: Weights) -> None:
        self._source = source
        self._gated = "r_mag" in source.names()

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> Tensor:
        whole = self._source.read(name)
        if name in _SHARED:
            return whole
        return self._scaled(name, whole, torch.arange(self._source.shape("W_dec")[0]))

    def take(self, name: str, index: Tensor, axis: int = 0) -> Tensor:
        part = self._source.take(name, index, axis)
        every = name in _SHARED or axis != int(name in _ENCODER)  # rows that are no latents
        return part if every else self._scaled(name, part, index)

    def stamp(self) -> object:
        stamp = self._source.stamp()
        return None if stamp is None else (stamp, "unit norms")

    def _scaled(self, name: str, part: Tensor, index: Tensor) -> Tensor:
        """A tensor of these latents, those of W_enc along its columns."""
        if self._gated and name in ("W_enc", "b_gate"):
            return part  # they decide whether a latent is active
        norms = self._source.take("W_dec", index).norm(dim=1)
        norms = torch.where(norms == 0, torch.ones_like(norms), norms)
        if name == "W_dec":
            return part / norms[:, None]
        return part + norms.log() if name == "r_mag" else part * norms


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros is a latent without a direction, and stays one."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms == 0, 1.0, norms)


def require_first(count: Any, d_sae: int) -> None:
    """Refuse a count that is none of 1..d_sae.

    Raises:
        DictionaryError: with the width.
    """
    whole("SAE.prefix_of", "count", count, 1, error=DictionaryError)
    if count > d_sae:
        raise DictionaryError(
            f"SAE.prefix_of: `count` is {count}, wanted at most {d_sae}, all latents. Likely"
            f" cause: a width of another SAE. Try: prefix_of({max(1, d_sae // 2)})"
        )


def require_separate(function: str, sae: Any) -> None:
    """Refuse topk SAEs, whose latents are active or not by comparison with all others.

    Raises:
        DictionaryError: naming the function.
    """
    if sae.joint:
        raise DictionaryError(
            f"SAE.{function}: `sae` is {sae!r}, of architecture {sae.architecture}, wanted one"
            " whose latents do not compete. Likely cause: a topk SAE, of which other latents would"
            " be the k largest. Try: the SAE as it is; saved BatchTopK and Matryoshka SAEs are"
            " jumprelu, and can"
        )
