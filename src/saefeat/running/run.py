"""run and stream: prompts in; text, tokens, readings and a receipt out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import CheckpointError, PromptError
from ..files.checkpoint import Checkpoint
from ..files.identity import digest, model_identity, remote_identity
from ..generation.batch import require_passes, run_batch
from ..generation.decoding import Decoding, decoding, require_beamable, until_stop, whole_number
from ..generation.result import Piece, join, pack, piece, provenance, unpack, without_events
from ..kernel.log import Log
from ..kernel.program import Program
from ..remote.batch import remote_batch, require_plain, with_stops
from ..remote.preflight import inspected, require_light
from ..remote.validate import received
from ..results.provenance import Provenance
from ..results.receipt import Receipt
from ..results.run import Run
from ..shipping.payload import PAYLOAD_LIMIT
from ..text.prompts import Prompts, encode_prompts, split
from ..verbs.base import Chain, Intervention, by_prompt, require_fired, require_rows
from ..verbs.lower import lower

Folder = str | os.PathLike[str]


def run(
    model: Any,
    prompts: Prompts,
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int = 0,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    num_beams: int = 1,
    stop: Sequence[int] = (),
    batch_size: int = 32,
    checkpoint: Folder | None = None,
    allow_unfired: bool = False,
    progress: bool = False,
    remote: bool | str = False,
    dtype: torch.dtype | None = None,
    payload_limit: int = PAYLOAD_LIMIT,
) -> Run:
    """Run prompts under an intervention, in batches.

    Decoding is greedy unless a temperature or beams are given. A sample is drawn from ``seed`` and
    the batch's place in the list, so it is the same again for the same ``batch_size``, with or
    without an intervention in between; torch's own generators stay as they were.

    Under beams an edit acts on every beam that is searched. Receipts count them all, without
    events; probes are refused, since beams are dropped on the way.

    Args:
        model: an nnsight ``TransformersModel``.
        prompts: strings, chats (lists of role and content) or token ids; see ``encode_prompts``.
        intervention: what to apply at every token; None runs the bare model.
        max_new_tokens: how many tokens to generate; 0 makes one forward pass.
        temperature: sample, from softmax(logits / temperature).
        top_p: sample from the fewest tokens that hold this probability; all by default.
        top_k: sample from this many tokens; all by default.
        seed: of the sampling; needed with a temperature.
        num_beams: sequences searched for each prompt.
        stop: token ids that end a completion, besides the model's own.
        batch_size: prompts a batch.
        checkpoint: a folder in which finished batches are kept. A call with the same arguments
            goes on where an earlier one stopped; any other is refused.
        allow_unfired: accept edits that selected no token at all, or saw fewer forward passes than
            tokens were decoded.
        progress: show a progress bar.
        remote: True runs on NDIF, a URL on another server, ``"local"`` here by way of a request.
            Each batch is one job, waited for; ``submit`` does not wait. The model here needs no
            weights then, and readings hold zeros where no token was selected. Samples are drawn
            there, from the same seed; a server that runs blocks apart from the model refuses them.
            Beams are refused.
        dtype: of the matrices that are sent; None sends each in the narrowest dtype that holds it
            exactly. Only with ``remote``.
        payload_limit: the most bytes a batch's request may have. Only with ``remote``.

    Returns:
        A ``Run``.

    Raises:
        PromptError: for empty or mixed prompts, before any is run.
        FiringError: if an edit selected no token in the whole run, or missed forward passes.
        SiteError, ModelError: if the intervention does not fit the model.
        CheckpointError: for a folder of another job.
        RemoteError: for a request that is too large or bound to fail, or a result that does not
            fit it.
        SaefeatError: for sampling without a seed, or probes under beams.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> edits = sf.Ablate(saes.latents({1: [3, 4]})) | sf.Probe(saes.latents({2: [0]}))
        >>> out = sf.run(model, ["how do i bake bread", "hello"], edits, max_new_tokens=4)
        >>> out.receipt.rows[0].tokens > 0, out.readings[0].values.shape[0]
        (True, 2)
        >>> sample = dict(max_new_tokens=4, temperature=0.8, seed=0)
        >>> sf.run(model, "hello", **sample).texts == sf.run(model, "hello", **sample).texts
        True
    """
    if remote:
        with_stops(model)
    settings = decoding(
        model, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        seed=seed, num_beams=num_beams, stop=stop,
    )  # fmt: skip
    whole_number("batch_size", batch_size, 1)
    encoded = encode_prompts(getattr(model, "tokenizer", None), prompts)
    chosen = intervention if intervention is not None else Chain(())
    require_rows(chosen, len(encoded["input_ids"]))
    if remote:
        require_plain(model, settings, remote)
    batches = split(encoded, batch_size)
    job = _job(model, chosen, settings, batch_size, allow_unfired, "run")
    if remote:
        job = job._replace(remote={"remote": remote, "dtype": dtype})
        require_light(inspected(model, batches, chosen, settings, dtype), payload_limit)
    job = job._replace(checkpoint=_checkpoint(job, checkpoint))
    result = join(list(_pieces(job, batches, progress)))
    if not allow_unfired:
        require_fired(result.receipt, "run")
    return result


def stream(
    model: Any,
    prompts: Prompts | Iterable[Any],
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int = 0,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    num_beams: int = 1,
    stop: Sequence[int] = (),
    batch_size: int = 32,
    checkpoint: Folder | None = None,
    allow_unfired: bool = False,
    progress: bool = False,
) -> Iterator[Run]:
    """``run`` for lists that do not fit in memory: one ``Run`` a batch, as it is done.

    Prompts are taken a batch at a time. What has been yielded is the caller's: a bad prompt, an
    error or Ctrl-C later on loses nothing of it. That an edit never acted is known, and raised,
    when the prompts have come to their end.

    Args:
        model: as for ``run``, and so are all others.
        prompts: as for ``run``, or any iterable of strings, of chats or of id lists.

    Yields:
        A ``Run`` for each ``batch_size`` prompts, in order.

    Raises:
        PromptError, FiringError, SiteError, ModelError, CheckpointError, SaefeatError: as ``run``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> lines = (f"how do i bake {what}" for what in ("bread", "cake", "rolls"))
        >>> [len(out.prompts) for out in sf.running.run.stream(model, lines, batch_size=2)]
        [2, 1]
    """
    settings = decoding(
        model, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        seed=seed, num_beams=num_beams, stop=stop,
    )  # fmt: skip
    whole_number("batch_size", batch_size, 1)
    chosen = intervention if intervention is not None else Chain(())
    job = _job(model, chosen, settings, batch_size, allow_unfired, "stream")
    job = job._replace(checkpoint=_checkpoint(job, checkpoint))
    batches = _batches(getattr(model, "tokenizer", None), prompts, batch_size)
    return _stream(job, batches, progress)


def _stream(job: _Job, batches: Iterator[dict[str, Tensor]], progress: bool) -> Iterator[Run]:
    """A batch at a time; whether every edit acted is counted on the way."""
    total: Receipt | None = None
    rows = 0
    for found in _pieces(job, batches, progress):
        receipt = without_events(found).run.receipt
        total = receipt if total is None else total + receipt
        rows += len(found.run.prompts)
        yield found.run
    if total is not None and not job.allow_unfired:
        require_fired(total, job.where)
    require_rows(job.intervention, rows)


def _batches(tokenizer: Any, prompts: Any, size: int) -> Iterator[dict[str, Tensor]]:
    """Encoded batches, made when they are asked for."""
    single = isinstance(prompts, str | Mapping | Tensor)
    listed = isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], int | Mapping)
    if single or listed:  # one prompt, or tensors: nothing to be lazy about
        yield from split(encode_prompts(tokenizer, prompts), size)
        return
    if not isinstance(prompts, Iterable):
        encode_prompts(tokenizer, prompts)  # says what it is
    rest, count = iter(prompts), 0
    while chunk := list(islice(rest, size)):
        try:
            yield encode_prompts(tokenizer, [_single(prompt) for prompt in chunk])
        except PromptError as error:
            raise PromptError(f"prompts {count}..{count + len(chunk) - 1}: {error}") from error
        count += len(chunk)
    if not count:
        encode_prompts(tokenizer, [])


def _single(prompt: Any) -> Any:
    """One prompt of many: a number would be taken for a token of one prompt."""
    if not isinstance(prompt, int):
        return prompt
    raise PromptError(
        "stream: `prompts` is an iterable of numbers, wanted strings, chats or lists of token ids."
        " Likely cause: one prompt's ids without a list around them. Try: stream(model, [ids], ...)"
    )


class _Job(NamedTuple):
    """All that one call of ``run`` or ``stream`` does with each of its batches."""

    model: Any
    intervention: Intervention
    program: Program | None
    decoding: Decoding
    checkpoint: Checkpoint
    source: Provenance
    allow_unfired: bool
    where: str
    remote: dict[str, Any] | None = None


def _job(
    model: Any,
    intervention: Intervention,
    settings: Decoding,
    batch_size: int,
    allow_unfired: bool,
    where: str,
) -> _Job:
    require_beamable(intervention, settings)
    whole = lower(intervention, model)  # refuses what does not fit before anything runs
    generation = {**settings.to_dict(model), "batch_size": batch_size}
    return _Job(
        model,
        intervention,
        None if by_prompt(intervention) else whole,
        settings,
        Checkpoint(None, {}, where),
        provenance(model, intervention, generation),
        allow_unfired,
        where,
    )


def _checkpoint(job: _Job, folder: Folder | None) -> Checkpoint:
    """Finished batches of this very job; of a model elsewhere by its name, not by its weights."""
    if folder is None:
        return job.checkpoint
    if job.remote is None:
        who = model_identity(job.model)
    else:
        who = remote_identity(job.model, job.remote["remote"])
        who["sent as"] = str(job.remote["dtype"])
    who |= {"intervention": digest(job.intervention), **job.source.generation}
    return Checkpoint(folder, who, job.where)


def _pieces(job: _Job, batches: Iterable[dict[str, Tensor]], progress: bool) -> Iterator[Piece]:
    """Every batch's result, in order: from the checkpoint, or run and kept there."""
    bar = tqdm(batches, disable=not progress, desc=job.where, unit="batch")
    start = 0
    with job.checkpoint as done:
        for number, batch in enumerate(bar):
            prompts = digest(batch["input_ids"], batch["attention_mask"])
            kept = done.load(number)
            if kept is None:
                found = _one(job, batch, start)
                tensors, meta = pack(found)
                done.save(number, tensors, {**meta, "identity": prompts})
            else:
                _require_prompts(job, number, kept[1]["identity"], prompts)
                found = unpack(job.intervention, *kept, job.source)
            start += len(batch["input_ids"])
            yield found


