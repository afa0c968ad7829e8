"""Safetensors files written with the same bytes every time, and read without trusting them.

A file is a safetensors file whose metadata has one entry, ``saefeat``: a JSON document. Any
safetensors reader opens it. This module reads it itself, because it must refuse what the format
leaves open (repeated keys, gaps, any depth) before anything is allocated, and writes it itself,
because the order of the library's header may change and ours must not.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..errors import FileError
from .hashing import canonical, content_hash, raw
from .paths import expanded

MAX_HEADER = 16 * 2**20
"""Bytes of header a reader accepts; a header is parsed whole."""

MAX_BYTES = 256 * 2**20
"""Bytes of a file that ``save`` writes and ``load`` reads unless told otherwise."""

MAX_DEPTH = 256
"""Levels of nesting in the JSON document."""

MAX_TENSORS = 65_536
"""Tensors in one file."""

DTYPES = {
    "BOOL": torch.bool,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes a file may hold, by safetensors' names."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
KEY = "saefeat"

PARTIAL = ".partial"
"""How the name of a file ends while it is written."""


class Contents(NamedTuple):
    """What a file holds: its JSON document and its tensors, on the CPU."""

    document: dict[str, Any]
    tensors: dict[str, Tensor]


def refuse(
    function: str, got: object, wanted: str, cause: str, call: str, parameter: str = "path"
) -> FileError:
    """The error for a file or for what a file should hold."""
    return FileError(
        f"{function}: `{parameter}` is {got}, wanted {wanted}. Likely cause: {cause}. Try: {call}"
    )


def seal(
    form: str, version: int, spec: object, tensors: Mapping[str, Tensor], written: dict[str, str]
) -> dict[str, Any]:
    """A document: what is said, in which format, its hash, and who wrote it, outside the hash."""
    said = {"format": form, "version": version, "spec": spec}
    return {**said, "sha256": content_hash(said, tensors), "written": written}


def unseal(contents: Contents, form: str, version: int, function: str) -> dict[str, Any]:
    """A document's ``spec``, once format, version and hash are what they should be."""
    document, tensors = contents
    if document.get("format") != form:
        got = f"a file of format {brief(document.get('format'))}"
        raise refuse(function, got, form, "another kind of file", "the load that fits its format")
    found, written = document.get("version"), document.get("written")
    if type(found) is not int or found < 1:
        raise broken(function, f"version {brief(found)}", f"a version in 1..{version}")
    if found > version:
        got = f"of version {found}, written by {brief(written)}"
        wanted = f"at most version {version}, which this saefeat reads"
        call = "pip install --upgrade saefeat"
        raise refuse(function, got, wanted, "a file from a later saefeat", call)
    said = {name: document.get(name) for name in ("format", "version", "spec")}
    if document.get("sha256") != content_hash(said, tensors):
        raise broken(function, "contents that do not match their hash", "the contents as written")
    only(document, (*said, "sha256", "written"), function, "a document")
    if not isinstance(document.get("spec"), dict):
        raise broken(function, f"a spec that is {brief(document.get('spec'))}", "a JSON object")
    return document["spec"]


def only(entry: Mapping[str, Any], known: Iterable[str], function: str, what: str) -> None:
    """Refuse names this version does not know: what they mean would be left out without a word."""
    unknown = sorted(set(entry) - set(known))
    if unknown:
        got = f"{what} with {brief(unknown[0])}"
        raise later(function, got, "names this version knows")


