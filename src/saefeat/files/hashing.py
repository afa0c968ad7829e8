"""One content hash: of documents with tensors, of values, and of what a module computes.

A repr will not do: it abbreviates tensors and rounds numbers. Hashed are values, in full, and
equal values give equal hashes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from numpy import generic, ndarray
from torch import Tensor, nn

from ..errors import CheckpointError, ModelError
from .packed import stored


def content_hash(document: object, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a JSON document and of named tensors: their dtypes, shapes and bytes."""
    hashed = hashlib.sha256(canonical(document).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hashed.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hashed.update(raw(tensor))
    return hashed.hexdigest()


def digest(*values: object) -> str:
    """A short content hash of plain data, tensors, dataclasses, functions, modules and SAEs.

    A function is hashed by its code, defaults and enclosed values; what it reads from its module
    is not seen. What has a ``fingerprint`` is hashed by it.
    """
    tensors: dict[str, Tensor] = {}
    try:
        return content_hash([_plain(value, tensors) for value in values], tensors)[:16]
    except RecursionError:  # also of what is merely nested too deeply to be written down
        raise CheckpointError(
            "checkpoint: `identity` is an object that contains itself, or is nested without end,"
            " wanted values that can be written down. Likely cause: a list or dictionary that was"
            " put into itself. Try: plain values, or a dataclass of them"
        ) from None


def canonical(document: object) -> str:
    """JSON with one spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes, row after row, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


# ---------------------------------------------------------------- values as documents


def _plain(value: object, tensors: dict[str, Tensor]) -> object:
    """A value as JSON, its tensors put aside under numbers.

    Objects in JSON are always tags, as a mapping is one too, so that no two values look alike.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        pairs = [[key, value[key]] for key in sorted(value, key=repr)]
        return {"mapping": _plain(pairs, tensors)}
    if isinstance(value, set | frozenset):
        return {"set": _plain(sorted(value, key=repr), tensors)}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, tensors) for item in value]
    if isinstance(value, complex | bytes | bytearray | slice | torch.dtype | torch.device):
        return {type(value).__name__: repr(value)}
    if value is ...:
        return {"ellipsis": None}
    return {type(value).__qualname__: _plain(_content(value), tensors)}


def _content(value: Any) -> object:
    """What tells an object of some class from another: plainer values."""
    if callable(getattr(value, "fingerprint", None)):  # latents, or a dictionary of them
        return value.fingerprint()
    if isinstance(value, nn.Module):
        return [weights(value), computation(value)]
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, ndarray | generic):  # numpy's
        return [str(value.dtype), value.shape, value.tolist()]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        defaults = [value.__defaults__, value.__kwdefaults__]
        return [list(_code(value.__code__)), *defaults, _enclosed(value)]
    raise CheckpointError(
        f"checkpoint: `identity` is a {type(value).__name__} in what the job depends on, wanted"
        " numbers, text, tensors, dictionaries, dataclasses or plain functions. Likely cause: an"
        " object whose content cannot be read, so two jobs could not be told apart. Try: a plain"
        " function, or a dataclass of plain values"
    )


def _code(code: CodeType) -> Iterator[object]:
    """What a function does, the functions written inside it included, with their constants."""
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield constant


# ---------------------------------------------------------------- modules


def weights(module: nn.Module) -> str:
    """A hash of every parameter, buffer and packed weight, at the price of reading each once.

    Hashed are the bit patterns of each row, summed with fixed random factors: integers, so that
    every device and order of summation gives the same, and no two entries can change places.
    """
    sums: list[object] = []
    for name, tensor in stored(module):
        if not isinstance(tensor, Tensor):  # what quantized weights say of themselves
            sums.append((name, tensor))
            continue
        if tensor.is_meta:
            raise ModelError(
                "checkpoint: `model` is not loaded yet, wanted a model with its weights. Likely"
                " cause: nnsight loads a model at its first use. Try: TransformersModel(...,"
                " dispatch=True)"
            )
        sums.append((name, str(tensor.dtype), list(tensor.shape), _row_sums(tensor.detach())))
    return digest(sums)


CHUNK = 2**22
"""Elements that ``weights`` widens to eight bytes at a time."""


