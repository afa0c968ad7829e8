"""What a server says of itself before anything is sent: its nnsight, and the model it has there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..results.provenance import host_of, model_key
from ..shipping.client import Deadline, within
from ..shipping.server import Server

if TYPE_CHECKING:
    from nnsight import TransformersModel

ANSWER = 120.0
"""Seconds a server has to answer both: a busy one lists its packages slowly."""


class Deployed(NamedTuple):
    """A server's nnsight, and the dtype in which it has loaded the model; None if it is not known.

    A server picks the dtype by itself, NDIF's being bfloat16 whatever the checkpoint's (0.1.2).
    """

    nnsight: str | None = None
    dtype: str | None = None


def deployed(model: TransformersModel, on: Server | None) -> Deployed:
    """What a server has; nobody is asked for a run here."""
    if on is None or on.is_local:
        return Deployed()
    host, patience = host_of(on.remote), Deadline(min(ANSWER, on.timeout or ANSWER))
    packages = _asked(f"{host}/env", "packages", patience)
    models = _asked(f"{host}/status", "deployments", patience)
    key = model_key(model)
    found = [m for m in models.values() if isinstance(m, dict) and m.get("model_key") == key]
    dtypes = sorted({str(m["dtype"]).removeprefix("torch.") for m in found if m.get("dtype")})
    return Deployed(packages.get("nnsight"), ", ".join(dtypes) or None)


def _asked(address: str, name: str, patience: Deadline) -> dict[str, Any]:
    """One part of a server's answer; empty if there is none."""
    import httpx  # as late as nnsight imports it

    def answered() -> Any:
        return httpx.get(address, timeout=ANSWER).raise_for_status().json()[name]

    try:
        answer = within(patience, answered)
    except (httpx.HTTPError, TimeoutError, ValueError, KeyError, TypeError):
        return {}
    return answer if isinstance(answer, dict) else {}
