"""Several jobs under one limit on requests in flight, none of them lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Generic, TypeVar

from ..errors import RemoteError, SaefeatError
from ..results.run import Run
from ..shipping.client import Deadline
from .jobs import Job, Unreached
from .polling import STRIKES, pauses

Key = TypeVar("Key", bound=Hashable)


class Scheduler(Generic[Key]):
    """Jobs that are started and polled in turn; one that fails does not stop the others.

    A job is started, which sends its first request, when it is its turn.

    Args:
        starts: for each job, the call that submits it.
        requests: how many requests of all jobs together may be queued or running.

    Attributes:
        results: the runs that have arrived.
        failed: what the others failed of.
    """

    def __init__(self, starts: Mapping[Key, Callable[[], Job]], requests: int) -> None:
        self._waiting = dict(starts)
        self._requests = requests
        self._active: dict[Key, Job] = {}
        self._strikes: dict[Key, int] = {}
        self._silence: SaefeatError | None = None  # the last time that it did not answer
        self.results: dict[Key, Run] = {}
        self.failed: dict[Key, SaefeatError] = {}

    def ended(self, timeout: float | None = None) -> Iterator[Key]:
        """Every job's key, when it has ended, well or badly.

        Raises:
            RemoteError: if some have not after ``timeout`` seconds; they go on.
        """
        deadline = Deadline(timeout)
        pause = pauses(deadline)
        while self._waiting or self._active:
            before = len(self.results) + len(self.failed)
            yield from self._start()
            yield from self._poll(deadline)
            if len(self.results) + len(self.failed) > before:
                pause = pauses(deadline)
            if not (self._waiting or self._active):
                return
            if deadline.over:
                raise self._late(deadline) from self._silence
            time.sleep(next(pause, 0.0))

    def _late(self, deadline: Deadline) -> RemoteError:
        count = len(self._waiting) + len(self._active)
        cause = "a queue" if self._silence is None else f"a server that is gone ({self._silence})"
        return RemoteError(
            f"sweep: `on` is a server with {count} settings left after {deadline.seconds:g} s,"
            f" wanted all within Server(timeout=...). Likely cause: {cause}. Try: a longer timeout;"
            " with folder= the same call takes up what is under way"
        )

    def _free(self) -> int:
        return self._requests - sum(job.in_flight for job in self._active.values())

    def _start(self) -> Iterator[Key]:
        """Submit jobs while there is room for a request."""
        for key in list(self._waiting):
            if self._free() <= 0:
                return
            try:
                self._active[key] = self._waiting[key]()
            except Unreached as error:
                if self._given_up(key, error):
                    del self._waiting[key]
                    yield key
                else:  # the others' turn comes first
                    self._waiting[key] = self._waiting.pop(key)
                return
            except SaefeatError as error:
                if not (self._active or self.results):
                    raise
                self.failed[key] = error
                yield key
            del self._waiting[key]

    def _poll(self, deadline: Deadline) -> Iterator[Key]:
        """Ask each job once; it may send what the limit leaves."""
        for key, job in list(self._active.items()):
            try:
                job.advance(self._free(), deadline)
                result = None if job.in_flight else job.result()
            except Unreached as error:
                if not self._given_up(key, error):
                    continue
            except SaefeatError as error:
                self.failed[key] = error
            else:
                self._strikes.pop(key, None)
                self._silence = None
                if result is None:
                    continue
                self.results[key] = result
            del self._active[key]
            yield key

    def _given_up(self, key: Key, error: SaefeatError) -> bool:
        """Whether a server has not answered for so long that the job is given up."""
        self._strikes[key], self._silence = self._strikes.get(key, 0) + 1, error
        if self._strikes[key] < STRIKES:
            return False
        self.failed[key] = error
        return True
