"""Identity: hashes of what a result depends on, so that two jobs are told apart.

A repr will not do: it abbreviates tensors and rounds numbers. Hashed are values, in full.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ModelError, RemoteError
from ..model.modules import torch_module
from ..results.provenance import versions


def digest(*values: Any) -> str:
    """A hash of plain data, tensors, dataclasses (interventions too) and dictionaries of an SAE.

    Equal values give equal hashes on every machine. A function is hashed by its code, defaults and
    enclosed values; what it reads from its module is not seen.

    Raises:
        CheckpointError: for a value that says nothing of its content.
    """
    found = hashlib.sha256()
    for value in values:
        for piece in _pieces(value):
            found.update(str(len(piece)).encode() + b":" + piece)
    return found.hexdigest()[:16]


def model_identity(model: Any) -> dict[str, Any]:
    """What of a model decides a result: class, weights, configuration, and the libraries.

    Raises:
        ModelError: for an edited copy, whose edits cannot be told apart, or without weights.
    """
    module = torch_module(model)
    require_unedited(model)
    config, decoding = (getattr(module, name, None) for name in ("config", "generation_config"))
    return {
        "model": type(module).__name__,
        "weights": weights(module),
        "configuration": digest(_settings(config)),
        "generation configuration": digest(_settings(decoding)),
        "versions": versions(),
    }


def remote_identity(model: Any, remote: bool | str) -> dict[str, Any]:
    """The same of a model on a server, whose weights nobody here can hash: its name, and where.

    Raises:
        ModelError: for an edited copy.
    """
    require_unedited(model)
    return {"model": model_key(model), "remote": str(remote), "versions": versions()}


def model_key(model: Any) -> str:
    """The name by which a server knows the model.

    Raises:
        RemoteError: for a model that has none, or whose repository cannot be looked up.
    """
    import httpx  # as late as nnsight imports it

    try:
        return model.to_model_key()
    except (ValueError, OSError, httpx.HTTPError) as error:
        name = getattr(model, "repo_id", None)
        raise RemoteError(
            f"remote: `model` is {name!r}, which has no name on the Hub ({type(error).__name__}),"
            " wanted the model of a repository, by its id. Likely cause: a model in memory or in a"
            " folder, which only `serve` knows, or no network. Try:"
            ' nnsight.TransformersModel("organization/model", tokenizer=...), whose weights need'
            " not be loaded; or `with serve(model) as server:` around the call"
        ) from error


def require_unedited(model: Any) -> None:
    """Refuse an edited copy, whose results could not be told from another copy's.

    Raises:
        ModelError: for one.
    """
    if getattr(model, "_edits", None):
        raise ModelError(
            "checkpoint: `model` is an edited copy, wanted the model itself. Likely cause: what a"
            " copy's edits do cannot be hashed, so another copy's results could be taken for this"
            " one's. Try: run(model, prompts, intervention, checkpoint=...) on the original"
        )


def weights(module: nn.Module) -> str:
    """A hash of every parameter and buffer, exact, at the price of reading each twice.

    Hashed are the sums of bit patterns over rows and over columns: integers, so that every device
    and order of summation gives the same.
    """
    found = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise ModelError(
                "checkpoint: `model` is not loaded yet, wanted a model with its weights. Likely"
                " cause: nnsight loads a model at its first use. Try: TransformersModel(...,"
                " dispatch=True)"
            )
        found.append((name, str(tensor.dtype), list(tensor.shape), _sums(tensor.detach())))
    return digest(found)


def _sums(tensor: Tensor) -> list[Tensor]:
    """Row and column sums of a tensor's bit patterns."""
    if not tensor.numel():
        return []
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1).contiguous()
    bits = torch.view_as_real(bits).flatten(1) if bits.is_complex() else bits
    bits = bits.view(widths[bits.element_size()])
    return [bits.sum(0, dtype=torch.int64).cpu(), bits.sum(1, dtype=torch.int64).cpu()]


def _settings(config: Any) -> dict[str, Any]:
    """A configuration's settings, less those that only say where it was loaded from."""
    found = config.to_dict() if hasattr(config, "to_dict") else {}
    aside = ("_name_or_path", "transformers_version")
    return {name: value for name, value in found.items() if name not in aside}


def _pieces(value: Any) -> Iterator[bytes]:
    """A value as bytes, each piece with its kind, so that [1, "2"] is not ["1", 2]."""
    if value is None or value is ... or isinstance(value, bool | int | float | complex | str):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"tensor {plain.dtype} {tuple(plain.shape)}".encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield from _pieces(key)
            yield from _pieces(value[key])
    elif isinstance(value, Sequence | slice | set | frozenset):
        yield from _list(value)
    else:
        yield from _object(value)


def _list(value: Any) -> Iterator[bytes]:
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    listed: Iterable[Any] = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
    yield f"sequence {len(value)}".encode()
    for item in listed:
        yield from _pieces(item)


def _object(value: Any) -> Iterator[bytes]:
    """A value of some class: a dictionary, a module, a function, or a dataclass."""
    yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
    if isinstance(value, torch.dtype | torch.device):
        yield str(value).encode()
    elif callable(getattr(value, "fingerprint", None)):  # a dictionary
        sites = [str(getattr(value, name, None)) for name in ("site", "write_site")]
        yield from _pieces([value.fingerprint(), *sites, getattr(value, "excluded", None)])
    elif isinstance(value, nn.Module):
        yield weights(value).encode()
    elif is_dataclass(value):
        yield from _pieces({field.name: getattr(value, field.name) for field in fields(value)})
    elif callable(getattr(value, "item", None)):  # numpy's numbers
        yield from _pieces(value.item())
    elif isinstance(getattr(value, "__code__", None), type(_object.__code__)):
        yield from _function(value)
    else:
        raise CheckpointError(
            f"checkpoint: `identity` is a {type(value).__name__} in what the job depends on, wanted"
            " numbers, text, tensors, dictionaries, dataclasses or plain functions. Likely cause:"
            " an object whose content cannot be read, so two jobs could not be told apart. Try: a"
            " plain function, or a dataclass of plain values"
        )


def _function(function: Callable[..., Any]) -> Iterator[bytes]:
    """A function by its code, defaults and enclosed values."""
    code: Any = function.__code__  # type: ignore[attr-defined]
    yield from _code(code)
    enclosed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    owner = getattr(function, "__self__", None)
    defaults = [getattr(function, name, None) for name in ("__defaults__", "__kwdefaults__")]
    yield from _pieces([code.co_names, *defaults, enclosed, owner])


def _code(code: Any) -> Iterator[bytes]:
    """What a function does, the functions written inside it included, with their constants."""
    yield code.co_code
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from _code(constant)
            yield from _pieces(constant.co_names)
        else:
            yield from _pieces(constant)
