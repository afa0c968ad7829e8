"""Where an SAE's tensors come from: memory, or a file read a slice at a time.

Files are safetensors, or NumPy archives. ``Mapped`` reads another library's file under sae-lens's
names.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
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
    def take(self, name: str, index: Tensor, axis: int = 0) -> Tensor:
        """The rows at ``index``, [k, ...], or with axis 1 the columns, [d, k]; float32.

        In a storage of their own; all columns may be the tensor itself, not to be written to.
        """

    def stamp(self) -> object:
        """What changes whenever the file behind it does; None in memory, where nothing tells."""
        return None


@final
class InMemory(Weights):
    """Tensors already loaded."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_meta or tensor.layout != torch.strided:
                raise DictionaryError(
                    f"dictionary: `{name}` is a tensor on {tensor.device}, {tensor.layout}, wanted"
                    " numbers in memory. Likely cause: a model that is not loaded yet, or a sparse"
                    " tensor. Try: tensor.to_dense(), or load it first"
                )
            _require_floats(name, tensor.dtype)
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return up(self._tensors[name])

    def take(self, name: str, index: Tensor, axis: int = 0) -> Tensor:
        tensor, run = self._tensors[name], _run_of(index)
        if run is None:
            return up((tensor[:, index] if axis else tensor[index]).contiguous())
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        if axis and alone and len(index) == tensor.shape[1]:
            return up(tensor)
        # A view would keep the whole matrix alive, and carry it to a server.
        return up((tensor[:, run] if axis else tensor[run]).clone())


@final
class OnDisk(Weights):
    """A safetensors file, opened for each read so that nothing stays mapped between them.

    A row of ``W_dec`` is one read; a column of ``W_enc`` touches every row of the file's matrix,
    which is why edits cut their columns once and keep them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error, "safetensors file") from error
        _refuse_training(path, names)

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return up(file.get_tensor(name))

    def take(self, name: str, index: Tensor, axis: int = 0) -> Tensor:
        run = _run_of(index)
        if run is None and len(index) * 4 > self._shapes[name][axis]:  # one read is cheaper
            whole = self.read(name)
            return (whole[:, index] if axis else whole[index]).contiguous()
        with safe_open(self.path, framework="pt") as file:
            part = file.get_slice(name)
            if run is not None:  # cloned, since a slice maps the whole tensor
                return up(part[:, run] if axis else part[run]).clone()
            spans = [slice(i, i + 1) for i in index.tolist()]
            return up(torch.cat([part[:, one] if axis else part[one] for one in spans], axis))

    def stamp(self) -> object:
        return _stamp_of(self.path)


@final
class Npz(Weights):
    """A NumPy archive, mapped where it is stored uncompressed, as Gemma Scope's are.

    A compressed member cannot be read in parts: it is read whole, once, and kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole: dict[str, Tensor] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {
                    info.filename.removesuffix(".npy"): _member(path, archive, info)
                    for info in archive.infolist()
                }
        except (OSError, ValueError, LookupError, EOFError, *_ZIP) as error:
            raise _unreadable(path, error, "npz archive of plain arrays") from error

    def names(self) -> frozenset[str]:
        return frozenset(self._members)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._members[name].shape

    def read(self, name: str) -> Tensor:
        return self._copied(name, (...,))

    def take(self, name: str, index: Tensor, axis: int = 0) -> Tensor:
        return self._copied(name, (*[slice(None)] * axis, index.numpy()))

    def stamp(self) -> object:
        return _stamp_of(self.path)

    def _copied(self, name: str, key: tuple[Any, ...]) -> Tensor:
        """A copy of part of an array, so that nothing stays mapped."""
        member = self._members[name]
        if member.offset is None:
            if name not in self._whole:
                with np.load(self.path, allow_pickle=False) as archive:
                    self._whole[name] = torch.from_numpy(archive[name])
            array = self._whole[name].numpy()
        else:
            order = "F" if member.fortran else "C"
            array = np.memmap(self.path, member.dtype, "r", member.offset, member.shape, order)
        return up(torch.from_numpy(np.array(array[key], order="C")))


_ZIP = (zipfile.BadZipFile, struct.error, zlib.error, NotImplementedError, RuntimeError)
"""What zipfile raises over a damaged archive, an encrypted one, or a compression it lacks."""


