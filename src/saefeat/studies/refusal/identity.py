"""Identity: what finished work was made from, so that nothing stale is ever reused.

A version number does not change with an edited file, nor with another judge. So the source of the
package, of the judge, and every weight are hashed; what cannot be named is never equal to anything.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
"""The package: the study is part of it."""


def code() -> str:
    """A hash of every source file of the package."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def judge_identity(judge: Any) -> Any:
    """Plain data that differs where a judge does: its source, and the values it holds.

    The source is that of its whole file, helpers included, but not of files it imports. A text
    attribute ``identity`` of the judge speaks for it. Where source or a held value cannot be
    named (a classifier's weights, a function typed at a prompt), the answer differs every time.
    """
    named = getattr(judge, "identity", None)
    if isinstance(named, str):
        return ["identity", _home(judge), named]
    return _described(judge, ())


def _described(value: Any, outer: tuple[int, ...]) -> Any:
    """A value as plain data; ``outer`` are the values around it, which it may hold in a circle."""
    if id(value) in outer:
        return "itself"
    describe = partial(_described, outer=(*outer, id(value)))
    if value is None or isinstance(value, str | int | float | bool | re.Pattern):
        return repr(value)
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(describe, value)]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, *sorted(map(repr, map(describe, value)))]
    if isinstance(value, dict):
        return [[describe(key), describe(one)] for key, one in value.items()]
    if isinstance(value, partial):
        return ["partial", *map(describe, (value.func, value.args, value.keywords))]
    if inspect.ismethod(value):
        return ["method", describe(value.__func__), describe(value.__self__)]
    if inspect.isfunction(value):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        place = value.__code__.co_firstlineno  # two functions of one name in one file
        return [_home(value), place, _source(value), describe([held, value.__defaults__])]
    plain = type(value).__module__ != "builtins" and not isinstance(value, nn.Module | torch.Tensor)
    if plain and hasattr(value, "__dict__") and callable(value):
        return [_home(type(value)), _source(type(value)), describe(vars(value))]
    return uuid.uuid4().hex  # unlike everything


def _home(value: Any) -> str:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _source(value: Any) -> str:
    """A hash of the file that a function or class stands in."""
    try:
        return hashlib.sha256(Path(inspect.getfile(value)).read_bytes()).hexdigest()[:16]
    except (OSError, TypeError):
        return uuid.uuid4().hex


def model_identity(model: Any) -> dict[str, Any]:
    """A model's weights, its configurations, and how its tokenizer reads a chat."""
    module, tokenizer = model._module, model.tokenizer
    generation = getattr(module, "generation_config", None)
    return {
        "weights": weights_fingerprint(module),
        "configuration": module.config.to_json_string(use_diff=False),
        "generation": None if generation is None else generation.to_json_string(use_diff=False),
        "tokenizer": [len(tokenizer), tokenizer.special_tokens_map, str(tokenizer.chat_template)],
    }


def weights_fingerprint(module: nn.Module) -> str:
    """A hash of every parameter's and buffer's name, shape, type and values."""
    digest = hashlib.sha256()
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().reshape(-1).contiguous().cpu()
        digest.update((flat.view(torch.uint8) if flat.numel() else flat).numpy().tobytes())
    return digest.hexdigest()[:16]
