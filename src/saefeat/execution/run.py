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

    Returns:
        A ``Run``.

    Raises:
        PromptError: for empty or mixed prompts.
        FiringError: if an edit selected no token in the whole run.
        SiteError, ModelError: if the intervention does not fit the model.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> edits = sf.Ablate(saes.latents({1: [3, 4]})) | sf.Probe(saes.latents({2: [0]}))
        >>> out = sf.run(model, ["how do i bake bread", "hello"], edits, max_new_tokens=4)
        >>> out.receipt.rows[0].tokens > 0, out.readings[0].values.shape[0]
        (True, 2)
    """
    _require_counts(batch_size=(batch_size, 1), max_new_tokens=(max_new_tokens, 0))
    chosen = intervention if intervention is not None else Chain(())
    encoded = encode_prompts(getattr(model, "tokenizer", None), prompts)
    require_rows(chosen, len(encoded["input_ids"]))
    whole = lower(chosen, model)
    pieces, start = [], 0
    for batch in tqdm(split(encoded, batch_size), disable=not progress, desc="run", unit="batch"):
        rows = slice(start, start + len(batch["input_ids"]))
        start = rows.stop
        program = lower(chosen, model, rows) if by_prompt(chosen) else whole
        log, tokens, logits = _batch(model, program, batch, max_new_tokens)
        new = _until_stop(tokens[:, batch["input_ids"].shape[1] :], model)
        pieces.append((batch, log, new, logits))
    result = _gather(chosen, model, pieces)
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


def _require_counts(**given: tuple[Any, int]) -> None:
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
