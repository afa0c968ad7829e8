"""A server on this machine that answers nnsight's clients as NDIF does."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import uvicorn
from nnsight.schema.response import ResponseModel, Status

from .far.start import NOT_THERE
from .process import Worker
from .wire import application

if TYPE_CHECKING:
    from ndif.common.schema.request import BackendRequestModel

ENDED = (Status.COMPLETED, Status.ERROR)


class Crossed(NamedTuple):
    """What went between the model and a block in a process of its own, in one job.

    Attributes:
        parks: how often blocks asked for a value or wrote one.
        trips: messages that let the block run on; a read takes two, since what was read is sent
            back. The last one brings the forward pass's result.
        to_block: bytes of messages to the block's process, the request not counted.
        to_model: bytes from it, the job's result not counted.
    """

    parks: int
    trips: int
    to_block: int
    to_model: int


@dataclass
class Job:
    """One request, as the server keeps it."""

    request: BackendRequestModel
    fault: str | None
    status: Status = Status.RECEIVED

    @property
    def id(self) -> str:
        """The name a client polls it by."""
        return self.request.id


@dataclass
class Sessions:
    """The clients that wait at a websocket: what they are to be sent, and None to hang up."""

    queues: dict[str, asyncio.Queue[bytes | None]] = field(default_factory=dict)
    loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> tuple[str, asyncio.Queue[bytes | None]]:
        """A session's id and its queue; called from the loop."""
        name, self.loop = uuid4().hex, asyncio.get_running_loop()
        self.queues[name] = queue = asyncio.Queue()
        return name, queue

    def publish(self, name: str, data: bytes | None) -> None:
        """Send something to a session, from any thread, if it is still there."""
        queue = self.queues.get(name)
        if queue is not None and self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(queue.put_nowait, data)


class Server:
    """What ``serve`` yields: where it listens, and what it was asked to do.

    Attributes:
        url: what to pass as ``remote=``.
        faults: what happens to the next jobs, first in first out; None for nothing.
        payloads: the size of every request so far, in bytes as sent.
        crossings: what crossed between processes in every finished job, with ``sandbox=True``:
            ``parks``, ``trips``, ``to_block``, ``to_model``; the last two in bytes.
        most_at_once: the most jobs that were queued or running together.

    Examples:
        >>> loopback.Server.accept.__name__
        'accept'
    """

    def __init__(self, listening: socket.socket, url: str, worker: Worker, trusted: bool) -> None:
        self.url, self.worker, self.trusted = url, worker, trusted
        self.version: str | None = None
        self.faults: list[str | None] = []
        self.payloads: list[int] = []
        self.crossings: list[Crossed] = []
        self.most_at_once = 0
        self.jobs: dict[str, Job] = {}
        self.store: dict[str, bytes] = {}
        self.sessions = Sessions()
        self._order = threading.Lock()
        self._working: list[threading.Thread] = []
        app = application(self, "/" + url.rpartition("/")[2])
        self._http = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        self._thread = threading.Thread(target=self._http.run, args=([listening],), daemon=True)
        self._thread.start()

    def accept(self, request: BackendRequestModel) -> ResponseModel:
        """Take a job in, and begin it in a thread of its own."""
        if "trusted" not in request.model_fields_set:
            request.trusted = self.trusted
        assert request.payload is not None
        self.payloads.append(len(request.payload))
        job = Job(request, self.faults.pop(0) if self.faults else None)
        self.jobs[job.id] = job
        waiting = [j for j in list(self.jobs.values()) if j.status not in ENDED]
        self.most_at_once = max(self.most_at_once, len(waiting))
        thread = threading.Thread(target=self.work, args=(job,), daemon=True)
        self._working = [other for other in self._working if other.is_alive()] + [thread]
        thread.start()
        text = "Your job has been received and is waiting to be queued."
        return ResponseModel(id=job.id, status=Status.RECEIVED, description=text)

    def work(self, job: Job) -> None:
        """One job from the queue to its result."""
        before = sum(other.status == Status.QUEUED for other in list(self.jobs.values()))
        self.tell(job, Status.QUEUED, f"Moved to position {before + 1} in Queue.")
        with self._order:
            if job.fault == "vanish":
                return self.vanish(job)
            self.tell(job, Status.DISPATCHED, "Your job has been sent to the model deployment.")
            request = job.request.model_dump(mode="json", exclude={"payload"})
            task, blob = {"request": request, "fault": job.fault}, job.request.payload or b""
            error = self.worker.run(task, blob, lambda *sent: self.deliver(job, *sent))
        if error:
            self.tell(job, Status.ERROR, error)

    def tell(self, job: Job, status: Status, text: str) -> None:
        """A status of the queue's: to the client that waits, or to the store for one that polls."""
        told = ResponseModel(id=job.id, status=status, description=text).model_dump_json().encode()
        session = job.request.session_id
        kind = ("publish", session) if session else ("put", f"responses/{job.id}.json")
        self.deliver(job, *kind, told)

    def deliver(self, job: Job, kind: str, name: str, data: bytes) -> None:
        """Do what Redis and the object store do with what a job publishes and stores."""
        if kind == "crossed":
            return self.crossings.append(Crossed(*json.loads(data)))
        result = name == f"{job.id}.pt" or (kind == "publish" and data[:1] != b"{")
        expired = result and job.fault == "expire"
        if not name.endswith(".pt"):
            said = Status.COMPLETED if result else Status(json.loads(data)["status"])
            job.status = job.status if said == Status.LOG else said
        if kind == "publish":  # NDIF closes a session whose result has expired
            self.sessions.publish(name, None if expired else data)
        elif not expired:
            self.store[name] = data

    def vanish(self, job: Job) -> None:
        """As if the server had died: the job is forgotten, its connection cut."""
        del self.jobs[job.id]
        self.store.pop(f"responses/{job.id}.json", None)
        self.sessions.publish(job.request.session_id, None)

    def close(self) -> None:
        """End the job that runs, hang up on those who wait, stop listening; leave no thread."""
        self.worker.stop()
        for thread in self._working:
            thread.join()
        for name in list(self.sessions.queues):
            self.sessions.publish(name, None)
        self._http.should_exit = True
        self._thread.join()

    def environment(self) -> dict[str, Any]:
        """What ``/env`` says: Python's version and the packages of the worker."""
        from nnsight.ndif import get_local_env

        found = get_local_env()
        packages = {n: v for n, v in found["packages"].items() if n not in NOT_THERE}
        if self.version is not None:
            packages["nnsight"] = self.version
        return {**found, "packages": packages}


def listening() -> tuple[socket.socket, str]:
    """A socket on this machine alone, and the address of a server there.

    A request is code that runs as this user, and any user can reach a port of this machine. The
    path is the password: nnsight only ever appends to the address it was given.
    """
    bound = socket.create_server(("127.0.0.1", 0))
    return bound, f"http://127.0.0.1:{bound.getsockname()[1]}/{secrets.token_urlsafe(16)}"
