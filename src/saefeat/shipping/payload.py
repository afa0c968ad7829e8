"""What a request weighs, and what in it a server does not have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nnsight import CONFIG
from nnsight.intervention.serialization import CustomCloudUnpickler, loads
from torch import Tensor

from ..errors import RemoteError
from ..kernel.frozen import Frozen
from ..kernel.program import Program

if TYPE_CHECKING:
    from nnsight import TransformersModel

PAYLOAD_LIMIT = 64 << 20
"""Bytes a batch's request may have, 64 MiB: some twelve times what 20 latents at 26 sites need."""

SERVER_HAS = ("torch", "nnsight", "transformers", "numpy", "accelerate", "einops", "cloudpickle")


class Inspector(CustomCloudUnpickler):
    """Rebuilds a request and notes the modules that it takes from where it runs."""

    def find_class(self, module: str, name: str, /) -> Any:
        named = self.persistent_objects["saefeat"]
        named.add(module)
        found = super().find_class(module, name)
        if name == "_make_skeleton_class":  # by its id it would fill our own class with copies
            return lambda *about: found(*about[:4], None, *about[5:])
        if name != "subimport":
            return found
        return lambda wanted: named.add(wanted) or found(wanted)


def strangers(model: TransformersModel, raw: bytes) -> tuple[str, ...]:
    """Modules that a request, or anything pickled as one, names and a server does not have."""
    named: set[str] = set()
    objects = {**model._remoteable_persistent_objects(), "saefeat": named}
    # not RequestModel.deserialize, which enters the block in linecache as if it were its whole file
    loads(raw, objects, Inspector)
    roots = {name.partition(".")[0] for name in named}
    return tuple(sorted(roots - set(SERVER_HAS) - set(sys.stdlib_module_names)))


def require_known(where: str, found: tuple[str, ...]) -> None:
    """Refuse a request that names what no server has.

    Raises:
        RemoteError: naming the modules.
    """
    if found:
        raise RemoteError(
            f"{where}: `intervention` is in need of {', '.join(found)}, wanted nothing but torch,"
            " nnsight and what travels as source. Likely cause: a function of a Function"
            " dictionary, of a When or of Tokens.where, that uses an installed package. Try:"
            ' nnsight.register("the_package"), if it is plain Python, or plain torch'
        )


def require_fits(where: str, parts: dict[str, int], payload: int, limit: int) -> None:
    """Refuse a request that is larger than wanted.

    Raises:
        RemoteError: naming the largest of its parts.
    """
    if payload <= limit:
        return
    largest = max(parts, key=lambda name: parts[name])
    raise RemoteError(
        f"{where}: `payload_limit` is {limit:,} bytes, and the request has {payload:,}, wanted at"
        f" least that; {largest} alone is {parts[largest]:,}. Likely cause: a topk dictionary or an"
        " error term, which need all of a dictionary, or too many latents. Try:"
        " dtype=torch.bfloat16, fewer latents, or a higher payload_limit"
    )


def parts_of(program: Program) -> dict[str, int]:
    """Bytes of the tensors for each place that a program visits."""
    return {f"{visit.path}.{visit.end}": weight(visit.actions) for visit in program.visits}


def compressed(raw: bytes) -> int:
    """Bytes of a request as nnsight sends it."""
    import zstandard  # as late as nnsight imports it

    return len(zstandard.ZstdCompressor(level=6).compress(raw)) if CONFIG.API.COMPRESS else len(raw)


def tensors(data: Any) -> Iterator[Tensor]:
    """Every tensor in nested plain data."""
    return (leaf for leaf in leaves(data) if isinstance(leaf, Tensor))


def leaves(data: Any) -> Iterator[Any]:
    """Everything in nested plain data that is no container."""
    if isinstance(data, Frozen):
        data = vars(data)
    if isinstance(data, dict):
        yield from (leaf for value in data.values() for leaf in leaves(value))
    elif isinstance(data, (list, tuple)):
        yield from (leaf for value in data for leaf in leaves(value))
    else:
        yield data


def weight(data: Any) -> int:
    """Bytes of every tensor's storage in nested plain data, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors(data)}
    return sum(storage.nbytes() for storage in storages.values())
