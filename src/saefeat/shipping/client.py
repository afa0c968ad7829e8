"""nnsight's client, whose every question has an answer in time or an error.

nnsight's own waits up to ten minutes for a byte, and cannot be told another time (0.8.1).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.backends.remote import RemoteError as Refused
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel


@dataclass(frozen=True)
class Deadline:
    """When a call's patience ends: so many seconds after it began, or never."""

    seconds: float | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float | None:
        """Seconds from now on, at least 0; None without an end."""
        if self.seconds is None:
            return None
        return max(0.0, self.seconds - (time.monotonic() - self.begun))

    @property
    def over(self) -> bool:
        """Whether it has passed."""
        return self.left == 0


def within(deadline: Deadline, call: Callable[..., Any], *args: Any) -> Any:
    """What a call gives.

    Raises:
        TimeoutError: when the deadline has passed; the call itself goes on unheard.
    """
    left = deadline.left
    if left is None:
        return call(*args)
    ended: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((call(*args), None))
        except Exception as error:
            ended.put((None, error))

    # no pool: a process would not end before its threads do
    Thread(target=run, daemon=True).start()
    try:
        value, error = ended.get(timeout=left)
    except queue.Empty:
        raise TimeoutError(f"no answer within {deadline.seconds:g} s") from None
    if error is not None:
        raise error
    return value


class Client(RemoteBackend):
    """nnsight's backend, each of whose questions is answered before a deadline, or is an error."""

    def __init__(
        self, model_key: str, remote: bool | str, deadline: Deadline, **options: Any
    ) -> None:
        host = remote if isinstance(remote, str) else None
        super().__init__(model_key, host=host, **options)
        self.deadline = deadline

    def _post(self, request: RequestModel, blob: bytes) -> ResponseModel:
        try:
            return within(self.deadline, super()._post, request, blob)
        except TimeoutError as error:
            raise Refused(f"Failed to send request: {error}") from error

    def poll(self, tracer: Any = None) -> Any:
        """As nnsight's; a deadline that has passed is httpx's error, as others of the network."""
        import httpx  # as late as nnsight imports it

        try:
            return within(self.deadline, super().poll, tracer)
        except TimeoutError as error:
            raise httpx.ReadTimeout(str(error)) from error

    def download_result(self, url: Any) -> Any:
        """As nnsight's, before the deadline."""
        return within(self.deadline, super().download_result, url)
