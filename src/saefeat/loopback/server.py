"""A server on this machine that answers nnsight's clients as NDIF does."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from nnsight import __version__ as NNSIGHT
from nnsight.modeling import huggingface
from transformers.utils import logging

from ..errors import RemoteError, explain
from .process import Worker
from .wire import accept_key, form, text_frame, wait_closed
from .worker import NOT_THERE

FAULTS = ("slow", "fail", "die", "vanish", "truncate", "expire")

ENDED = ("COMPLETED", "ERROR")


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
        most_at_once: the most jobs that were queued or running together.

    Examples:
        >>> sf.Server.__mro__[1].__name__
        'ThreadingHTTPServer'
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, worker: Worker, *, copies: bool, version: str, slow: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.worker, self.copies, self.version, self.slow = worker, copies, version, slow
        self.faults: list[str | None] = []
        self.payloads: list[int] = []
        self.most_at_once = 0
        self.jobs: dict[str, Job] = {}
        self.sessions: dict[str, Any] = {}
        self._order = threading.Lock()

    def accept(self, request: dict[str, Any], blob: bytes) -> dict[str, Any]:
        """Take a job in, and begin it in a thread of its own."""
        name = uuid4().hex
        job = Job(name, request["session_id"], f"{self.url}/result/{name}", {})
        self.jobs[name] = job
        self.payloads.append(len(blob))
        fault = self.faults.pop(0) if self.faults else None
        self.tell(job, "RECEIVED", "Your job has been received.", quiet=True)
        received = job.response
        waiting = [j for j in self.jobs.values() if j.response["status"] not in ENDED]
        self.most_at_once = max(self.most_at_once, len(waiting))
        threading.Thread(target=self.work, args=(job, request, blob, fault), daemon=True).start()
        return received

    def work(self, job: Job, request: dict[str, Any], blob: bytes, fault: str | None) -> None:
        """One job from the queue to its result."""
        before = sum(other.response["status"] == "QUEUED" for other in self.jobs.values())
        self.tell(job, "QUEUED", f"Moved to position {before + 1} in Queue.")
        with self._order:
            if fault == "vanish":
                return self.vanish(job)
            self.tell(job, "RUNNING", "Your job has started running.")
            task = {"compress": request["compress"], "env": request.get("env") or {}}
            task |= {"copies": self.copies, "fault": fault, "slow": self.slow}
            done, error, result = self.worker.run(task, blob)
        if not done:
            return self.tell(job, "ERROR", error)
        if fault != "expire":
            job.result = result[: len(result) // 2] if fault == "truncate" else result
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

    def environment(self) -> dict[str, Any]:
        """What ``/env`` says: Python's version and the packages of the worker."""
        from nnsight.ndif import get_local_env

        found = get_local_env()
        installed = {n: v for n, v in found["packages"].items() if n not in NOT_THERE}
        return {**found, "packages": {**installed, "nnsight": self.version}}


class Handler(BaseHTTPRequestHandler):
    """The endpoints that nnsight's clients call."""

    server: Server  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Statuses, results, the environment; or a subscription."""
        kind, _, name = self.path.strip("/").partition("/")
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
            self.reply(404, b'{"detail": "Not Found"}')

    def do_POST(self) -> None:
        """A request, unless the client's nnsight is of another version."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        theirs = self.headers.get("nnsight-version", "")
        if theirs != self.server.version:
            text = f"nnsight {theirs} is not supported: this server runs {self.server.version}."
            return self.reply(400, json.dumps({"detail": text}).encode())
        fields = form(self.headers["Content-Type"], body)
        received = self.server.accept(json.loads(fields["data"]), fields["blob"])
        self.reply(200, json.dumps(received).encode())

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
            wait_closed(self.rfile)
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


@contextmanager
def serve(
    model: Any,
    *,
    copies: bool = False,
    faults: Sequence[str | None] = (),
    dtype: str = "auto",
    device_map: str | None = None,
    version: str = NNSIGHT,
    slow: float = 1.0,
) -> Iterator[Server]:
    """Run a server on this machine that treats requests as NDIF does: to check code before queues.

    Jobs run one after another in a process of their own, on a copy of the model, with nnsight,
    torch and transformers alone: saefeat, sae_lens, transformer_lens, jaxtyping and beartype cannot
    be imported there. It listens on 127.0.0.1 only. A request is code: whoever can reach the port,
    any user of this machine, can run code as you while the ``with`` block lasts.

    Args:
        model: the nnsight model to serve, whose weights are written to a temporary folder, or a
            folder or repository id from which the worker loads it.
        copies: copy every value between the model and the block, as NDIF does for ordinary keys.
            Gradients do not exist there.
        faults: what befalls the first jobs, one each: ``"slow"`` (by ``slow`` seconds), ``"fail"``,
            ``"die"`` (the worker does), ``"vanish"`` (the server forgets the job and hangs up),
            ``"truncate"`` (half the result arrives), ``"expire"`` (no result any more), or None.
        dtype: as in ``from_pretrained``; ``"auto"`` takes the weights as they are.
        device_map: as in ``from_pretrained``.
        version: the nnsight version it claims; clients of another one are refused.
        slow: seconds that a slow job takes longer.

    Yields:
        The ``Server``; pass its ``url`` as ``remote=``.

    Raises:
        RemoteError: for an unknown fault.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> nnsight.CONFIG.APP.REMOTE_LOGGING = False  # else statuses are shown as they come
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> edits = sf.Ablate(saes.latents({1: [3, 4]}))
        >>> with sf.serve(model) as server:
        ...     there = sf.run(model, ["how do i bake bread"], edits, remote=server.url)
        >>> here = sf.run(model, ["how do i bake bread"], edits)
        >>> torch.allclose(here.logits, there.logits, atol=1e-4)
        True
    """
    require_faults(faults)
    with tempfile.TemporaryDirectory(prefix="saefeat-") as folder, named(model):
        if not isinstance(model, str | Path):
            write(model, folder)
        where = str(model) if isinstance(model, str | Path) else folder
        setup = {"folder": where, "dtype": dtype, "device_map": device_map}
        worker = Worker({**setup, "threads": torch.get_num_threads()})
        server = Server(worker, copies=copies, version=version, slow=slow)
        server.faults += faults
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            worker.stop()


def write(model: Any, folder: str) -> None:
    """The model and its tokenizer in Hugging Face format, without transformers' progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model._module.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


@contextmanager
def named(model: Any) -> Iterator[None]:
    """Let nnsight name the model in a request without asking the Hub.

    Its key holds the repository's id as the Hub spells it, looked up once in a process and kept in
    a table of nnsight's; a model in memory or in a folder has no entry there.
    """
    name = str(model) if isinstance(model, str | Path) else model.repo_id
    known = huggingface._ID_CACHE
    before = known.get(name)
    known[name] = before or name or "in memory"
    try:
        yield
    finally:
        if before is None:
            known.pop(name, None)


def require_faults(faults: Sequence[str | None]) -> None:
    """Refuse faults that do not exist.

    Raises:
        RemoteError: naming those that do.
    """
    unknown = [fault for fault in faults if fault is not None and fault not in FAULTS]
    if unknown:
        raise RemoteError(
            explain(
                "serve",
                "faults",
                got=repr(unknown[0]),
                wanted="one of " + ", ".join(FAULTS),
                cause="a typing error",
                call='serve(model, faults=["fail"])',
            )
        )