def pack(document: dict[str, Any], tensors: Mapping[str, Tensor], function: str) -> bytes:
    """The bytes of a file; the same bytes for the same contents."""
    if depth(document) > MAX_DEPTH:
        got, wanted = "for a rule nested too deeply", f"at most {MAX_DEPTH} levels"
        call = "Tokens.ids(*ids), not a | b | c"
        raise refuse(function, got, wanted, "a rule built in a loop", call)
    header: dict[str, Any] = {"__metadata__": {KEY: canonical(document)}}
    # Wide elements first, so that each tensor starts at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    parts, start = [], 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            got, wanted = f"for a tensor of {tensor.dtype}", "one of " + ", ".join(DTYPES)
            call = "tensor.float() before the intervention is made"
            raise refuse(function, got, wanted, "unusual values", call)
        parts.append(raw(tensor))
        stop = start + len(parts[-1])
        dtype, shape = _NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER or len(order) > MAX_TENSORS:
        got = f"for {len(order)} tensors and a header of {len(text):,} bytes"
        wanted = f"at most {MAX_TENSORS} tensors and {MAX_HEADER:,} bytes"
        raise refuse(function, got, wanted, "a very large selection", "save it in parts")
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def write(path: str | Path, data: bytes, function: str) -> Path:
    """Write a file whole or not at all: to a name beside it, then renamed over it."""
    try:
        target = expanded(path, function, error=FileError)
        beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            with beside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a ValueError: a path without a name, or with a NUL
        wanted = "a file name in a folder that can be written to"
        cause = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
        raise refuse(function, repr(str(path)), wanted, cause, "make the folder first") from error
    return target


def read(path: str | Path, function: str, max_bytes: int = MAX_BYTES) -> Contents:
    """Read a file strictly; nothing larger than the file itself is ever allocated."""
    try:
        with expanded(path, function, error=FileError).open("rb") as file:
            about = os.fstat(file.fileno())
            size = about.st_size
            if not stat.S_ISREG(about.st_mode):  # a device or a pipe may have no end
                wanted, cause = "a regular file", "a device, a pipe or a folder"
                raise refuse(function, repr(str(path)), wanted, cause, "check the path")
            if size > max_bytes:
                got = f"{str(path)!r}, of {size:,} bytes"
                cause = "a file with whole dictionaries, or not one of this library's"
                call = f"{function}(..., max_bytes={size}) if it is meant"
                raise refuse(function, got, f"at most {max_bytes:,} bytes", cause, call)
            return unpack(file.read(size), f"{function}({str(path)!r})")
    except (OSError, ValueError) as error:  # a ValueError: a NUL in the path
        if isinstance(error, FileError):
            raise
        wanted, call = "a file that save wrote", "check the path"
        raise refuse(function, repr(str(path)), wanted, type(error).__name__, call) from error


