"""What the freeze keeps of a value, and when two kept values are the same.

A tensor is kept as ``[dtype, shape, hash, statistics, elements]``: the hash tells equality to the
bit, the rest tells rounding from a real change. Plain data is kept as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

RTOL, ATOL = 1e-4, 1e-5
"""A number may differ by RTOL of itself and ATOL of its tensor's scale."""

SHOWN = 8
"""Elements kept from the start of a tensor, and as many evenly spaced ones."""

HASHED = ("fingerprint", "dictionaries", "direction")
"""The last parts of names of our own hashes: what they cover may grow, and no number changes."""

Entry = Any
"""A kept tensor, or plain data."""


def rounded(value: float) -> float | None:
    """Seven digits, a hundred times finer than the tolerance; None for what is not finite."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def hash_of(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() else flat
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]


def kept(tensor: Tensor, scale: float | None = None) -> list[Any]:
    """A tensor as the file has it.

    Statistics are: the scale, Σx, Σ|x|, Σx·cos(1.7 i), which notices another order, and how many
    elements are not finite; of whole numbers and truths, the hash says all, and only Σx is shown.

    Args:
        tensor: any dtype and shape.
        scale: of what the tensor is a small difference, if it is one; the largest |x| by default.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    head = [dtype, list(tensor.shape), hash_of(tensor)]
    flat = tensor.detach().cpu().reshape(-1)
    if not tensor.is_floating_point():
        return [*head, [int(flat.sum())], flat[:SHOWN].long().tolist()]
    x = flat.double()
    finite = torch.where(x.isfinite(), x, 0.0)
    wave = torch.cos(1.7 * torch.arange(len(x), dtype=torch.float64))
    size = finite.abs()
    largest = float(size.max()) if len(x) else 0.0
    numbers = [max(largest, scale or 0.0), finite.sum(), size.sum(), (finite * wave).sum()]
    numbers = [rounded(float(number)) for number in numbers]
    return [*head, [*numbers, int((~x.isfinite()).sum())], [rounded(float(v)) for v in _some(x)]]


def _some(x: Tensor) -> Tensor:
    """All of a short tensor; of a long one the first elements and evenly spaced ones."""
    if len(x) <= 2 * SHOWN:
        return x
    places = torch.linspace(0, len(x) - 1, SHOWN).round().long()
    return torch.cat([x[:SHOWN], x[places]])


@dataclass
class Record:
    """What one case found.

    Attributes:
        values: name → entry; these are compared.
        sizes: name → a number or hash that may change without harm; changes are shown.
    """

    values: dict[str, Entry] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, value: Any, scale: float | None = None) -> None:
        """Keep a tensor, plain data, or a mapping of names to these."""
        if isinstance(value, dict) and any(isinstance(v, (Tensor, dict)) for v in value.values()):
            for inner, one in value.items():
                self.put(f"{name}.{inner}" if name else str(inner), one, scale)
            return
        if name.rpartition(".")[2] in HASHED:
            self.size(name, value)
            return
        if name in self.values:
            raise KeyError(f"{name} was recorded before")
        self.values[name] = kept(value, scale) if isinstance(value, Tensor) else plain(value)

    def size(self, name: str, value: Any) -> None:
        """Keep a number or hash for information."""
        self.sizes[name] = plain(value)


def plain(value: Any) -> Any:
    """JSON data: tuples as lists, floats rounded, what is not finite as None."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return rounded(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{type(value).__name__} is neither a tensor nor plain data")


class Verdict(NamedTuple):
    """How an entry compares: what differs beyond tolerance, and whether a tensor's bits agree."""

    differs: str
    bits: bool | None


def is_tensor(entry: Entry) -> bool:
    """Whether an entry is a kept tensor."""
    return isinstance(entry, list) and len(entry) == 5 and isinstance(entry[0], str)


def compared(old: Entry, new: Entry) -> Verdict:
    """One entry against what the file has."""
    if is_tensor(old) and is_tensor(new):
        return _tensors(old, new)
    return Verdict("" if _same(old, new) else f"{_brief(old)} → {_brief(new)}", None)


def _brief(entry: Entry) -> str:
    text = json.dumps(entry)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _same(old: Any, new: Any) -> bool:
    """Equal; floats to tolerance."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, float) and isinstance(new, (int, float)) and not isinstance(new, bool):
        return abs(old - new) <= RTOL * abs(old) + ATOL
    return type(old) is type(new) and old == new


def _near(old: float | None, new: float | None, scale: float) -> bool:
    """Whether two elements agree; None stands for what is not finite."""
    if old is None or new is None:
        return old is new
    return abs(old - new) <= RTOL * abs(old) + ATOL * scale


def _tensors(old: list[Any], new: list[Any]) -> Verdict:
    bits = old[:3] == new[:3]
    if bits:
        return Verdict("", True)
    if old[:2] != new[:2]:
        return Verdict(f"{old[0]}{old[1]} → {new[0]}{new[1]}", False)
    if len(old[3]) == 1:
        return Verdict(f"whole numbers differ: Σ {old[3][0]} → {new[3][0]}, {new[4]}", False)
    scale, total, size, wave, odd = old[3]
    limits = [RTOL * scale, RTOL * abs(total) + ATOL * size, RTOL * size, RTOL * size]
    names = ("scale", "Σx", "Σ|x|", "Σx·cos")
    found = [
        f"{name} {a} → {b}"
        for name, a, b, limit in zip(
            names, (scale, total, size, wave), new[3], limits, strict=False
        )
        if abs(a - b) > limit
    ]
    found += [] if odd == new[3][4] else [f"not finite {odd} → {new[3][4]}"]
    for place, (a, b) in enumerate(zip(old[4], new[4], strict=True)):
        if not _near(a, b, scale):
            found.append(f"element {place} {a} → {b}")
    return Verdict("; ".join(found[:4]), False)


def write(path: Path, about: dict[str, Any], cases: dict[str, Record]) -> None:
    """The file: JSON with one entry a line, so that a difference can be read."""
    parts = [f'"about": {json.dumps(about, sort_keys=True)}']
    for name, record in sorted(cases.items()):
        lines = [_line(*entry) for entry in record.values.items()]
        sizes = f', "sizes": {json.dumps(record.sizes)}' if record.sizes else ""
        body = ",\n".join(lines)
        parts.append(f'{json.dumps(name)}: {{"values": {{\n{body}\n}}{sizes}}}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _line(name: str, entry: Entry) -> str:
    spelled = json.dumps(entry, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"{json.dumps(name)}: {spelled}"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Record]]:
    """What ``write`` wrote: about, and the cases."""
    found = json.loads(path.read_text(encoding="utf-8"))
    about = found.pop("about")
    cases = {n: Record(one["values"], one.get("sizes", {})) for n, one in found.items()}
    return about, cases
