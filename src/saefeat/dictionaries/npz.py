"""NumPy archives, as Gemma Scope's are, read a slice at a time."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from ..errors import DictionaryError
from .weights import Weights, stamp_of, up


@final
class Npz(Weights):
    """A NumPy archive, mapped where it is stored uncompressed, as Gemma Scope's are.

    A compressed member cannot be read in parts: it is read whole, once, and kept.

    Raises:
        DictionaryError: for a file that is missing, not whole, or holds Python objects.
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
            raise DictionaryError(
                f"load_sae: `path` is {path}, which cannot be read ({error}), wanted a whole npz"
                " archive of plain arrays. Likely cause: an interrupted download or copy, or a Git"
                " LFS pointer. Try: fetch the file again and compare its size"
            ) from error

    def names(self) -> frozenset[str]:
        return frozenset(self._members)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._members[name].shape

    def read(self, name: str) -> Tensor:
        return self._take(name, (...,))

    def rows(self, name: str, index: Tensor) -> Tensor:
        return self._take(name, (index.numpy(),))

    def columns(self, name: str, index: Tensor) -> Tensor:
        return self._take(name, (slice(None), index.numpy()))

    def stamp(self) -> object:
        return stamp_of(self.path)

    def _take(self, name: str, key: tuple[Any, ...]) -> Tensor:
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
        if dtype.hasobject:
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
