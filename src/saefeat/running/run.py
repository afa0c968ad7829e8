"""run: prompts in; text, tokens, readings and a receipt out."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..checks import whole
from ..errors import CheckpointError, PromptError
from ..files.checkpoint import Checkpoint
from ..files.hashing import digest
from ..generation.decoding import Decode, decoding
from ..generation.task import Piece, Task, pack, run_batch, unpack
from ..remote.batch import Requests, require_plain, with_stops
from ..remote.flight import Flight
from ..remote.jobs import Job
from ..remote.preflight import require_sendable
from ..results.provenance import host_of, model_identity, remote_identity
from ..results.receipt import Receipt, without_events
from ..results.run import Run
from ..shipping.server import Server
from ..text.prompts import Prompts, encode_for, split
from ..verbs.base import Chain, Intervention, require_fired, require_rows
from ..verbs.gaps import warn_of_gaps

if TYPE_CHECKING:
    from nnsight import TransformersModel

Folder = str | os.PathLike[str]
Batch = dict[str, Tensor]


@overload
def run(
    model: TransformersModel, prompts: Prompts, intervention: Intervention | None = None, *,
    max_new_tokens: int = 0, decode: Decode | None = None, batch_size: int = 32,
    checkpoint: Folder | None = None, allow_unfired: bool = False, progress: bool = False,
    on: Server | None = None, stream: Literal[False] = False,
) -> Run: ...  # fmt: skip


@overload
def run(
    model: TransformersModel, prompts: Prompts | Iterable[Any],
    intervention: Intervention | None = None, *,
    max_new_tokens: int = 0, decode: Decode | None = None, batch_size: int = 32,
    checkpoint: Folder | None = None, allow_unfired: bool = False, progress: bool = False,
    on: Server | None = None, stream: Literal[True],
) -> Iterator[Run]: ...  # fmt: skip


@checked(own=("batch_size", "max_new_tokens"))
def run(
    model: TransformersModel, prompts: Any, intervention: Intervention | None = None, *,
    max_new_tokens: int = 0, decode: Decode | None = None, batch_size: int = 32,
    checkpoint: Folder | None = None, allow_unfired: bool = False, progress: bool = False,
    on: Server | None = None, stream: bool = False,
) -> Run | Iterator[Run]:  # fmt: skip
    """Run prompts under an intervention, in batches.

    A sample is drawn from its seed and the batch's place in the list, so it is the same again for
    the same ``batch_size``, with or without an intervention in between; torch's own generators stay
    as they were.

    Args:
        model: an nnsight ``TransformersModel``.
        prompts: strings, chats (lists of role and content), token ids or tensors already batched;
            with ``stream`` any iterable of strings, of chats or of id lists.
        intervention: what to apply at every token; None runs the bare model.
        max_new_tokens: how many tokens to generate; 0 makes one forward pass.
        decode: a ``Greedy``, ``Sample`` or ``Beams`` of ``saefeat.generation``; None is greedy.
        batch_size: prompts a batch.
        checkpoint: a folder in which finished batches are kept. A call with the same arguments
            goes on where an earlier one stopped; any other is refused.
        allow_unfired: accept edits that selected no token at all, or saw fewer forward passes than
            tokens were decoded.
        progress: show a progress bar.
        on: a ``saefeat.remote.Server``; None runs here. Each batch is a request, waited for;
            ``submit`` does not wait. The model here needs no weights then, and readings hold zeros
            where no token was selected. Samples are drawn there, from the same seed; a server that
            runs blocks apart from the model refuses them. Beams are refused.
        stream: give a ``Run`` for each batch as it is done, for lists that do not fit in memory.
            Prompts are taken a batch at a time, and what has been given is the caller's: an error
            or Ctrl-C later on loses nothing of it. That an edit never acted is known, and raised,
            when the prompts have come to their end.

    Returns:
        A ``Run``; with ``stream`` an iterator of one for each batch, in order.

    Raises:
        PromptError: for empty or mixed prompts, before any is run (in a stream, when their turn
            comes).
        FiringError: if an edit selected no token in the whole run, or missed forward passes.
        SiteError, ModelError: if the intervention does not fit the model; ModelError too for
            logits that are not finite.
        CheckpointError: for a folder of another job.
        RemoteError: for a request that is too large or bound to fail, or a result that does not
            fit it.
        SaefeatError: for a way of decoding that has no effect, or probes under beams.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> edits = sf.Ablate(saes.latents({1: [3, 4]})) | sf.Probe(saes.latents({2: [0]}))
        >>> out = sf.run(model, ["how do i bake bread", "hello"], edits, max_new_tokens=4)
        >>> out.receipt.rows[0].tokens > 0, out.readings[0].values.shape[0]
        (True, 2)
        >>> lines = (f"how do i bake {what}" for what in ("bread", "cake", "rolls"))
        >>> [len(out.prompts) for out in sf.run(model, lines, batch_size=2, stream=True)]
        [2, 1]
    """
    if on is not None:
        with_stops(model)
    settings = decoding(model, max_new_tokens, decode)
    whole("run", "batch_size", batch_size, error=PromptError)
    chosen = intervention if intervention is not None else Chain(())
    task = Task("run", model, chosen, settings, batch_size, allow_unfired)
    if on is not None:
        require_plain(model, settings, on.remote)
    encode = partial(encode_for, model, new=max_new_tokens)
    if stream:
        groups = ([batch] for batch in _encoded_batches(encode, prompts, batch_size))
        return _streamed(
            task, _pieces(task, on, _checkpoint(task, on, checkpoint), groups, progress)
        )
    encoded = encode(prompts)
    require_rows(chosen, len(encoded["input_ids"]))
    warn_of_gaps("run", chosen, model, encoded)
    finished = _checkpoint(task, on, checkpoint)
    return task.join(list(_pieces(task, on, finished, [split(encoded, batch_size)], progress)))


def _encoded_batches(encode: Callable[[Any], Batch], prompts: Any, size: int) -> Iterator[Batch]:
    """``input_ids`` and ``attention_mask`` [at most size, tokens], each batch when its turn comes.

    A bad prompt is refused then, with the numbers of its batch.
    """
    single = isinstance(prompts, str | Mapping | Tensor)
    listed = isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], int | Mapping)
    if single or listed:  # one prompt, or tensors: nothing to be lazy about
        yield from split(encode(prompts), size)
        return
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | set | frozenset):
        encode(prompts)  # says what it is
    rest, count = iter(prompts), 0
    while chunk := list(islice(rest, size)):
        try:
            # a chunk of numbers, or of messages, would be taken for one prompt
            if any(isinstance(prompt, int | Mapping) for prompt in chunk):
                raise PromptError(
                    "run: `prompts` is an iterable of numbers or messages, wanted strings, chats or"
                    " lists of token ids. Likely cause: one prompt's ids, or one chat, without a"
                    " list around it. Try: run(model, [ids], ..., stream=True)"
                )
            yield encode(chunk)
        except PromptError as error:
            raise PromptError(f"prompts {count}..{count + len(chunk) - 1}: {error}") from error
        count += len(chunk)
    if not count:
        encode([])


def _checkpoint(task: Task, on: Server | None, folder: Folder | None) -> Checkpoint:
    """The finished batches of this very call; without a folder none are kept."""
    if folder is None:
        return Checkpoint(None, {}, "run")
    if on is None:
        identity = model_identity(task.model)
    else:  # nobody here can hash the weights of a model elsewhere
        identity = remote_identity(task.model, on.remote) | {"sent as": str(on.dtype)}
    identity |= {"intervention": digest(task.intervention), **task.provenance.generation}
    return Checkpoint(folder, identity, "run")


def _pieces(
    task: Task, on: Server | None, finished: Checkpoint, groups: Iterable[list[Batch]],
    progress: bool,
) -> Iterator[Piece]:  # fmt: skip
    """Every batch's result, in order: restored, or run; on a server a job for each group."""
    number = start = 0
    with finished, tqdm(disable=not progress, desc="run", unit="batch") as bar:
        for batches in groups:
            pieces: dict[int, Piece] = {}
            for n, batch in enumerate(batches):
                if (kept := finished.load(number + n)) is not None:
                    _require_same_prompts(finished, number + n, batch, kept[1])
                    pieces[n] = unpack(task, *kept)
            bar.update(len(pieces))
            if on is None:
                arriving = _run_here(task, batches, start, set(pieces))
            else:
                flight = _flight(task, on, finished, number)
                arriving = _run_there(task, batches, start, set(pieces), on, flight)
            for n, piece in arriving:
                tensors, meta = pack(piece)
                finished.save(number + n, tensors, meta | {"identity": _identity(batches[n])})
                pieces[n] = piece
                bar.update()
            yield from (pieces[n] for n in range(len(batches)))
            number += len(batches)
            start += sum(len(batch["input_ids"]) for batch in batches)


