"""Jobs: a run on a server, sent off batch by batch, polled, and taken up again from its file.

Making the same call with the same file polls what is pending, sends again what failed or was lost,
and asks nothing anew that has arrived. ``Job.load`` does the same from the file and the model
alone, but sends nothing that has failed until it is told to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, final

from nnsight import CONFIG
from nnsight.intervention.backends.remote import RemoteError as Refused

from ..errors import RemoteError
from ..files.identity import model_key
from ..shipping.server import NDIF, Server
from ..verbs.base import Intervention
from .jobfile import (
    Held,
    Part,
    kept_intervention,
    kept_prompts,
    not_ours,
    read_job,
    result_of,
    write_job,
)
from .request import Call, Plan, Post
from .saved import load_saved, save_saved


class Unreached(RemoteError):
    """The server did not answer: nothing is known, so nothing is lost, and one may ask again."""


@final
class Job:
    """A run on a server that is not waited for: what ``submit`` returns.

    Awaiting it, in asyncio, gives the ``Run`` too.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> nnsight.CONFIG.APP.REMOTE_LOGGING = False  # else statuses are shown as they come
        >>> model = tiny.model("chat")
        >>> with loopback.serve(model) as server:
        ...     there = sf.remote.Server(server.url)
        ...     job = sf.remote.submit(model, ["hello"], max_new_tokens=2, on=there)
        ...     out = job.wait()
        >>> job.statuses, len(out.texts)
        (('COMPLETED',), 1)
    """

    def __init__(
        self, plan: Plan, file: Path | None, limit: int, parts: list[Part] | None = None
    ) -> None:
        self._plan, self._file, self._limit = plan, file, limit
        self._parts = [Part() for _ in range(plan.parts)] if parts is None else parts
        self._saved: dict[int, dict[str, Any]] = {}
        for number, part in enumerate(self._parts):
            if part.status == "COMPLETED" and file is not None:
                self._saved[number] = load_saved(result_of(file, number), plan.fingerprint)
                plan.check(number, self._saved[number])

    @classmethod
    def load(
        cls,
        file: str | Path,
        model: Any,
        *,
        on: Server | None = None,
        intervention: Intervention | None = None,
    ) -> Job:
        """A job from its file, in a new process too: to be polled, or sent again where it failed.

        The file holds the arguments, the prompts and the intervention; nothing is sent by loading
        it. A server is asked, with your key, and its answers are unpickled by nnsight: so a file's
        own word for where the job is counts only if that is the host nnsight is set to.

        Args:
            file: what ``submit`` was given; the files beside it are needed too.
            model: the model the job was for; its weights need not be loaded.
            on: where the job is; of the server its address counts alone, the rest is the file's.
                None takes the file's host, if it is the configured one.
            intervention: the intervention, where the file could not hold it.

        Raises:
            RemoteError: for a file that is broken, of another model or of another host, or without
                its intervention.

        Examples:
            >>> from saefeat.studies.refusal import tiny
            >>> nnsight.CONFIG.APP.REMOTE_LOGGING = False
            >>> model = tiny.model("chat")
            >>> with loopback.serve(model) as server:
            ...     there = sf.remote.Server(server.url)
            ...     job = sf.remote.submit(model, ["hello"], on=there, file="hello.json")
            ...     out = sf.remote.Job.load("hello.json", model, on=there).wait()
            >>> out.receipt.passes
            1
        """
        file = Path(file)
        held = read_job(file)
        if held.about.get("model") != model_key(model):
            raise not_ours(file, f"of the model {held.about.get('model')!r:.200}")
        where = _trusted(file, held) if on is None else on
        chosen = intervention or kept_intervention(file, held, model)
        call = Call.read(held.about.get("call"), where.url)
        post = Post.of(model, kept_prompts(file, held), chosen, call)
        same = intervention is None or post.fingerprint() == held.fingerprint
        if not same or len(post.batches) != len(held.parts):
            raise not_ours(file, "of another run")
        plan = post.plan(held.fingerprint)
        plan.about.update({n: v for n, v in held.about.items() if n not in ("host", "call")})
        return cls(plan, file, call.on.requests, held.parts)

    @property
    def statuses(self) -> tuple[str, ...]:
        """How each batch stands, in nnsight's words; ``"new"`` if not sent yet."""
        return tuple(part.status for part in self._parts)

    @property
    def errors(self) -> tuple[str, ...]:
        """What each batch failed of; empty where it did not."""
        return tuple(part.error for part in self._parts)

    @property
    def flying(self) -> int:
        """How many batches are queued or running on the server."""
        return sum(part.flying for part in self._parts)

    def resubmit(self) -> Job:
        """Send the batches that failed or were lost once more; the others go on as they are.

        Returns:
            This job.

        Raises:
            RemoteError: if the server cannot be reached.
        """
        for number, part in enumerate(self._parts):
            if part.status == "ERROR":
                self._parts[number] = Part()
        self._write()  # before anything is sent: a job whose first request fails has its file too
        self._send()
        return self

    def poll(self) -> Any:
        """Ask once how the job stands; send what is still to be sent.

        Returns:
            The ``Run`` when all batches have arrived, else None.

        Raises:
            RemoteError: if a batch failed, its result cannot be read or does not fit, or the server
                no longer knows it: ``resubmit`` sends it again. And if the server does not answer:
                the job goes on, and may be polled again.
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
        assert part.id is not None
        try:
            saved, status = self._plan.fetch(part.id)
            if saved is not None:
                self._plan.check(number, saved)
        except (Refused, RemoteError) as error:
            return self._note(part, "ERROR", f"failed: {error}")
        except Exception as error:  # an expired address, or what torch.load makes of half a file
            if _passing(error):
                raise self._unreached(error) from error
            return self._note(part, "ERROR", f"without a readable result: {error!r}")
        part.missed = 0 if status is not None else part.missed + 1
        if part.missed >= MISSED:
            return self._note(part, "ERROR", "unknown to the server")
        if status == "COMPLETED" and saved is None:
            return self._note(part, "ERROR", "completed without a result")
        if saved is not None:
            self._saved[number] = saved
            if self._file is not None:
                save_saved(result_of(self._file, number), saved, self._plan.fingerprint)
        if status is not None:
            self._note(part, status, "")

    def _send(self) -> None:
        """Send batches that are not under way, at most ``limit`` at once."""
        for number, part in enumerate(self._parts):
            if part.status == "new" and self.flying < self._limit:
                try:
                    part.id = self._plan.send(number)
                except Refused as error:
                    raise self._unreached(error) from error
                self._note(part, "RECEIVED", "")

    def _note(self, part: Part, status: str, error: str) -> None:
        if (part.status, part.error) != (status, error):
            part.status, part.error = status, error
            self._write()

    def _write(self) -> None:
        if self._file is not None:
            write_job(self._file, Held(self._plan.fingerprint, self._plan.about, self._parts))

    def _unreached(self, error: Exception) -> Unreached:
        return Unreached(self._said(f"not answered: {error}", "the network, or the host", POLL))

    def _error(self, got: str, cause: str, call: str) -> RemoteError:
        return RemoteError(self._said(got, cause, call))

    def _said(self, got: str, cause: str, call: str) -> str:
        name = "job" if self._file is None else f"job {self._file}"
        return f"{name}: a request is {got}, wanted a result. Likely cause: {cause}. Try: {call}"


MISSED = 20
"""Polls in a row without any status after which a job counts as lost."""
POLL = "poll again: job.poll(), or Job.load(file, model) with the job's file"
RESEND = "job.resubmit(), which sends again what failed and keeps what has arrived"


def _trusted(file: Path, held: Held) -> Server:
    """The configured host, to which the key belongs, if it is the file's.

    Raises:
        RemoteError: for another.
    """
    host = held.about.get("host")
    if host == CONFIG.API.HOST:
        return NDIF
    raise RemoteError(
        f"Job.load: `on` is not given, and {file} was sent to {host!r:.200}, wanted the"
        f" configured host, {CONFIG.API.HOST}, or one that you name. Likely cause: a job on a"
        " server of your own, or a file from somebody else. Try: Job.load(file, model,"
        f" on=Server({host!r:.200})), if you trust that server"
    )


def _passing(error: Exception) -> bool:
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
