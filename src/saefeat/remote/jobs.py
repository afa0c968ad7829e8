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

from ..arguments import checked
from ..checks import whole
from ..errors import PromptError, RemoteError
from ..files.paths import expanded
from ..generation.decoding import Decode, Greedy
from ..results.provenance import model_key, require_unedited
from ..results.run import Run
from ..shipping.server import NDIF, Server
from ..text.prompts import Prompts, encode_for
from ..verbs.base import Chain, Intervention
from .batch import Requests, backend_of
from .flight import Flight
from .jobfile import Call, JobFile, Part, load_saved, not_ours, save_saved, trusted
from .polling import passing, pauses
from .preflight import require_sendable

if TYPE_CHECKING:
    from nnsight import TransformersModel


@checked(own=("batch_size", "max_new_tokens", "on"))
def submit(
    model: TransformersModel, prompts: Prompts, intervention: Intervention | None = None, *,
    max_new_tokens: int = 0, decode: Decode | None = None, batch_size: int = 32,
    allow_unfired: bool = False, on: Server = NDIF, file: str | Path | None = None,
) -> Job:  # fmt: skip
    """Send a run to a server and return at once.

    With ``file`` nothing is lost: the same call with the same file, in a new process too, polls
    what is pending, sends again what failed, and keeps what has arrived. So does ``Job.load`` with
    the file and the model alone. What is not listed here is as in ``run``.

    Args:
        model: an nnsight ``TransformersModel``; its weights need not be loaded.
        batch_size: prompts a batch; each is a request.
        on: the server, the NDIF host that nnsight is set to by default.
        file: a JSON file for the job's state. Beside it lie the prompts, the intervention (unless
            it has a function, which no file can hold) and results that have arrived.

    Returns:
        A ``Job``; its ``wait``, its ``poll`` or awaiting it gives the ``Run``.

    Raises:
        RemoteError: for a request too large or bound to fail, the file of another run, or a server
            that does not answer.
        CheckpointError: with ``file``, for a function that cannot be told from another.
        SiteError, ModelError, PromptError, LatentError: as ``run``.

    Examples:
        >>> import loopback  # NDIF's server code on this machine, in the repository's tests
        >>> from saefeat.studies.refusal import tiny
        >>> nnsight.CONFIG.APP.REMOTE_LOGGING = False  # else statuses are shown as they come
        >>> model = tiny.model("chat")
        >>> with loopback.serve(model) as server:
        ...     job = sf.remote.submit(model, ["hello"], on=sf.remote.Server(server.url))
        ...     job.wait().receipt.passes
        1
    """
    call = Call(max_new_tokens, decode or Greedy(), batch_size, allow_unfired, on)
    chosen = intervention if intervention is not None else Chain(())
    whole("submit", "max_new_tokens", max_new_tokens, 0, error=PromptError)
    encoded = encode_for(model, prompts, max_new_tokens)
    encoded = {name: tensor.long() for name, tensor in encoded.items()}  # as a file has them
    requests = call.requests(model, encoded, chosen)
    require_sendable(requests)
    if file is None:
        return Job(requests).resubmit()
    require_unedited(model)
    about = {"model": model_key(model), "call": call.to_dict()}
    about["host"] = backend_of(model, on.remote).host
    parts = [Part() for _ in requests.batches]
    fingerprint = call.fingerprint(model, encoded, chosen)
    job = JobFile(expanded(file, "submit", "file"), fingerprint, about, parts)
    if job.path.exists():
        old = JobFile.read(job.path)
        if old.fingerprint != fingerprint or len(old.parts) != len(parts):
            raise not_ours(job.path, "of another run")
        old.about |= about  # this call's own address and limits
        return Job.resumed(requests, old).resubmit()
    job.keep_call(encoded, chosen, model)
    return Job.resumed(requests, job).resubmit()


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
        job_file = JobFile.read(expanded(file, "Job.load", "file"))
        if job_file.about.get("model") != model_key(model):
            raise not_ours(job_file.path, f"of the model {job_file.about.get('model')!r:.200}")
        server = trusted(job_file) if on is None else on
        chosen = intervention or job_file.intervention(model)
        call, prompts = Call.read(job_file.about.get("call"), server.url), job_file.prompts()
        requests = call.requests(model, prompts, chosen)
        given, parts = intervention is not None, len(job_file.parts)
        same = not given or call.fingerprint(model, prompts, chosen) == job_file.fingerprint
        if not same or len(requests.batches) != parts:
            raise not_ours(job_file.path, "of another run")
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
        self._send(self._requests.on.requests - self.in_flight)
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
        self.advance(self._requests.on.requests - self.in_flight)
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
            RemoteError, FiringError: as ``poll``, and when the time is over. The job goes on.
        """
        for _ in self.arrivals(timeout):
            pass
        return self._requests.run()

    def arrivals(self, timeout: float | None = None) -> Iterator[int]:
        """The numbers of the batches, each when it has arrived; ``wait`` without the result.

        Raises:
            RemoteError: as ``wait``.
        """
        limit = self._requests.on.timeout if timeout is None else timeout
        for pause in pauses(limit):
            yield from self.advance(self._requests.on.requests - self.in_flight)
            if self._arrived():
                return
            if not self.in_flight:
                self._raise_failed()
            if not self._requests.on.is_local:
                time.sleep(pause)
        raise self._error(f"not done after {limit} s", "a queue; the job goes on", self._again)

    def advance(self, most: int) -> list[int]:
        """Ask for what is in flight, and send at most so many batches; what has arrived.

        Nothing new is sent once a batch has failed.

        Raises:
            RemoteError: if the server does not answer.
        """
        flying = [(number, part) for number, part in enumerate(self._parts) if part.in_flight]
        arrived = [number for number, part in flying if self._ask(number, part)]
        if not any(part.status == "ERROR" for part in self._parts):
            self._send(most + len(flying) - self.in_flight)
        return arrived

    def _arrived(self) -> bool:
        return all(part.status == "COMPLETED" for part in self._parts)

    def _raise_failed(self) -> None:
        for part in self._parts:
            if part.status == "ERROR":
                raise self._error(part.error, "the request, the server or its limits", RESEND)

    def __await__(self) -> Generator[Any, None, Run]:
        return self._wait().__await__()

    async def _wait(self) -> Run:
        pause = pauses(None)
        while (result := self.poll()) is None:
            await asyncio.sleep(next(pause))
        return result

    def _ask(self, number: int, part: Part) -> bool:
        """Poll one batch and keep what came; whether it has arrived."""
        assert part.id is not None
        try:
            saved, status = self._requests.fetch(number, part.id)
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
        return saved is not None

    def _send(self, most: int) -> None:
        """Send batches that are not under way, in order, at most so many."""
        waiting = [(n, part) for n, part in enumerate(self._parts) if part.status == "new"]
        for number, part in waiting[: max(0, most)]:
            try:
                part.id = self._requests.send(number)
            except Refused as error:
                raise self._unreached(error) from error
            self._note(part, "RECEIVED", "")

    def _note(self, part: Part, status: str, error: str) -> bool:
        """Keep how a batch stands, in the file too; no batch has arrived by that."""
        if status == "ERROR" and part.taken_up:
            part.id, part.taken_up, status, error = None, False, "new", ""
        if (part.status, part.error) != (status, error):
            part.status, part.error = status, error
            self._write()
        return False

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