def _run_here(
    task: Task, batches: list[Batch], start: int, done: Collection[int]
) -> Iterator[tuple[int, Piece]]:
    for n, batch in enumerate(batches):
        size = len(batch["input_ids"])
        if n not in done:
            program, settings = task.program(start, size), task.decoding.at(start)
            yield n, task.piece(batch, *run_batch(task.model, program, batch, settings))
        start += size


def _flight(task: Task, on: Server, finished: Checkpoint, number: int) -> Flight | None:
    """Where the requests of a checkpointed call are kept while they are under way."""
    if finished.folder is None or on.is_local:
        return None
    return Flight(finished.path / "requests.json", host_of(on.remote), number)


def _run_there(
    task: Task,
    batches: list[Batch],
    start: int,
    done: Collection[int],
    server: Server,
    flight: Flight | None,
) -> Iterator[tuple[int, Piece]]:
    requests = Requests(task, batches, server, start)
    if start == 0:  # of a stream, the first batch stands for the others
        require_sendable(requests)
    # a batch that fails does not stop those in flight with it: they arrive, and are kept, first
    for n in Job(requests, arrived=done, flight=flight).arrivals():
        yield n, requests.piece(n)


def _identity(batch: Batch) -> str:
    return digest(batch["input_ids"], batch["attention_mask"])


def _require_same_prompts(finished: Checkpoint, number: int, batch: Batch, meta: Any) -> None:
    if meta["identity"] == _identity(batch):
        return
    raise CheckpointError(
        f"run: `checkpoint` is of another job: {finished.folder} differs in prompts (of batch"
        f" {number}), wanted the prompts of the finished batches unchanged. Likely cause: the list"
        " was changed or put in another order since. Try: the same prompts again, or a folder of"
        " its own for this job"
    )


def _streamed(task: Task, pieces: Iterator[Piece]) -> Iterator[Run]:
    """A batch at a time; whether every edit acted is counted on the way."""
    total: Receipt | None = None
    rows = 0
    for piece in pieces:
        receipt = without_events(piece.run.receipt)
        total = receipt if total is None else total + receipt
        rows += len(piece.run.prompts)
        yield piece.run
    if total is not None and not task.allow_unfired:
        require_fired(total, "run")
    require_rows(task.intervention, rows)
