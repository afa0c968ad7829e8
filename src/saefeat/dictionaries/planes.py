"""A tensor [n, m, d] of a file as m matrices [n, d], whose rows are read one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from safetensors import safe_open
from torch import Tensor

from .weights import OnDisk, Weights, require_shape, up


@final
class Planes(Weights):
    """The decoders of a cross-layer transcoder as ``W_dec.<n>``, beside the tensors of ``rest``.

    Rows of one write site are read without those of the others: a layer's decoders together take
    as many times the room of its encoder.

    Args:
        rest: all other tensors.
        file: where the stack of decoders is.
        name: of the stack, [d_sae, sites, d_out].
        numbers: the matrices of the stack that are wanted, in order; all by default.

    Raises:
        DictionaryError: for a stack of another shape.
    """

    def __init__(
        self, rest: Weights, file: OnDisk, name: str, numbers: Sequence[int] | None = None
    ) -> None:
        shape = file.shape(name)
        if len(shape) != 3:
            require_shape(name, shape, ("d_sae", "sites", "d_out"))
        self._rest, self._file, self._name = rest, file, name
        wanted = range(shape[1]) if numbers is None else numbers
        self._numbers = {f"W_dec.{n}": number for n, number in enumerate(wanted)}

    def names(self) -> frozenset[str]:
        return self._rest.names() | frozenset(self._numbers)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._numbers:
            return self._rest.shape(name)
        rows, _, width = self._file.shape(self._name)
        return rows, width

    def read(self, name: str) -> Tensor:
        if name not in self._numbers:
            return self._rest.read(name)
        return self._rows(name, slice(None))

    def take(self, name: str, index: Tensor, axis: int = 0) -> Tensor:
        if name not in self._numbers:
            return self._rest.take(name, index, axis)
        if axis or len(index) * 4 > self.shape(name)[0]:  # one read is cheaper
            every = self.read(name)
            return (every[:, index] if axis else every[index]).contiguous()
        parts = [self._rows(name, slice(i, i + 1)) for i in index.tolist()]
        return torch.cat(parts) if parts else self._rows(name, slice(0, 0))

    def stamp(self) -> object:
        return self._rest.stamp(), self._file.stamp(), tuple(self._numbers.values())

    def _rows(self, name: str, rows: slice) -> Tensor:
        with safe_open(self._file.path, framework="pt") as file:
            part = file.get_slice(self._name)[rows, self._numbers[name]]
            return up(part).clone()  # a slice maps the whole tensor
