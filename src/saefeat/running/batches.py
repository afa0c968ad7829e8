"""The batches of a run: from its checkpoint, from the model here, or from a server."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from ..errors import CheckpointError
from ..files.checkpoint import Checkpoint
from ..files.hashing import digest
from ..generation.batch import run_batch
from ..generation.result import Piece, pack, unpack
from ..generation.task import Task
from ..remote.jobs import Job
from ..remote.request import Requests
from ..results.identity import model_identity, remote_identity
from ..shipping.server import Server

Batch = dict[str, Tensor]


class Finished(NamedTuple):
    """A run's finished batches, in a folder or nowhere."""

    task: Task
    checkpoint: Checkpoint

    @classmethod
    def of(cls, task: Task, on: Server | None, folder: str | os.PathLike[str] | None) -> Finished:
        """The finished batches of this very call; None keeps none."""
        if folder is None:
            return cls(task, Checkpoint(None, {}, "run"))
        if on is None:
            identity = model_identity(task.model)
        else:  # nobody here can hash the weights of a model elsewhere
            identity = remote_identity(task.model, on.remote) | {"sent as": str(on.dtype)}
        identity |= {"intervention": digest(task.intervention), **task.provenance.generation}
        return cls(task, Checkpoint(folder, identity, "run"))

    def restored(self, number: int, batch: Batch) -> Piece | None:
        """A batch's result, if it was finished earlier.

        Raises:
            CheckpointError: if it was made of other prompts.
        """
        kept = self.checkpoint.load(number)
        if kept is None:
            return None
        if kept[1]["identity"] == _identity(batch):
            return unpack(self.task.intervention, *kept, self.task.provenance)
        raise CheckpointError(
            f"run: `checkpoint` is of another job: {self.checkpoint.folder} differs in prompts (of"
            f" batch {number}), wanted the prompts of the finished batches unchanged. Likely cause:"
            " the list was changed or put in another order since. Try: the same prompts again, or a"
            " folder of its own for this job"
        )

    def keep(self, number: int, batch: Batch, piece: Piece) -> Piece:
        """The result of a batch, now on disk."""
        tensors, meta = pack(piece)
        self.checkpoint.save(number, tensors, {**meta, "identity": _identity(batch)})
        return piece


def _identity(batch: Batch) -> str:
    return digest(batch["input_ids"], batch["attention_mask"])


def pieces_here(finished: Finished, batches: Iterable[Batch], progress: bool) -> Iterator[Piece]:
    """Every batch's result, in order: restored, or run in the model here."""
    task, start = finished.task, 0
    with finished.checkpoint:
        bar = tqdm(batches, disable=not progress, desc="run", unit="batch")
        for number, batch in enumerate(bar):
            piece = finished.restored(number, batch)
            if piece is None:
                program = task.program(start, len(batch["input_ids"]))
                outputs = run_batch(task.model, program, batch, task.decoding.at(start))
                piece = finished.keep(number, batch, task.piece(batch, *outputs))
            start += len(batch["input_ids"])
            yield piece


def pieces_on(
    server: Server, finished: Finished, groups: Iterable[Sequence[Batch]], progress: bool
) -> Iterator[Piece]:
    """The same on a server: a job for each group of batches, waited for.

    A batch that fails does not stop those in flight with it: they arrive, and are kept, before the
    error is raised.
    """
    number = start = 0
    with ExitStack() as stack:
        stack.enter_context(finished.checkpoint)
        bar = stack.enter_context(tqdm(disable=not progress, desc="run", unit="batch"))
        for batches in groups:
            pieces = {
                index: piece
                for index, batch in enumerate(batches)
                if (piece := finished.restored(number + index, batch)) is not None
            }
            requests = Requests(finished.task, batches, server, start)
            if number == 0:  # of a stream, the first batch stands for the others
                requests.require_light()
            bar.update(len(pieces))
            for index in Job(requests, arrived=pieces).arrivals():
                piece = requests.piece(index)
                pieces[index] = finished.keep(number + index, batches[index], piece)
                bar.update()
            yield from (pieces[index] for index in range(len(batches)))
            number += len(batches)
            start += sum(len(batch["input_ids"]) for batch in batches)
