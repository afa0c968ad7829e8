"""Whether an object is being pickled for a remote request, and for which model.

A block in a remote trace travels as source with the names it reads. nnsight hands its pickler
neither tracer nor model, so both are read off the call that builds the request; whatever of it is
not found as nnsight 0.8 has it is an error, never a guess.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

from nnsight import __version__ as NNSIGHT
from nnsight.intervention import serialization
from nnsight.intervention.envoy import Envoy
from nnsight.schema.request import RequestModel

from ..errors import RemoteError


class Request(NamedTuple):
    """A request that is being built: the model it is for, and what its call is given."""

    model: Any
    options: Mapping[str, Any]


def request() -> Request | None:
    """The request that is being serialized, or None when none is.

    Raises:
        RemoteError: for a session's block that names no model, or several; and if nnsight builds
            its requests in another way than we know.
    """
    build, dump = RequestModel.serialize.__code__, serialization.dump.__code__
    frames = list(_stack())
    frame = next((f for f in frames if f.f_code is build), None)
    if frame is None:
        if any(f.f_code is dump for f in frames):
            raise _unknown("a pickle that nnsight makes, but not of a request")
        return None
    tracer, scopes = frame.f_locals.get("tracer"), frame.f_locals.get("interventions")
    if tracer is None or not isinstance(scopes, tuple) or len(scopes) != 3:
        raise _unknown("a request without its tracer and its names")
    envoy = getattr(tracer, "envoy", None)
    if envoy is None:  # a session's tracer knows no model; its block does
        return Request(_named(scopes[1:]), {})
    return Request(envoy.root, getattr(tracer, "kwargs", None) or {})


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _named(scopes: tuple[Any, ...]) -> Any:
    """The one model that a session's block names; an edited copy is that model."""
    envoys = [v for scope in scopes for v in scope.values() if isinstance(v, Envoy)]
    roots = {id(envoy.root._module): envoy.root for envoy in envoys}
    if len(roots) == 1:
        return next(iter(roots.values()))
    several = len(roots) > 1
    got = f"one of {len(roots)} in the request" if several else "not to be found in it"
    cause = (
        "a session over two models, which no server has together"
        if several
        else "the model is reached through another object inside the session's block"
    )
    call = (
        "a session for each model"
        if several
        else "bind the model to a name of its own and use that name in the block"
    )
    raise RemoteError(
        f"intervention(model): `model` is {got}, wanted a block that names the one model it applies"
        f" interventions to. Likely cause: {cause}. Try: {call}"
    )


def _unknown(got: str) -> RemoteError:
    return RemoteError(
        f"intervention(model): `remote` is {got}, wanted a request as nnsight 0.8.1 builds it."
        f" Likely cause: nnsight {NNSIGHT}, which this saefeat does not know. Try: pip install"
        " 'nnsight==0.8.1', or run(..., remote=True), which needs no pickling"
    )


def stay_here(subject: object, name: str) -> None:
    """Keep whole dictionaries, and selections of them, out of requests.

    Raises:
        RemoteError: if a request is being serialized.
    """
    if request() is not None:
        raise RemoteError(
            f"remote trace: `{name}` is {subject!r}, named in the block, wanted interventions,"
            " tensors and plain values alone. Likely cause: the intervention is made inside the"
            " block, so its dictionary would travel. Try: make the intervention before the block,"
            " and call intervention(model) in it"
        )
