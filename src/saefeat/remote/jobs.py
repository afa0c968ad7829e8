"""Jobs: a run on a server, sent off batch by batch, polled, and resumed from a file.

The file is JSON and holds what was asked (as a fingerprint) and, for each batch, the job's id and
status; results that have arrived lie beside it, as safetensors. It holds no key and no weights.
Making the same call with the same file polls what is pending, sends again what failed or was lost,
and asks nothing anew that has arrived.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from nnsight.intervention.backends.remote import RemoteError as Refused

from ..errors import RemoteError, explain
from .jobfile import Part, beside, load_saved, read_parts, save_saved, write_parts


@dataclass(frozen=True)
class Plan:
    """What a job needs of the run it belongs to.

    ``send(i)`` posts batch i and returns its id; ``fetch(id)`` polls once, giving the saved values
    and the status; ``finish`` makes a result of all the saved values.
    """

    parts: int
    fingerprint: str
    about: dict[str, Any]
    send: Callable[[int], str]
    fetch: Callable[[str], tuple[dict[str, Any] | None, str | None]]
    finish: Callable[[list[dict[str, Any]]], Any]


@final
class Job:
    """A run on a server that is not waited for: what ``submit`` returns.

    Awaiting it, in asyncio, gives the ``Run`` too.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> nnsight.CONFIG.APP.REMOTE_LOGGING = False  # else statuses are shown as they come
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> with sf.serve(model) as server:
        ...     job = sf.submit(model, ["hello"], remote=server.url, max_new_tokens=2)
        ...     out = job.wait()
        >>> job.statuses, len(out.texts)
        (('COMPLETED',), 1)
    """

    def __init__(self, plan: Plan, file: Path | None, limit: int) -> None:
        self._plan, self._file, self._limit = plan, file, limit
        self._parts, self._saved = [Part() for _ in range(plan.parts)], {}
        if file is not None and file.exists():
            self._parts = read_parts(file, plan.fingerprint, plan.parts)
            done = [n for n, part in enumerate(self._parts) if part.status == "COMPLETED"]
            self._saved = {n: load_saved(beside(file, n)) for n in done}
        self._send()

    @property
    def statuses(self) -> tuple[str, ...]:
        """How each batch stands, in nnsight's words; ``"new"`` if not sent yet."""
        return tuple(part.status for part in self._parts)

    @property
    def flying(self) -> int:
        """How many batches are queued or running on the server."""
        return sum(part.flying for part in self._parts)

    def poll(self) -> Any:
        """Ask once how the job stands; send what is still to be sent.

        Returns:
            The ``Run`` when all batches have arrived, else None.

        Raises:
            RemoteError: if a batch failed, its result cannot be read, or the server no longer
                knows it. The same call to ``submit`` with the job's file sends it again.
        """
        for number, part in enumerate(self._parts):
            if part.flying:
                self._ask(number, part)
        self._send()
        for part in self._parts:
            if part.status == "ERROR":
                raise self._error(part.error, "the request, the server or its limits", RESEND)
        if len(self._saved) < len(self._parts):
            return None
        return self._plan.finish([self._saved[n] for n in range(len(self._parts))])

    def wait(self, timeout: float | None = None) -> Any:
        """Poll until the job is done.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            RemoteError: as ``poll``, and when the time is over. The job goes on.
        """
        for pause in pauses(timeout):
            found = self.poll()
            if found is not None:
                return found
            time.sleep(pause)
        raise self._error(f"not done after {timeout} s", "a queue; the job goes on", POLL)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        for pause in pauses(None):
            found = self.poll()
            if found is not None:
                return found
            await asyncio.sleep(pause)

    def _ask(self, number: int, part: Part) -> None:
        """Poll one batch and keep what came."""
        import httpx  # nnsight's own client, as late as nnsight imports it

        assert part.id is not None
        try:
            saved, status = self._plan.fetch(part.id)
        except httpx.TransportError as error:  # nothing is known, so nothing is lost
            raise self._error(
                f"not answering: {error}", "the network, or the host", POLL
            ) from error
        except Refused as error:
            return self._note(part, "ERROR", f"failed: {error}")
        except Exception as error:  # an expired address, or what torch.load makes of half a file
            return self._note(part, "ERROR", f"without a readable result: {error!r}")
        part.missed = 0 if status is not None else part.missed + 1
        if part.missed >= MISSED:
            return self._note(part, "ERROR", "unknown to the server")
        if saved is not None:
            self._saved[number] = saved
            if self._file is not None:
                save_saved(beside(self._file, number), saved)
        if status is not None:
            self._note(part, status, "")

    def _send(self) -> None:
        """Send batches that are not under way, at most ``limit`` at once."""
        for number, part in enumerate(self._parts):
            if part.status == "new" and self.flying < self._limit:
                part.id = self._plan.send(number)
                self._note(part, "RECEIVED", "")

    def _note(self, part: Part, status: str, error: str) -> None:
        if (part.status, part.error) != (status, error):
            part.status, part.error = status, error
            if self._file is not None:
                write_parts(self._file, self._plan.fingerprint, self._plan.about, self._parts)

    def _error(self, got: str, cause: str, call: str) -> RemoteError:
        name = "job" if self._file is None else f"job {self._file}"
        return RemoteError(
            explain(name, "remote", got=got, wanted="a result", cause=cause, call=call)
        )


MISSED = 20
"""Polls in a row without any status after which a job counts as lost."""
POLL = "poll again: job.poll(), or the same call with the job's file"
RESEND = "submit again: the same call, with the job's file to keep what has arrived"


def pauses(timeout: float | None) -> Generator[float, None, None]:
    """How long to wait between polls: a little at first, then five seconds."""
    pause, start = 0.1, time.monotonic()
    while timeout is None or time.monotonic() - start < timeout:
        yield pause
        pause = min(5.0, pause * 1.3)
