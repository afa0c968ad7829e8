"""Every verb in every way on the released server: the result of the same call here.

The model runs here on the same weights in the same dtype. In float32 results agree to 1e-4; in
bfloat16 to 2^-6, two of its steps, since another number of threads adds in another order.
"""

from __future__ import annotations

import itertools
import re
from functools import cache

import pytest
from cells import VERBS, WAYS, same
from nnsight.intervention.backends.remote import RemoteError
from served import DTYPES, ISOLATIONS, client
from table import EQUAL, WRONG

import saefeat as sf

pytestmark = pytest.mark.ndif
TOLERANCE = {"float32": 1e-4, "bfloat16": 2.0**-6}
# A sandboxed request takes a fresh interpreter, seconds each; so does not every cell run there.
EVERY_WAY = {("sandbox", "float32"): ("Clamp, values",), ("trusted", "bfloat16"): ("When, held",)}
EVERY_VERB = {("sandbox", "float32"): ("generation",), ("trusted", "bfloat16"): ("generation",)}
BESIDES = {
    ("sandbox", "float32"): ("When, held", "chain |"),
    ("sandbox", "bfloat16"): ("Clamp, values", "When, held", "Probe"),
}
ALSO = ("generation", "trace", "edit")


def cells() -> list[tuple[str, str, str, str]]:
    found = itertools.product(ISOLATIONS, DTYPES, WAYS, VERBS)
    return [cell for cell in found if cell[:2] == ("trusted", "float32") or among_few(cell)]


def among_few(cell: tuple[str, str, str, str]) -> bool:
    isolation, dtype, way, verb = cell
    place = (isolation, dtype)
    if verb in EVERY_WAY.get(place, ()) or way in EVERY_VERB.get(place, ()):
        return True
    return verb in BESIDES.get(place, ()) and way in ALSO


def refusal(cell: tuple[str, str, str, str]) -> str | None:
    """The reason in the message, if the library must refuse this cell."""
    isolation, _, way, _ = cell
    if (isolation, way) == ("sandbox", "samples"):
        return "seed had no effect"
    return None


@cache
def here(folder, way: str, verb: str):
    """The call here; the two isolations share a dtype's results."""
    return WAYS[way](client(folder), VERBS[verb](), None)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_acts(verb, served_models):
    """Else equal results would say nothing."""
    run = here(served_models["trusted", "float32"], "generation", verb)
    assert all(row.changed > 0 for row in run.receipt.rows if row.edit.startswith(("Abl", "Cl")))
    assert all(reading.values.abs().max() > 0 for reading in run.readings)


@pytest.mark.parametrize("cell", cells(), ids=" ".join)
def test_as_here(cell, served_models, server, table):
    isolation, dtype, way, verb = cell
    model, reason = client(served_models[isolation, dtype]), refusal(cell)
    if reason is not None:
        with pytest.raises((sf.SaefeatError, RemoteError), match=reason) as error:
            WAYS[way](model, VERBS[verb](), server)
        said = next(line for line in str(error.value).splitlines() if re.search(reason, line))
        table.refuse(cell, f"{isolation}, {way}: {said:.200}")
        return
    mine = here(served_models["trusted", dtype], way, verb)
    try:
        same(mine, WAYS[way](model, VERBS[verb](), server), TOLERANCE[dtype])
    except Exception:
        table.signs[cell] = WRONG
        raise
    table.signs[cell] = EQUAL