def unpack(data: bytes, function: str) -> Contents:
    """The contents of a file's bytes."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER, len(data) - 8):
        got = f"{len(data):,} bytes that announce a header of {length:,}"
        raise broken(function, got, f"a header of 2 to {MAX_HEADER:,} bytes, whole")
    header = parse(data[8 : 8 + length], function)
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        got, wanted = "a file without this library's header", f"metadata {KEY!r}, as save writes it"
        cause = "a file of another program, such as an SAE's weights"
        raise refuse(function, got, wanted, cause, "sf.load_sae(folder) for an SAE")
    if len(header) > MAX_TENSORS:
        raise broken(function, f"{len(header):,} tensors", f"at most {MAX_TENSORS:,}")
    document = parse(metadata[KEY].encode("utf-8", "replace"), function)
    if not isinstance(document, dict):
        raise broken(function, "a document that is no JSON object", "an object")
    return Contents(document, _tensors(header, data, 8 + length, function))


def _tensors(header: dict[str, Any], data: bytes, offset: int, function: str) -> dict[str, Tensor]:
    """The tensors; they must fill the rest of the file without a gap, in any order."""
    spans = {name: _span(name, entry, function) for name, entry in header.items()}
    at = 0
    for name in sorted(spans, key=lambda name: spans[name][2:]):
        _, _, start, stop = spans[name]
        if start != at:
            wanted = f"at byte {at}, without gap or overlap"
            raise broken(function, f"{brief(name)} at byte {start}", wanted)
        at = stop
    if at != len(data) - offset:
        got = f"{len(data) - offset:,} bytes of tensors"
        raise broken(function, got, f"{at:,}, as its header says")
    found = {}
    for name, (dtype, shape, start, stop) in spans.items():
        part = bytearray(data[offset + start : offset + stop] or b"\0")  # never an empty buffer
        part = torch.frombuffer(part, dtype=torch.uint8)
        if dtype == torch.bool and bool((part > 1).any()):
            raise broken(function, f"{brief(name)} with a byte above 1", "booleans")
        empty = start == stop
        found[name] = torch.empty(shape, dtype=dtype) if empty else part.view(dtype).reshape(shape)
    return found


def _span(name: str, entry: object, function: str) -> tuple[torch.dtype, list[int], int, int]:
    """One tensor's dtype, shape and bytes from its header entry."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        got = f"an entry {brief(name)} of another form"
        raise broken(function, got, "dtype, shape, data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        got = f"{brief(name)} of dtype {brief(entry['dtype'])}"
        raise broken(function, got, "one of " + ", ".join(DTYPES))
    shape, span = entry["shape"], entry["data_offsets"]
    whole = isinstance(shape, list) and len(shape) <= 3 and all(map(natural, shape))
    if not whole or not isinstance(span, list) or len(span) != 2 or not all(map(natural, span)):
        got = f"{brief(name)} of shape {brief(shape)} at {brief(span)}"
        raise broken(function, got, "at most three whole numbers, and two")
    if math.prod(max(n, 1) for n in shape) > 2**53:  # a tensor of nothing has strides all the same
        raise broken(function, f"{brief(name)} of shape {brief(shape)}", "a shape that can be")
    if span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        got = f"{brief(name)}: {span[1] - span[0]:,} bytes for shape {shape}"
        raise broken(function, got, f"{math.prod(shape) * dtype.itemsize:,}")
    return dtype, shape, span[0], span[1]


def natural(number: object) -> TypeGuard[int]:
    """A whole number from 0 that JSON keeps exactly, and no bool."""
    return type(number) is int and 0 <= number < 2**53


def parse(text: bytes, function: str) -> Any:
    """JSON without its traps: no repeated key, no NaN, no infinity, no endless nesting."""
    try:
        plain = text.decode("utf-8")
        found = json.loads(
            plain, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite
        )
    except RecursionError:
        raise broken(function, "JSON nested too deeply", f"{MAX_DEPTH} levels") from None
    except ValueError as error:  # also bytes that are no UTF-8, and numbers of endless digits
        raise broken(function, f"a header that is no JSON ({error})", "strict JSON") from error
    if depth(found) > MAX_DEPTH:
        raise broken(function, "JSON nested too deeply", f"{MAX_DEPTH} levels")
    return found


def depth(value: object) -> int:
    """How deeply lists and objects are nested, counted without recursion."""
    level, layer = 0, [value]
    while layer:
        level += 1
        inner = [list(v.values()) if isinstance(v, dict) else v for v in layer if _holds(v)]
        layer = [item for items in inner for item in items]
    return level


def _holds(value: object) -> TypeGuard[dict[Any, Any] | list[Any] | tuple[Any, ...]]:
    return isinstance(value, (dict, list, tuple))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text}")
    return number


def brief(value: object) -> str:
    """A value from a file, cut short: a message must not be as long as a hostile file."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def broken(function: str, got: str, wanted: str) -> FileError:
    """The error for a file whose bytes contradict themselves."""
    cause = "an interrupted download or copy, or a file that was edited"
    return refuse(function, got, wanted, cause, "fetch the file again and compare its size")


def later(function: str, got: str, wanted: str) -> FileError:
    """The error for what this version does not know."""
    cause = "a file from a later saefeat, or one that was edited"
    return refuse(function, got, wanted, cause, "pip install --upgrade saefeat")
