"""A server on this machine that answers nnsight's clients as NDIF does."""

from __future__ import annotations

import json
import secrets
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from uuid import uuid4

from .far.start import NOT_THERE
from .process import Worker
from .wire import accept_key, form, text_frame, wait_closed

ENDED = ("COMPLETED", "ERROR")


class Crossed(NamedTuple):
    """What went between the model and a block in a process of its own, in one job.

    Attributes:
        parks: how often blocks asked for a value or wrote one.
        trips: round trips; a read takes two, since what was read is sent back.
        to_block: bytes of messages to the block's process, values above all.
        to_model: bytes from it, the job's result not counted.
    """

    parks: int
    trips: int
    to_block: int
    to_model: int


@dataclass
class Job:
    """One request, as the server keeps it."""

    id: str
    session: str
    url: str
    response: dict[str, Any]
    result: bytes | None = None


class Server(ThreadingHTTPServer):
    """What ``serve`` yields: where it listens, and what it was asked to do.

    Attributes:
        url: what to pass as ``remote=``.
        faults: what happens to the next jobs, first in first out; None for nothing.
        payloads: the size of every request so far, in bytes as sent.
        crossings: what crossed between processes in every finished job, with ``copies=True``:
            ``parks``, ``trips``, ``to_block``, ``to_model``; the last two in bytes.
        most_at_once: the most jobs that were queued or running together.

    Examples:
        >>> loopback.Server.__mro__[1].__name__
        'ThreadingHTTPServer'
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, worker: Worker, *, version: str, slow: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        # A request is code that runs as this user, and any user can reach a port of this machine.
        # The path is the password: nnsight only ever appends to the address it was given.
        self.secret = secrets.token_urlsafe(16)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/{self.secret}"
        self.worker, self.version, self.slow = worker, version, slow
        self.faults: list[str | None] = []
        self.payloads: list[int] = []
        self.crossings: list[Crossed] = []
        self.most_at_once = 0
        self.jobs: dict[str, Job] = {}
        self.sessions: dict[str, Any] = {}
        self._order = threading.Lock()
        self._working: list[threading.Thread] = []

    def accept(self, request: dict[str, Any], blob: bytes) -> dict[str, Any]:
        """Take a job in, and begin it in a thread of its own."""
        name = uuid4().hex
        job = Job(name, request["session_id"], f"{self.url}/result/{name}", {})
        self.jobs[name] = job
        self.payloads.append(len(blob))
        fault = self.faults.pop(0) if self.faults else None
        self.tell(job, "RECEIVED", "Your job has been received.", quiet=True)
        received = job.response
        waiting = [j for j in list(self.jobs.values()) if j.response["status"] not in ENDED]
        self.most_at_once = max(self.most_at_once, len(waiting))
        thread = threading.Thread(target=self.work, args=(job, request, blob, fault), daemon=True)
        self._working = [other for other in self._working if other.is_alive()] + [thread]
        thread.start()
        return received

    def work(self, job: Job, request: dict[str, Any], blob: bytes, fault: str | None) -> None:
        """One job from the queue to its result."""
        before = sum(other.response["status"] == "QUEUED" for other in list(self.jobs.values()))
        self.tell(job, "QUEUED", f"Moved to position {before + 1} in Queue.")
        with self._order:
            if fault == "vanish":
                return self.vanish(job)
            self.tell(job, "RUNNING", "Your job has started running.")
            task = {"compress": request["compress"], "env": request["env"]}
            done = self.worker.run(task | {"fault": fault, "slow": self.slow}, blob)
        if done.crossed is not None:
            self.crossings.append(Crossed(*done.crossed))
        if not done.ok:
            return self.tell(job, "ERROR", done.error)
        if fault != "expire":
            half = len(done.result) // 2
            job.result = done.result[:half] if fault == "truncate" else done.result
        self.tell(job, "COMPLETED", "Your job has been completed.", data=job.url)

    def tell(
        self, job: Job, status: str, text: str, *, data: str | None = None, quiet: bool = False
    ) -> None:
        """Record a status, and send it to the client that waits for it."""
        job.response = {"id": job.id, "status": status, "description": text, "data": data}
        connection = self.sessions.get(job.session)
        if connection is not None and not quiet:
            with suppress(OSError, ValueError):  # the client has gone
                connection.write(text_frame(json.dumps(job.response)))

    def vanish(self, job: Job) -> None:
        """As if the server had died: the job is forgotten, its connection cut."""
        del self.jobs[job.id]
        handler = self.sessions.pop(job.session, None)
        if handler is not None:
            handler.cut()

    def close(self) -> None:
        """Stop listening, end the job that runs, hang up on those who wait; leave no thread."""
        self.shutdown()
        self.server_close()
        self.worker.stop()
        for handler in list(self.sessions.values()):
            handler.cut()
        for thread in self._working:
            thread.join()

    def environment(self) -> dict[str, Any]:
        """What ``/env`` says: Python's version and the packages of the worker."""
        from nnsight.ndif import get_local_env

        found = get_local_env()
        installed = {n: v for n, v in found["packages"].items() if n not in NOT_THERE}
        return {**found, "packages": {**installed, "nnsight": self.version}}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to report; anything else is, as ever."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """The endpoints that nnsight's clients call."""

    server: Server  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Statuses, results, the environment; or a subscription."""
        kind, name = self.asked()
        job = self.server.jobs.get(name)
        if kind == "subscribe":
            self.subscribe()
        elif kind == "response" and job is not None:
            self.reply(200, json.dumps(job.response).encode())
        elif kind == "result" and job is not None and job.result is not None:
            self.reply(200, job.result, "application/octet-stream")
        elif kind == "env":
            self.reply(200, json.dumps(self.server.environment()).encode())
        else:
            self.refuse(404, "Not Found")

    def do_POST(self) -> None:
        """A request, unless the client's nnsight is of another version."""
        if self.asked() != ("request", ""):
            return self.refuse(404, "Not Found")
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal():
            return self.refuse(411, "Length Required")
        body = self.rfile.read(int(size))
        theirs = self.headers.get("nnsight-version", "")
        if theirs != self.server.version:
            known = f"this server runs {self.server.version}."
            return self.refuse(400, f"nnsight {theirs} is not supported: {known}")
        try:
            fields = form(self.headers.get("Content-Type", ""), body)
            request, blob = json.loads(fields["data"]), fields["blob"]
            envelope = {name: request[name] for name in ("session_id", "compress")}
        except (KeyError, TypeError, ValueError) as error:
            return self.refuse(400, f"not a request of nnsight's: {type(error).__name__} {error}")
        received = self.server.accept({**envelope, "env": request.get("env") or {}}, blob)
        self.reply(200, json.dumps(received).encode())

    def refuse(self, status: int, detail: str) -> None:
        """An error, and no more on this connection: what follows may be an unread body."""
        self.close_connection = True
        self.reply(status, json.dumps({"detail": detail}).encode())

    def asked(self) -> tuple[str, str]:
        """What is asked for, and of which job; nothing without the server's secret."""
        secret, _, rest = self.path.strip("/").partition("/")
        if not secrets.compare_digest(secret.encode(), self.server.secret.encode()):
            return "", ""
        kind, _, name = rest.partition("/")
        return kind, name

    def subscribe(self) -> None:
        """Become a websocket: send the session's id, then whatever the job's thread sends."""
        session = uuid4().hex
        self.send_response(101, "Switching Protocols")
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept_key(self.headers["Sec-WebSocket-Key"]))
        self.end_headers()
        self.server.sessions[session] = self
        self.close_connection = True
        with suppress(OSError):
            self.write(text_frame(json.dumps({"session_id": session})))
            wait_closed(self.rfile)  # type: ignore[arg-type]
        self.server.sessions.pop(session, None)

    def write(self, frame: bytes) -> None:
        """Send one frame."""
        self.wfile.write(frame)
        self.wfile.flush()

    def cut(self) -> None:
        """Close the connection without a word."""
        with suppress(OSError):
            self.connection.shutdown(2)

    def reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
        """One whole HTTP answer."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
