"""How a server is asked again: how long to wait between, and which failures say nothing."""

from __future__ import annotations

import time
from collections.abc import Generator


def passing(error: Exception) -> bool:
    """Whether a failure to poll says nothing of the job: the network, a busy server, a bad key."""
    import httpx  # nnsight's own client, as late as nnsight imports it

    if isinstance(error, httpx.HTTPStatusError):
        asked, code = "/response/" in error.request.url.path, error.response.status_code
        return code >= 500 or code in (408, 429) or (asked and code in (401, 403))
    return isinstance(error, httpx.TransportError)


def pauses(timeout: float | None) -> Generator[float, None, None]:
    """How long to wait between polls: a little at first, then five seconds."""
    pause, start = 0.1, time.monotonic()
    while timeout is None or time.monotonic() - start < timeout:
        yield pause
        pause = min(5.0, pause * 1.3)
