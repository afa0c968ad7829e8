"""Every verb in every way on the released server: the result of the same call here.

The model runs here on the same weights in the same dtype. In float32 results agree to 1e-4; in
bfloat16 to 2^-6, two of its steps, since another number of threads adds in another order.
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest
from cells import VERBS, WAYS, same
from nnsight.intervention.backends.remote import RemoteError
from served import DTYPES, ISOLATIONS, client
from table import EQUAL, WRONG

import saefeat as sf

pytestmark = pytest.mark.ndif
TOLERANCE = {"float32": 1e-4, "bfloat16": 2.0**-6}
# A sandboxed request takes seconds, in a fresh interpreter each; so does not every cell run there.
EVERY_WAY = ("Clamp, values", "When, held")
EVERY_VERB = ("generation", "trace")


def cells() -> list[tuple[str, str, str, str]]:
    found = itertools.product(ISOLATIONS, DTYPES, WAYS, VERBS)
    return [cell for cell in found if cell[:2] == ("trusted", "float32") or among_few(cell)]


def among_few(cell: tuple[str, str, str, str]) -> bool:
    isolation, dtype, way, verb = cell
    if (isolation, dtype) == ("sandbox", "bfloat16"):
        return way == "generation" or verb == "When, held"
    return way in EVERY_VERB or verb in EVERY_WAY


def refusal(cell: tuple[str, str, str, str]) -> str | None:
    """The reason in the message, if the library must refuse this cell."""
    isolation, _, way, _ = cell
    if (isolation, way) == ("sandbox", "samples"):
        return "process"
    return None


@cache
def here(folder, way: str, verb: str):
    """The call here; the two isolations share a dtype's results."""
    return WAYS[way](client(folder), VERBS[verb](), None)


@pytest.mark.parametrize("cell", cells(), ids=" ".join)
def test_as_here(cell, served_models, server, table):
    isolation, dtype, way, verb = cell
    table.signs[cell] = WRONG
    model, reason = client(served_models[isolation, dtype]), refusal(cell)
    if reason is not None:
        with pytest.raises((sf.SaefeatError, RemoteError), match=reason):
            WAYS[way](model, VERBS[verb](), server)
        table.refuse(cell, f"{isolation}, {way}: {reason}")
        return
    mine = here(served_models["trusted", dtype], way, verb)
    same(mine, WAYS[way](model, VERBS[verb](), server), TOLERANCE[dtype])
    table.signs[cell] = EQUAL