def _row_sums(tensor: Tensor) -> Tensor:
    """[rows] int64: each row's bit patterns times fixed odd factors, modulo 2⁶⁴."""
    if not tensor.numel():
        return torch.zeros(0, dtype=torch.int64)
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1).contiguous()
    bits = torch.view_as_real(bits).flatten(1) if bits.is_complex() else bits
    bits = bits.view(widths[bits.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, bits.shape[1:], generator=generator) * 2 + 1
    factors = factors.to(bits.device)
    chunks = bits.split(max(1, CHUNK // bits.shape[1]))
    return torch.cat([(chunk.long() * factors).sum(1).cpu() for chunk in chunks])


_ORIGINS = {"name_or_path", "_name_or_path"}
"""Attributes that only say where a module, or its configuration, was loaded from."""

_SKIPPED = {*nn.Module().__dict__, *_ORIGINS, "forward", "generation_config"}
_SKIPPED |= {"__nnsight__", "_hf_hook", "_saefeat_sites"}
"""Attributes of a module that libraries, and ``model.inferred``, keep for themselves, or that are
hashed elsewhere."""

_LOOKING = ("nnsight.", "saefeat.attribution.crossing.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, Tensor, ndarray, generic),
)


def computation(module: nn.Module) -> str:
    """A hash of what a module computes with its weights.

    Settings are plain attributes and tensors (a norm's epsilon, attention's scaling, an active
    adapter's name, a vector that is added), and those of objects among them; code is ``forward``,
    also one put in place of the class's on one instance, and hooks, with all that they enclose.

    Raises:
        CheckpointError: inside a ``hooked`` block, whose edits are no part of the model.
    """
    own = {id(part) for part in module.modules()}
    parts = []
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if key not in _SKIPPED}
        plain = {key: value for key, value in settings.items() if _is_plain(value)}
        others = {key: _codes(value, own) for key, value in settings.items() if key not in plain}
        kind = f"{type(part).__module__}.{type(part).__qualname__}"
        code = _codes(_forward(part), own)
        parts.append([name, kind, plain, others, code, _hooks(part, own)])
    return digest(parts)


def _hooks(part: nn.Module, own: set[int]) -> list[object]:
    """Which hooks of somebody's making a module has; nnsight's, and some of ours, only look."""
    found: list[object] = []
    for kind in _HOOKS:
        for hook in (getattr(part, kind, None) or {}).values():
            place = _place(hook)
            if place.startswith(_LOOKING):
                continue
            if place.startswith("saefeat."):
                raise CheckpointError(
                    "checkpoint: `model` is inside a `hooked` block, wanted the model itself."
                    " Likely cause: the block's edits would be taken for the model. Try: the call"
                    " outside the block, with the edits as its intervention"
                )
            found.append([kind, place, _codes(hook, own)])
    return found


def _place(hook: object) -> str:
    """The Python module that a hook is from."""
    while isinstance(hook, partial | MethodType):
        hook = hook.func if isinstance(hook, partial) else hook.__func__
    named = hook if hasattr(hook, "__qualname__") else type(hook)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN) and not getattr(value, "is_meta", False)


def _forward(module: nn.Module) -> object:
    """The function a module runs; under nnsight's wrapper, the one that was there before.

    One that was put over the wrapper later is what runs.
    """
    state, function = (vars(module).get(name) for name in ("__nnsight__", "forward"))
    if type(function).__module__.startswith("nnsight.") or "_hf_hook" in vars(module):
        function = getattr(state, "original", function)
    if isinstance(function, FunctionType) and function.__module__.startswith("nnsight."):
        function = _enclosed(function).get("forward")
    return function or type(module).forward


def _codes(function: object, own: set[int]) -> list[object]:
    """The code of a function and of all that it wraps, encloses or is bound to, with their values.

    Modules of the model itself (``own``) are hashed where they stand.
    """
    codes: list[object] = []
    waiting, seen = [function], set[int](own)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or _is_plain(one):
            continue
        seen.add(id(one))
        values = list(_inside(one))
        codes += [_written(one), [value for value in values if _is_plain(value)]]
        waiting += values
    return codes


def _written(one: object) -> object:
    """What is written of a function or an object, without its values."""
    if isinstance(one, FunctionType):
        return list(_code(one.__code__))
    if isinstance(one, nn.Module):  # not of this model: its weights are in nobody else's hash
        return [_place(one), weights(one)]
    return _place(one)


def _inside(one: Any) -> Iterator[object]:
    """The values that a function or an object computes with."""
    if isinstance(one, FunctionType):
        yield from (*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values())
        yield from _enclosed(one).values()
        yield getattr(one, "__wrapped__", None)
    elif isinstance(one, MethodType):
        yield from (one.__func__, one.__self__)
    elif isinstance(one, partial):
        yield from (one.func, *one.args, *one.keywords.values())
    elif isinstance(one, list | tuple):
        yield from one
    elif isinstance(one, Mapping):
        yield from one.values()
    elif not isinstance(one, type):
        yield from (value for _, value in sorted(_attributes(one)))
        calls = [vars(kind).get("__call__") for kind in type(one).__mro__]
        yield from [call for call in calls if isinstance(call, FunctionType)][:1]


def _attributes(one: object) -> Iterator[tuple[str, object]]:
    """An object's attributes that it may compute with."""
    skipped = _SKIPPED if isinstance(one, nn.Module) else _ORIGINS
    for name, value in getattr(one, "__dict__", {}).items():
        if name not in skipped and _computes(value):
            yield name, value


_LIBRARIES = {"nnsight", "torch", "transformers", "tokenizers", "accelerate"}
_LIBRARIES |= sys.stdlib_module_names - {"builtins", "collections", "functools", "types"}
"""Whose objects are somebody else's state: a configuration, a tokenizer, a traced model, a lock."""


def _computes(value: object) -> bool:
    """Plain values, functions, modules, and objects of the user's own making; lists of these."""
    if _is_plain(value) or isinstance(value, FunctionType | MethodType | partial | nn.Module):
        return True
    if isinstance(value, list | tuple | Mapping):
        return all(map(_computes, value.values() if isinstance(value, Mapping) else value))
    known = type(value).__module__.split(".")[0] in _LIBRARIES or isinstance(value, type)
    return not known and (callable(value) or hasattr(value, "__dict__"))


def _enclosed(function: FunctionType) -> dict[str, object]:
    """The values a function encloses, by name; a cell that is still empty is left out."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):
            found[name] = cell.cell_contents
    return found
