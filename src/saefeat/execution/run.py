"""run: prompts in; text, tokens, readings and a receipt out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import PromptError, explain
from ..kernel.program import new_log
from ..kernel.trace import whole_run
from ..prompts import Prompts, encode_prompts, split
from ..records import Provenance, Readings, Receipt, now, stack_readings, versions
from ..sites import torch_module
from ..verbs.base import Chain, Intervention, by_prompt, require_fired, require_rows
from ..verbs.lower import lower
from .preflight import PAYLOAD_LIMIT, preflight, require_light
from .remote import remote_batch, with_stops


@dataclass(frozen=True)
class Run:
    """What one ``run`` gave.

    Attributes:
        prompts: token ids of each prompt, without padding.
        completions: generated ids of each prompt, up to and with the stop token.
        texts: completions as text, without special tokens.
        logits: [prompts, vocabulary] float32, for the token after each prompt.
        readings: one ``Readings`` a ``Probe``, in order.
        receipt: how often each edit acted.
        provenance: where the result comes from.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> out = sf.run(model, ["how do i bake bread"], max_new_tokens=3)
        >>> len(out.texts), out.receipt.rows
        (1, ())
    """

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    logits: Tensor
    readings: tuple[Readings, ...]
    receipt: Receipt
    provenance: Provenance


def run(
    model: Any,
    prompts: Prompts,
    intervention: Intervention | None = None,
    *,
    max_new_tokens: int = 0,
    batch_size: int = 32,
    allow_unfired: bool = False,
    progress: bool = False,
    remote: bool | str = False,
    dtype: torch.dtype | None = None,
    payload_limit: int = PAYLOAD_LIMIT,
) -> Run:
    """Run prompts under an intervention, greedily, in batches.

    Args:
        model: an nnsight ``TransformersModel``.
        prompts: strings, chats (lists of role and content) or token ids; see ``encode_prompts``.
        intervention: what to apply at every token; None runs the bare model.
        max_new_tokens: how many tokens to generate; 0 makes one forward pass.
        batch_size: prompts a batch.
        allow_unfired: accept edits that selected no token at all.
        progress: show a progress bar.
        remote: True runs on NDIF, a URL on another server, ``"local"`` here by way of a request.
            Each batch is one job, waited for; ``submit`` does not wait. The model here needs no
            weights then, and readings hold zeros where no token was selected.
        dtype: of the matrices that are sent; None sends each in the narrowest dtype that holds it
            exactly. Only with ``remote``.
        payload_limit: the most bytes a batch's request may have. Only with ``remote``.

    Returns:
        A ``Run``.

    Raises:
        PromptError: for empty or mixed prompts.
        FiringError: if an edit selected no token in the whole run.
        SiteError, ModelError: if the intervention does not fit the model.
        RemoteError: for a request that is too large or bound to fail.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> edits = sf.Ablate(saes.latents({1: [3, 4]})) | sf.Probe(saes.latents({2: [0]}))
        >>> out = sf.run(model, ["how do i bake bread", "hello"], edits, max_new_tokens=4)
        >>> out.receipt.rows[0].tokens > 0, out.readings[0].values.shape[0]
        (True, 2)
    """
    require_counts(batch_size=(batch_size, 1), max_new_tokens=(max_new_tokens, 0))
    chosen = intervention if intervention is not None else Chain(())
    encoded = encode_prompts(getattr(model, "tokenizer", None), prompts)
    require_rows(chosen, len(encoded["input_ids"]))
    if remote:
        with_stops(model)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        require_light(preflight(model, encoded, chosen, dtype=dtype, **options), payload_limit)
    whole = lower(chosen, model)
    batches, found, start = split(encoded, batch_size), [], 0
    for batch in tqdm(batches, disable=not progress, desc="run", unit="batch"):
        rows = slice(start, start + len(batch["input_ids"]))
        start = rows.stop
        program = lower(chosen, model, rows) if by_prompt(chosen) else whole
        if remote:
            how: dict[str, Any] = {"dtype": dtype, "remote": remote}
            found.append(remote_batch(model, program, batch, max_new_tokens, **how)[0])
        else:
            found.append(_batch(model, program, batch, max_new_tokens))
    result = finish(chosen, model, batches, found)
    if not allow_unfired:
        require_fired(result.receipt, "run")
    return result


def _batch(
    model: Any, program: dict[str, Any], batch: dict[str, Tensor], new: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """One batch: the log, all token ids, and the logits after the prompt.

    The logits are read in an invoke of their own, since nothing of a block runs after its loop
    over forward passes has parked.
    """
    program = {**program, "ends": {**program["ends"], "honored": True}}
    if new == 0:
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(batch):
                log = nnsight.save(new_log())
                whole_run(model, program, log)
            with tracer.invoke():
                logits = nnsight.save(model.output.logits[:, -1].float().clone())
        return log, batch["input_ids"], logits
    with model.generate(max_new_tokens=new, do_sample=False) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save(new_log())
            whole_run(model, program, log)
        with tracer.invoke():
            logits = nnsight.save(model.output.logits[:, -1].float().clone())
            tokens = nnsight.save(tracer.result)
    return log, tokens, logits


def require_counts(**given: tuple[Any, int]) -> None:
    """Whole numbers from a least value on."""
    for name, (number, least) in given.items():
        if type(number) is not int or number < least:
            raise PromptError(
                explain(
                    "run",
                    name,
                    got=repr(number),
                    wanted=f"an integer from {least}",
                    cause="a typing error",
                    call=f"run(model, prompts, {name}={max(least, 8)})",
                )
            )


def _until_stop(tokens: Tensor, model: Any) -> list[list[int]]:
    """Each row up to and with its first stop token; what follows is padding."""
    config = getattr(torch_module(model), "generation_config", None)
    stop = getattr(config, "eos_token_id", None)
    stops = set(stop if isinstance(stop, (list, tuple)) else [] if stop is None else [stop])
    rows = []
    for row in tokens.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        rows.append(row[:end])
    return rows


def finish(
    intervention: Intervention,
    model: Any,
    batches: Sequence[dict[str, Tensor]],
    found: Sequence[tuple[dict[str, Any], Tensor, Tensor]],
) -> Run:
    """All batches as one result, from each one's log, token ids and logits."""
    pieces = []
    for batch, (log, tokens, logits) in zip(batches, found, strict=True):
        new = _until_stop(tokens[:, batch["input_ids"].shape[1] :], model)
        pieces.append((batch, log, new, logits))
    return _gather(intervention, model, pieces)


