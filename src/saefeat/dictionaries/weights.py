"""Where an SAE's tensors come from: memory, or a file read a slice at a time.

Files are safetensors, or npz (``npz.py``). ``Mapped`` reads another library's file under
sae-lens's names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DictionaryError


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
        """[d, k]: the columns at ``index``, float32, in a storage of their own, or the tensor
        itself if that is all of it: not to be written to.
        """

    def stamp(self) -> object:
        """What changes whenever the file behind it does; None in memory, where nothing tells."""
        return None


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
        return up(self._tensors[name])

    def rows(self, name: str, index: Tensor) -> Tensor:
        run = _run_of(index)
        return up(self._tensors[name][index if run is None else run].clone())

    def columns(self, name: str, index: Tensor) -> Tensor:
        tensor, run = self._tensors[name], _run_of(index)
        if run is None:
            return up(tensor[:, index].contiguous())
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        return up(tensor if alone and len(index) == tensor.shape[1] else tensor[:, run].clone())


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
                f"load_sae: `path` is {path}, which cannot be read ({error}), wanted a whole"
                " safetensors file. Likely cause: an interrupted download or copy, or a Git LFS"
                " pointer. Try: fetch the file again and compare its size"
            ) from error

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return up(file.get_tensor(name))

    def rows(self, name: str, index: Tensor) -> Tensor:
        run = _run_of(index)
        if run is None and len(index) * 4 > self._shapes[name][0]:  # one read is cheaper
            return self.read(name)[index]
        with safe_open(self.path, framework="pt") as file:
            part = file.get_slice(name)
            if run is not None:
                return up(part[run]).clone()  # a slice maps the whole tensor
            return up(torch.cat([part[i : i + 1] for i in index.tolist()]))

    def columns(self, name: str, index: Tensor) -> Tensor:
        run = _run_of(index)
        if run is None and len(index) * 4 > self._shapes[name][1]:
            return self.read(name)[:, index].contiguous()
        with safe_open(self.path, framework="pt") as file:
            part = file.get_slice(name)
            if run is not None:
                return up(part[:, run]).clone()
            return up(torch.cat([part[:, i : i + 1] for i in index.tolist()], dim=1))

    def stamp(self) -> object:
        return stamp_of(self.path)


@dataclass(frozen=True)
class View:
    """Where one tensor of an SAE lies in a file written by another library.

    Args:
        name: the tensor's name in the file.
        transposed: whether the file holds the matrix the other way round.
        scale: a factor, or one factor a row [n] (a row of ``W_dec`` is a latent).
    """

    name: str
    transposed: bool = False
    scale: float | Tensor = 1.0


@final
class Mapped(Weights):
    """Another file's tensors under sae-lens's names: renamed, transposed, scaled, in slices.

    Args:
        source: the file as it is.
        views: sae-lens name → where it lies; what is not listed is not there.
        constants: tensors the file does not hold as such, [d_sae] each (one threshold for all
            latents, a bias of zeros), kept in memory.

    Raises:
        DictionaryError: for a tensor the file lacks.
    """

    def __init__(
        self,
        source: Weights,
        views: Mapping[str, View],
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._source, self._views = source, dict(views)
        self._constants = InMemory(constants or {})
        missing = sorted({view.name for view in self._views.values()} - source.names())
        if missing:
            raise DictionaryError(
                f"load_sae: `folder` is a file without {', '.join(missing)}, wanted what its layout"
                f" has; it holds {', '.join(sorted(source.names()))}. Likely cause: another layout"
                " or architecture than its configuration declares. Try: fetch the file again, or"
                " convert it to sae-lens's native layout"
            )

    def names(self) -> frozenset[str]:
        return frozenset(self._views) | self._constants.names()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._views:
            return self._constants.shape(name)
        view = self._views[name]
        shape = self._source.shape(view.name)
        return shape[::-1] if view.transposed else shape

    def read(self, name: str) -> Tensor:
        if name not in self._views:
            return self._constants.read(name)
        view = self._views[name]
        tensor = self._source.read(view.name)
        tensor = tensor.T.contiguous() if view.transposed else tensor
        return _scaled(tensor, view.scale)

    def rows(self, name: str, index: Tensor) -> Tensor:
        if name not in self._views:
            return self._constants.rows(name, index)
        view = self._views[name]
        if view.transposed:
            part = self._source.columns(view.name, index).T.contiguous()
        else:
            part = self._source.rows(view.name, index)
        return _scaled(part, view.scale[index] if isinstance(view.scale, Tensor) else view.scale)

    def columns(self, name: str, index: Tensor) -> Tensor:
        view = self._views[name]
        if view.transposed:
            part = self._source.rows(view.name, index).T.contiguous()
        else:
            part = self._source.columns(view.name, index)
        return _scaled(part, view.scale)

    def stamp(self) -> object:
        return self._source.stamp()


def _scaled(part: Tensor, scale: float | Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return part * scale.to(part.dtype).reshape(-1, *[1] * (part.ndim - 1))
    return part if scale == 1.0 else part * scale


def stamp_of(path: Path) -> tuple[object, ...]:
    """A file's path, size, time of change and inode."""
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns, about.st_ino


def _run_of(index: Tensor) -> slice | None:
    """The slice that consecutive indices form, or None."""
    if len(index) == 0 or not torch.equal(index, torch.arange(len(index)) + index[0]):
        return None
    return slice(int(index[0]), int(index[-1]) + 1)


def up(tensor: Tensor) -> Tensor:
    """float32 at least: latents flip in half precision, and float64 tests stay float64.

    Raises:
        DictionaryError: for whole numbers, which are no weights.
    """
    if not tensor.is_floating_point():
        raise DictionaryError(
            f"dictionary: `weights` is of {tensor.dtype}, wanted floating-point numbers. Likely"
            " cause: a damaged header, quantized weights, or another file. Try: fetch the file"
            " again, or dequantize it"
        )
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