def _one(job: _Job, batch: dict[str, Tensor], start: int) -> Piece:
    """Run the batch whose first prompt is number ``start``."""
    size, width = batch["input_ids"].shape
    program, beams = job.program, job.decoding.beams
    if program is None:  # values by prompt: its own rows of them, one for each beam
        _require_enough(job.intervention, start + size)
        number = torch.arange(start, start + size).repeat_interleave(beams)
        rows = slice(start, start + size) if beams == 1 else number
        program = lower(job.intervention, job.model, rows)
    log, tokens, logits = _executed(job, program, batch, start)
    if job.intervention.parts() and not job.allow_unfired:
        require_passes(log, max(1, tokens.shape[1] - width), job.where)
    new = until_stop(tokens[:, width:], job.decoding.stops)
    found = piece(job.intervention, job.model, batch, (log, new, logits), job.source)
    return found if beams == 1 else without_events(found)


def _executed(
    job: _Job, program: Program, batch: dict[str, Tensor], start: int
) -> tuple[Log, Tensor, Tensor]:
    """A batch's log, token ids and logits, from here or from a server."""
    if job.remote is None:
        return run_batch(job.model, program, batch, job.decoding.at(start))
    settings = job.decoding.at(start)
    saved, _ = remote_batch(job.model, program, batch, settings, **job.remote)
    return received(saved, job.intervention, batch, settings.new)


def _require_enough(intervention: Intervention, prompts: int) -> None:
    """A stream may go on longer than values that differ by prompt."""
    sizes = [step.change.prompts() for step in intervention.parts() if step.change is not None]
    if any(size is not None and size < prompts for size in sizes):
        require_rows(intervention, prompts)


def _require_prompts(job: _Job, number: int, kept: str, wanted: str) -> None:
    """Refuse a finished batch that was made of other prompts."""
    if kept == wanted:
        return
    raise CheckpointError(
        f"{job.where}: `checkpoint` is of another job: {job.checkpoint.folder} differs in prompts"
        f" (of batch {number}), wanted the prompts of the finished batches unchanged. Likely cause:"
        " the list was changed or put in another order since. Try: the same prompts again, or a"
        " folder of its own for this job"
    )