def _gather(intervention: Intervention, model: Any, pieces: Sequence[tuple]) -> Run:
    """All batches as one result."""
    prompts, completions = [], []
    for batch, _, new, _ in pieces:
        mask = batch["attention_mask"].bool()
        prompts += [
            tuple(ids[kept].tolist()) for ids, kept in zip(batch["input_ids"], mask, strict=True)
        ]
        completions += [tuple(row) for row in new]
    tokenizer = getattr(model, "tokenizer", None)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True) if tokenizer else ()
    per_batch = [intervention.readings(log) for _, log, _, _ in pieces]
    widths = [batch["input_ids"].shape[1] for batch, *_ in pieces]
    receipts = [intervention.receipt(log) for _, log, _, _ in pieces]
    return Run(
        prompts=tuple(prompts),
        completions=tuple(completions),
        texts=tuple(texts),
        logits=torch.cat([logits for *_, logits in pieces]),
        readings=tuple(
            stack_readings(list(batches), widths) for batches in zip(*per_batch, strict=True)
        ),
        receipt=sum(receipts[1:], receipts[0]),
        provenance=provenance(model, intervention),
    )


def provenance(model: Any, intervention: Intervention) -> Provenance:
    """What a result under this intervention on this model depends on."""
    module = torch_module(model)
    first = next(module.parameters())
    name = getattr(getattr(module, "config", None), "name_or_path", "") or "in memory"
    found: dict[str, list[str]] = {}
    for step in intervention.parts():
        conditions = () if step.condition is None else step.condition.latents.parts
        for basis, _ in (*step.latents.parts, *conditions):
            text = f"{basis.origin or basis.name} {basis.fingerprint()}"  # type: ignore[attr-defined]
            names = found.setdefault(str(basis.site), [])
            if text not in names:
                names.append(text)
    return Provenance(
        model=f"{type(module).__name__} {name}",
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        dictionaries={site: "; ".join(names) for site, names in found.items()},
        intervention=repr(intervention),
        latents=tuple(step.latents.to_dict() for step in intervention.parts()),
        versions=versions(),
        created=now(),
    )