class _Member(NamedTuple):
    """One array of an archive; ``offset`` is None where it is compressed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int | None


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    """Read an array's header, and where its data starts in the archive."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            header = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if dtype.hasobject:  # they are pickled, and a pickle runs what it holds
            raise ValueError(f"{info.filename} holds Python objects")
        skip = file.tell()
    if dtype.kind != "f" or not dtype.isnative:
        raise ValueError(f"{info.filename} holds {dtype.str}, no floating-point numbers")
    if skip + dtype.itemsize * math.prod(shape) != info.file_size:
        raise ValueError(f"{info.filename} is not of the size its header says")
    if info.compress_type != zipfile.ZIP_STORED:
        return _Member(shape, dtype, fortran, None)
    with path.open("rb") as file:  # the local header repeats the name, with its own extra field
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    start = info.header_offset + 30 + name + extra + skip
    if start + dtype.itemsize * math.prod(shape) > path.stat().st_size:
        raise ValueError(f"{info.filename} is cut short")
    return _Member(shape, dtype, fortran, start)


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
        aside: tensors of the file that were read otherwise, or change nothing that is computed.

    Raises:
        DictionaryError: for a tensor that is missing, or one that nothing here reads: the file
            is then another function of its tensors than the one computed.
    """

    def __init__(
        self,
        source: Weights,
        views: Mapping[str, View],
        constants: Mapping[str, Tensor] | None = None,
        aside: Iterable[str] = (),
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
        read = {view.name for view in self._views.values()}
        unread = sorted(source.names() - read - set(aside))
        if unread:
            raise DictionaryError(
                f"load_sae: `folder` is a file with {', '.join(unread[:6])}, wanted tensors that"
                " its layout has. Likely cause: an SAE that computes more than this version knows,"
                " or a training checkpoint with its optimizer. Try: the final file of its training,"
                " or an SAE without them"
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
        return self._scaled(self._source.read(view.name), view, view.scale)

    def take(self, name: str, index: Tensor, axis: int = 0) -> Tensor:
        if name not in self._views:
            return self._constants.take(name, index, axis)
        view = self._views[name]
        part = self._source.take(view.name, index, 1 - axis if view.transposed else axis)
        scale = view.scale
        if isinstance(scale, Tensor) and axis == 0:
            scale = scale[index]
        return self._scaled(part, view, scale)

    def stamp(self) -> object:
        return self._source.stamp()

    def _scaled(self, part: Tensor, view: View, scale: float | Tensor) -> Tensor:
        part = part.T.contiguous() if view.transposed else part
        if isinstance(scale, Tensor):
            return part * scale.to(part.dtype).reshape(-1, *[1] * (part.ndim - 1))
        return part if scale == 1.0 else part * scale


def require_shape(name: str, got: tuple[int, ...], wanted: tuple[int | str, ...]) -> None:
    """Refuse a tensor of another shape."""
    if got != wanted:
        raise DictionaryError(
            f"dictionary: `{name}` is of shape {got}, wanted {wanted}. Likely cause: a transposed"
            " matrix, or tensors of two dictionaries mixed. Try: check the file against its"
            " cfg.json"
        )


def up(tensor: Tensor) -> Tensor:
    """float32 at least: latents flip in half precision, and float64 tests stay float64."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise DictionaryError(
            f"dictionary: `weights` is of {tensor.dtype}, wanted floating-point numbers of 16 bits"
            " or more. Likely cause: a damaged header, quantized weights, or another file. Try:"
            " fetch the file again, or dequantize it"
        )
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _require_floats(name: str, dtype: torch.dtype) -> None:
    """Refuse at once what ``up`` refuses when it is read, with the tensor's name."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise DictionaryError(
            f"dictionary: `{name}` is of {dtype}, wanted floating-point numbers of 16 bits or more."
            " Likely cause: quantized or imaginary weights, counts, or a mask. Try: tensor.float(),"
            " or dequantize it"
        )


def _run_of(index: Tensor) -> slice | None:
    """The slice that consecutive indices form, or None."""
    if len(index) == 0 or not torch.equal(index, torch.arange(len(index)) + index[0]):
        return None
    return slice(int(index[0]), int(index[-1]) + 1)


def _stamp_of(path: Path) -> tuple[object, ...]:
    """A file's path, size, times of change and inode.

    The time of the inode's change cannot be set, as copying tools set that of the contents.
    """
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


_STATE = re.compile(
    r"(^|[./])(optim(izer)?|scheduler|lr_scheduler|exp_avg(_sq)?|momentum_buffer)([./_]|$)"
    r"|(^|[./])(num_tokens|n_forward_passes)_since_fired$|(^|[./])act_freq_scores$"
)
"""Names of tensors that a training keeps beside the SAE's own, to go on from."""


def _refuse_training(path: Path, names: Iterable[str]) -> None:
    """Refuse a training checkpoint by what it is: it is whole, but no SAE."""
    state = [name for name in sorted(names) if _STATE.search(name)]
    if state:
        raise DictionaryError(
            f"load_sae: `path` is {path}, which holds the state of a training ({state[0]}), wanted"
            " the tensors of an SAE alone. Likely cause: a training checkpoint, from which a"
            " trainer goes on. Try: sae.save_inference_model(folder) in sae-lens, or the final"
            " file of the training"
        )


def _unreadable(path: Path, error: Exception, kind: str) -> DictionaryError:
    return DictionaryError(
        f"load_sae: `path` is {path}, which cannot be read ({error}), wanted a whole {kind}. Likely"
        " cause: an interrupted download or copy, or a Git LFS pointer. Try: fetch the file again"
        " and compare its size"
    )
