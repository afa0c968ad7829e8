"""A run's batches as requests to a server, and what comes back of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..generation.result import Piece
from ..generation.task import Task
from ..results.run import Run
from ..shipping.server import Server
from .batch import backend_of, remote_batch
from .preflight import inspected, require_light
from .validate import Piece as Outputs
from .validate import received


class Requests:
    """A run's batches, each a request to a server.

    Args:
        task: what is run.
        batches: ``input_ids`` and ``attention_mask`` of each.
        on: the server.
        start: the number of the first prompt, which seeds and values by prompt go by.
    """

    def __init__(
        self, task: Task, batches: Sequence[dict[str, Tensor]], on: Server, start: int = 0
    ) -> None:
        self.task, self.batches, self.on = task, batches, on
        self._start = start
        self._run_here: dict[int, Any] = {}
        self._outputs: dict[int, Outputs] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def require_light(self) -> None:
        """Refuse, before anything is sent, what would fail there or weighs too much.

        Raises:
            RemoteError: see ``remote.preflight``.
        """
        task = self.task
        given = task.model, self.batches, task.intervention, task.decoding, self.on.dtype
        require_light(inspected(*given), self.on.payload_limit, task.function)

    def send(self, number: int) -> str:
        """Post a batch; the id of its request.

        A request to ``"local"`` has been run when this returns.
        """
        batch = self.batches[number]
        start = self._start + sum(len(b["input_ids"]) for b in self.batches[:number])
        how = {} if self.on.is_local else {"blocking": False}
        saved, backend = remote_batch(
            self.task.model,
            self.task.program(start, len(batch["input_ids"])),
            batch,
            self.task.decoding.at(start),
            dtype=self.on.dtype,
            remote=self.on.remote,
            **how,
        )
        if not self.on.is_local:
            return backend.job_id
        self._run_here[number] = saved
        return f"local-{number}"

    def fetch(self, number: int, request: str) -> tuple[Any, str | None]:
        """Ask for a batch once: what was saved there, if it has ended, and its status, if any."""
        if self.on.is_local:
            return self._run_here.pop(number), "COMPLETED"
        backend = backend_of(self.task.model, self.on.remote, request)
        answer = backend.poll()
        saved = answer.get("saved") if isinstance(answer, dict) else answer
        return saved, None if backend.status is None else backend.status.value

    def accept(self, number: int, saved: Any) -> None:
        """Keep what a batch's block saved, if it fits.

        Raises:
            RemoteError: naming what does not.
        """
        task, batch = self.task, self.batches[number]
        new = task.decoding.new
        self._outputs[number] = received(saved, task.intervention, batch, new, task.function)

    def piece(self, number: int) -> Piece:
        """The result of a batch that was accepted.

        Raises:
            FiringError: if an edit missed forward passes.
        """
        return self.task.piece(self.batches[number], *self._outputs[number])

    def run(self) -> Run:
        """All batches as one result.

        Raises:
            FiringError: if an edit missed forward passes, or selected no token in any batch.
        """
        return self.task.join([self.piece(number) for number in range(len(self))])
