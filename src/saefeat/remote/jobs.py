"""Jobs: runs on a server, sent off batch by batch, polled, and taken up again from their files.

Making the same call with the same file polls what is pending, sends again what failed or was lost,
and asks nothing anew that has arrived. ``Job.load`` does the same from the file and the model
alone, but sends nothing that has failed until it is told to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from nnsight.intervention.backends.remote import RemoteError as Refused

from ..errors import RemoteError, SaefeatError
from ..files.paths import expanded
from ..results.provenance import model_key
from ..results.run import Run
from ..shipping.client import Deadline
from ..shipping.server import Server, require_seconds
from ..verbs.base import Intervention
from .batch import Requests
from .flight import Flight
from .jobfile import Call, JobFile, Part, load_saved, not_ours, save_saved, trusted
from .polling import STRIKES, passing, pauses

if TYPE_CHECKING:
    from nnsight import TransformersModel


class Unreached(RemoteError):
    """The server did not answer: nothing is known, so nothing is lost, and one may ask again."""


@final
class Job:
    """A run on a server that is not waited for: what ``submit`` returns.

    Awaiting it, in asyncio, gives the ``Run`` too.

    Examples:
        >>> import loopback  # NDIF's server code on this machine, in the repository's tests
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
        self, requests: Requests, *, arrived: Collection[int] = (), flight: Flight | None = None
    ) -> None:
        """A job without a file; batches that have arrived are not asked for.

        What ``flight`` knows to be under way is asked for first, and sent again if it is lost.
        """
        self._requests, self._flight = requests, flight
        self._parts = [Part() for _ in requests.batches]
        self._file: JobFile | None = None
        self._silent = 0  # times in a row that the server did not answer
        for number, name in ({} if flight is None else flight.taken()).items():
            if number < len(self._parts):
                self._parts[number] = Part(name, "RECEIVED", taken_up=True)
        for number in arrived:
            self._parts[number] = Part(status="COMPLETED")

    @classmethod
    def resumed(cls, requests: Requests, file: JobFile) -> Job:
        """A job as its file has it, with the results that have arrived."""
        job = cls(requests)
        job._file, job._parts = file, file.parts
        for number, part in enumerate(job._parts):
            if part.status == "COMPLETED":
                requests.accept(number, load_saved(file.result(number), file.fingerprint))
        return job

    @classmethod
    def load(
        cls,
        file: str | Path,
        model: TransformersModel,
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
            >>> import loopback  # NDIF's server code on this machine, in the repository's tests
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
        job_file = JobFile.read(expanded(file, "Job.load", "file"), "Job.load")
        if job_file.about.get("model") != model_key(model):
            got = f"of the model {job_file.about.get('model')!r:.200}"
            raise not_ours(job_file.path, got, "Job.load")
        server = trusted(job_file) if on is None else on
        chosen = intervention or job_file.intervention(model)
        call, prompts = Call.read(job_file.about.get("call"), server.url), job_file.prompts()
        requests = call.requests(model, prompts, chosen)
        given, parts = intervention is not None, len(job_file.parts)
        same = not given or call.fingerprint(model, prompts, chosen) == job_file.fingerprint
        if not same or len(requests.batches) != parts:
            raise not_ours(job_file.path, "of another run", "Job.load")
        return cls.resumed(requests, job_file)

    @property
    def statuses(self) -> tuple[str, ...]:
        """How each batch stands, in nnsight's words; ``"new"`` if not sent yet."""
        return tuple(part.status for part in self._parts)

    @property
    def errors(self) -> tuple[str, ...]:
        """What each batch failed of; empty where it did not."""
        return tuple(part.error for part in self._parts)

    @property
    def in_flight(self) -> int:
        """How many batches are queued or running on the server."""
        return sum(part.in_flight for part in self._parts)

    def resubmit(self) -> Job:
        """Send the batches that failed or were lost once more; the others go on as they are.

        Returns:
            This job.

        Raises:
            RemoteError: if the server cannot be reached.
        """
        for part in self._parts:
            if part.status == "ERROR":
                part.id, part.status, part.error, part.missed = None, "new", "", 0
        self._write()  # before anything is sent: a job whose first request fails has its file too
        on = self._requests.on
        self._send(on.requests - self.in_flight, Deadline(on.timeout))
        return self

    def poll(self) -> Run | None:
        """Ask once how the job stands; send what is still to be sent.

        Returns:
            The ``Run`` when all batches have arrived, else None.

        Raises:
            RemoteError: if a batch failed, its result cannot be read or does not fit, or the server
                no longer knows it: ``resubmit`` sends it again. And if the server does not answer:
                the job goes on, and may be polled again.
            FiringError: as ``run``.
        """
        on = self._requests.on
        self.advance(on.requests - self.in_flight, Deadline(on.timeout))
        return self.result()

    def result(self) -> Run | None:
        """The ``Run``, if all batches have arrived; nobody is asked.

        Raises:
            RemoteError, FiringError: as ``poll``.
        """
        self._raise_failed()
        return self._requests.run() if self._arrived() else None

    def wait(self, timeout: float | None = None) -> Run:
        """Poll until the job is done. Batches in flight arrive before an error is raised.

        Args:
            timeout: seconds; None waits as long as the ``Server`` says, or as long as it takes.

        Raises:
            RemoteError, FiringError: as ``poll``, when the time is over, and when the server has
                not answered 20 times in a row. The job goes on.
        """
        for _ in self.arrivals(timeout):
            pass
        return self._requests.run()

    def arrivals(self, timeout: float | None = None) -> Iterator[int]:
        """The numbers of the batches, each when it has arrived; ``wait`` without the result.

        Raises:
            RemoteError: as ``wait``.
        """
        require_seconds("Job.wait", timeout)
        told = self._here()
        for pause in self._rounds(timeout):
            yield from sorted(self._here() - told)
            told = self._here()
            if not self._requests.on.is_local:
                time.sleep(pause)

    def _rounds(self, timeout: float | None = None) -> Iterator[float]:
        """Ask and send until every batch is here; how long to wait before the next round."""
        on = self._requests.on
        deadline = Deadline(on.timeout if timeout is None else timeout)
        for pause in pauses(deadline):
            try:
                self.advance(on.requests - self.in_flight, deadline)
                self._silent = 0
            except Unreached:
                self._silent += 1
                if deadline.over:
                    break
                if self._silent >= STRIKES or not any(part.id for part in self._parts):
                    raise
            yield 0.0 if self._arrived() else pause  # what has arrived is kept before an error
            if self._arrived():
                return
            if not self.in_flight:
                self._raise_failed()
        got, cause = f"not done after {deadline.seconds:g} s", "a queue; the job goes on"
        raise self._error(got, cause, self._again)

    def advance(self, most: int, deadline: Deadline) -> None:
        """Ask for what is in flight, and send at most so many batches.

        Nothing new is sent once a batch has failed.

        Raises:
            RemoteError: if the server does not answer.
        """
        flying = [(number, part) for number, part in enumerate(self._parts) if part.in_flight]
        for number, part in flying:
            self._ask(number, part, deadline)
        if not any(part.status == "ERROR" for part in self._parts):
            self._send(most + len(flying) - self.in_flight, deadline)

    def _here(self) -> set[int]:
        return {number for number, part in enumerate(self._parts) if part.status == "COMPLETED"}

    def _arrived(self) -> bool:
        return len(self._here()) == len(self._parts)

    def _raise_failed(self) -> None:
        for part in self._parts:
            if part.status == "ERROR":
                raise self._error(part.error, "the request, the server or its limits", RESEND)

    def __await__(self) -> Generator[Any, None, Run]:
        return self._wait().__await__()

    async def _wait(self) -> Run:
        for pause in self._rounds():
            await asyncio.sleep(pause)
        return self._requests.run()

    def _ask(self, number: int, part: Part, deadline: Deadline) -> None:
        """Poll one batch and keep what came."""
        assert part.id is not None
        try:
            saved, status = self._requests.fetch(number, part.id, deadline)
            if saved is not None:
                self._requests.accept(number, saved)
        except (Refused, RemoteError) as error:
            return self._note(part, "ERROR", f"failed: {error}")
        except Exception as error:  # an expired address, or what torch.load makes of half a file
            if passing(error):
                raise self._unreached(error) from error
            return self._note(part, "ERROR", f"without a readable result: {error!r}")
        if status is None and part.taken_up:  # of long ago, and forgotten: no later poll will tell
            return self._note(part, "ERROR", "unknown to the server")
        part.missed = 0 if status is not None else part.missed + 1
        if part.missed >= MISSED:
            return self._note(part, "ERROR", "unknown to the server")
        if status == "COMPLETED" and saved is None:
            return self._note(part, "ERROR", "completed without a result")
        if saved is not None and self._file is not None:
            save_saved(self._file.result(number), saved, self._file.fingerprint)
        status = "COMPLETED" if saved is not None else status
        if status is not None:
            self._note(part, status, "")

    def _send(self, most: int, deadline: Deadline) -> None:
        """Send batches that are not under way, in order, at most so many."""
        waiting = [(n, part) for n, part in enumerate(self._parts) if part.status == "new"]
        for number, part in waiting[: max(0, most)]:
            try:
                part.id = self._requests.send(number, deadline)
            except Refused as error:
                raise self._unreached(error) from error
            except SaefeatError:
                raise
            except ValueError as error:  # pydantic's
                got = f"answered by what is no NDIF server ({error!r:.200})"
                call = "Server(url) with the address of the API itself"
                raise self._error(got, "a login page, or another service", call) from error
            self._note(part, "RECEIVED", "")

    def _note(self, part: Part, status: str, error: str) -> None:
        """Keep how a batch stands, in the file too."""
        if status == "ERROR" and part.taken_up:
            part.id, part.taken_up, status, error = None, False, "new", ""
        if (part.status, part.error) != (status, error):
            part.status, part.error = status, error
            self._write()

    def _write(self) -> None:
        if self._file is not None:
            self._file.write()
        if self._flight is not None:
            self._flight.write(self._parts)

    @property
    def _again(self) -> str:
        """What to do when the time is over."""
        if self._flight is not None:
            return f"the same call again, which takes up what is under way ({self._flight.path})"
        waited = self._file is None and self._requests.task.function != "submit"
        return (
            "a longer Server(timeout=...); checkpoint= or file= keep what is under way"
            if waited
            else POLL
        )

    def _unreached(self, error: Exception) -> RemoteError:
        return self._error(f"not answered: {error}", "the network, or the host", POLL, Unreached)

    def _error(
        self, got: str, cause: str, call: str, kind: type[RemoteError] = RemoteError
    ) -> RemoteError:
        name = "job" if self._file is None else f"job {self._file.path}"
        said = f"a request is {got}, wanted a result. Likely cause: {cause}. Try: {call}"
        return kind(f"{name}: {said}")


MISSED = 20
"""Polls in a row without any status after which a job counts as lost."""
POLL = "poll again: job.poll(), or Job.load(file, model) with the job's file"
RESEND = "job.resubmit(), which sends again what failed and keeps what has arrived"
