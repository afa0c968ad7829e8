"""How objects are pickled for a remote request, and nowhere else.

A block in a remote trace travels as source with the names it reads, which nnsight pickles with a
pickler of its own. A pickler class may have a dispatch table: it says how instances of a class are
reduced by that pickler alone. So ``copy`` and ``pickle`` treat our objects as any others, also
while a request is being built.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any, TypeVar

from nnsight.intervention.serialization import CustomCloudPickler

from ..errors import RemoteError

T = TypeVar("T")


def in_requests(kind: type[T], reduce: Callable[[T], Any]) -> None:
    """Have nnsight's pickler reduce instances of exactly this class by this function.

    The function gives what ``__reduce__`` would, or raises.
    """
    table: Any = vars(CustomCloudPickler).get("dispatch_table")
    if table is None:  # one in front of cloudpickle's, which other picklers use too
        inherited: Any = CustomCloudPickler.dispatch_table
        table = CustomCloudPickler.dispatch_table = ChainMap({}, inherited)
    table[kind] = reduce


def stay_here(subject: object) -> Any:
    """Keep dictionaries, and selections of them, out of requests.

    Raises:
        RemoteError: always.
    """
    raise RemoteError(
        f"remote trace: the block names {subject!r}, wanted interventions that are bound to the"
        " model, tensors and plain values alone. Likely cause: the intervention is made inside the"
        " block, so its dictionary would travel. Try: bound = intervention.bind(model) before the"
        " block, and bound(model) in it"
    )
