"""run: prompts in; text, tokens, readings and a receipt out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, overload

from ..checks import whole
from ..errors import PromptError
from ..generation.decode import Decode
from ..generation.decoding import decoding
from ..generation.result import Piece, without_events
from ..generation.task import Task
from ..remote.batch import require_plain, with_stops
from ..results.receipt import Receipt
from ..results.run import Run
from ..shipping.server import Server
from ..text.prompts import Prompts, encode_prompts, split
from ..verbs.base import Chain, Intervention, require_fired, require_rows
from .batches import Batch, Finished, pieces_here, pieces_on
from .lazy import encoded_batches

if TYPE_CHECKING:
    from nnsight import TransformersModel

Folder = str | os.PathLike[str]


@overload
def run(
    model: TransformersModel,
    prompts: Prompts,
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int = 0,
    decode: Decode | None = None,
    batch_size: int = 32,
    checkpoint: Folder | None = None,
    allow_unfired: bool = False,
    progress: bool = False,
    on: Server | None = None,
    stream: Literal[False] = False,
) -> Run: ...


@overload
def run(
    model: TransformersModel,
    prompts: Prompts | Iterable[Any],
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int = 0,
    decode: Decode | None = None,
    batch_size: int = 32,
    checkpoint: Folder | None = None,
    allow_unfired: bool = False,
    progress: bool = False,
    on: Server | None = None,
    stream: Literal[True],
) -> Iterator[Run]: ...


def run(
    model: TransformersModel,
    prompts: Any,
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int = 0,
    decode: Decode | None = None,
    batch_size: int = 32,
    checkpoint: Folder | None = None,
    allow_unfired: bool = False,
    progress: bool = False,
    on: Server | None = None,
    stream: bool = False,
) -> Run | Iterator[Run]:
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
        SiteError, ModelError: if the intervention does not fit the model.
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
    task.require_lowered()
    if on is not None:
        require_plain(model, settings, on.remote)
    tokenizer = getattr(model, "tokenizer", None)
    if stream:
        lazily = encoded_batches(tokenizer, prompts, batch_size)
        finished = Finished.of(task, on, checkpoint)
        return _streamed(task, _pieces(on, finished, ([batch] for batch in lazily), progress))
    encoded = encode_prompts(tokenizer, prompts)
    require_rows(chosen, len(encoded["input_ids"]))
    finished = Finished.of(task, on, checkpoint)
    return task.join(list(_pieces(on, finished, [split(encoded, batch_size)], progress)))


def _pieces(
    on: Server | None, finished: Finished, groups: Iterable[list[Batch]], progress: bool
) -> Iterator[Piece]:
    """Every batch's result, from where it is run."""
    if on is None:
        return pieces_here(finished, chain.from_iterable(groups), progress)
    return pieces_on(on, finished, groups, progress)


def _streamed(task: Task, pieces: Iterator[Piece]) -> Iterator[Run]:
    """A batch at a time; whether every edit acted is counted on the way."""
    total: Receipt | None = None
    rows = 0
    for piece in pieces:
        receipt = without_events(piece).run.receipt
        total = receipt if total is None else total + receipt
        rows += len(piece.run.prompts)
        yield piece.run
    if total is not None and not task.allow_unfired:
        require_fired(total, "run")
    require_rows(task.intervention, rows)
