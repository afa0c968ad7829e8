"""Where an SAE's tensors come from: memory, or a safetensors file read a slice at a time."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DictionaryError, explain


class Weights(ABC):
    """Named tensors of which rows and columns can be read on their own."""

    @abstractmethod
    def names(self) -> frozenset[str]:
        """The tensors there are."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A whole tensor, float32."""

    @abstractmethod
    def rows(self, name: str, index: Tensor) -> Tensor:
        """[k, ...]: the rows at ``index``, float32, in a storage of their own."""

    @abstractmethod
    def columns(self, name: str, index: Tensor) -> Tensor:
        """[d, k]: the columns at ``index``, float32, in a storage of their own."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash of the content."""


@final
class InMemory(Weights):
    """Tensors already loaded."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return _up(self._tensors[name])

    def rows(self, name: str, index: Tensor) -> Tensor:
        return _up(self._tensors[name][index])

    def columns(self, name: str, index: Tensor) -> Tensor:
        return _up(self._tensors[name][:, index].contiguous())

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            digest.update(name.encode())
            digest.update(self._tensors[name].to(torch.float32).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


@final
class OnDisk(Weights):
    """A safetensors file, opened for each read so that nothing stays mapped between them.

    A row of ``W_dec`` is one read; a column of ``W_enc`` touches every row of the file's matrix,
    which is why edits cut their columns once and keep them.

    Raises:
        DictionaryError: for a file that is missing or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self._shapes = {
                    name: tuple(file.get_slice(name).get_shape())
                    for name in file.keys()  # noqa: SIM118
                }
        except (OSError, SafetensorError) as error:
            raise DictionaryError(
                explain(
                    "load_sae",
                    "path",
                    got=f"{path}, which cannot be read ({error})",
                    wanted="a whole safetensors file",
                    cause="an interrupted download or copy, or a Git LFS pointer",
                    call="fetch the file again and compare its size",
                )
            ) from error

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return _up(file.get_tensor(name))

    def rows(self, name: str, index: Tensor) -> Tensor:
        run = _run_of(index)
        if run is None and len(index) * 4 > self._shapes[name][0]:  # one read is cheaper
            return self.read(name)[index]
        with safe_open(self.path, framework="pt") as file:
            part = file.get_slice(name)
            if run is not None:
                return _up(part[run])
            return _up(torch.cat([part[i : i + 1] for i in index.tolist()]))

    def columns(self, name: str, index: Tensor) -> Tensor:
        run = _run_of(index)
        if run is None and len(index) * 4 > self._shapes[name][1]:
            return self.read(name)[:, index].contiguous()
        with safe_open(self.path, framework="pt") as file:
            part = file.get_slice(name)
            if run is not None:
                return _up(part[:, run].contiguous())
            return _up(torch.cat([part[:, i : i + 1] for i in index.tolist()], dim=1))

    def fingerprint(self) -> str:
        """Hash of the size and of the first and last MiB: header, shapes and some weights."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with self.path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
        return digest.hexdigest()[:16]


def _run_of(index: Tensor) -> slice | None:
    """The slice that consecutive indices form, or None."""
    if len(index) == 0 or not torch.equal(index, torch.arange(len(index)) + index[0]):
        return None
    return slice(int(index[0]), int(index[-1]) + 1)


def _up(tensor: Tensor) -> Tensor:
    """float32 at least: latents flip in half precision, and float64 tests stay float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
