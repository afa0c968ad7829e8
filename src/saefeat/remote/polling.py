"""How a server is asked again: how long to wait between, and which failures say nothing."""

from __future__ import annotations

from collections.abc import Iterator

from nnsight.intervention.backends.remote import RemoteError as Refused

from ..shipping.client import Deadline

STRIKES = 20
"""Times in a row that a server may not answer before a job is given up."""


def passing(error: BaseException) -> bool:
    """Whether a failure to ask says nothing of the job: the network, a busy server, a bad key."""
    import httpx  # nnsight's own client, as late as nnsight imports it

    if isinstance(error, Refused):  # nnsight's words for what httpx has said
        return error.__cause__ is not None and passing(error.__cause__)
    if isinstance(error, httpx.HTTPStatusError):
        asked, code = "/response/" in error.request.url.path, error.response.status_code
        return code >= 500 or code in (408, 429) or (asked and code in (401, 403))
    return isinstance(error, httpx.TransportError | TimeoutError)


def pauses(deadline: Deadline) -> Iterator[float]:
    """How long to wait between polls, a little at first, then five seconds; until a deadline."""
    pause = 0.1
    while not deadline.over:
        yield pause if deadline.left is None else min(pause, deadline.left)
        pause = min(5.0, pause * 1.3)
