"""Whether an object is being pickled for a remote request, and for which model.

A block in a remote trace travels as source with the names it reads. nnsight hands its pickler
neither tracer nor model, so both are read off the call that builds the request.
"""

from __future__ import annotations

import sys
from typing import Any

from nnsight.intervention.envoy import Envoy
from nnsight.schema.request import RequestModel

from .errors import RemoteError, explain


def traced_model() -> Any | None:
    """The model of the request that is being serialized, or None when none is.

    Raises:
        RemoteError: for a session's block that names no model.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code is not RequestModel.serialize.__code__:
        frame = frame.f_back
    if frame is None:
        return None
    envoy = getattr(frame.f_locals["tracer"], "envoy", None)
    if envoy is None:  # a session's tracer knows no model; its block does
        _, *scopes = frame.f_locals["interventions"]
        envoy = next((v for scope in scopes for v in scope.values() if isinstance(v, Envoy)), None)
    if envoy is None:
        raise RemoteError(
            explain(
                "intervention(model)",
                "model",
                got="not to be found in the request",
                wanted="a block that names the model it applies interventions to",
                cause="the model is reached through another object inside the session's block",
                call="bind the model to a name of its own and use that name in the block",
            )
        )
    return envoy.root


def stay_here(subject: object, name: str) -> None:
    """Keep whole dictionaries, and selections of them, out of requests.

    Raises:
        RemoteError: if a request is being serialized.
    """
    if traced_model() is not None:
        raise RemoteError(
            explain(
                "remote trace",
                name,
                got=f"{subject!r}, named in the block",
                wanted="interventions, tensors and plain values alone",
                cause="the intervention is made inside the block, so its dictionary would travel",
                call="make the intervention before the block, and call intervention(model) in it",
            )
        )
