"""One batch of a run as a result, and many of them joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernel.log import Log
from ..model.modules import torch_module
from ..results.events import Events
from ..results.provenance import Provenance, now, versions
from ..results.readings import Readings, stack_readings
from ..results.receipt import Fired, Receipt, join_receipts
from ..results.run import Run
from ..verbs.base import Intervention

if TYPE_CHECKING:
    from nnsight import TransformersModel


class Piece(NamedTuple):
    """One batch's result, and the columns its prompts had, padding included."""

    run: Run
    width: int


def piece(
    intervention: Intervention,
    model: TransformersModel,
    batch: dict[str, Tensor],
    outputs: tuple[Log, list[list[int]], Tensor],
    source: Provenance,
) -> Piece:
    """One batch as a result: its log, completions and logits, read by the intervention."""
    log, new, logits = outputs
    mask = batch["attention_mask"].bool()
    tokenizer = getattr(model, "tokenizer", None)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True) if tokenizer else ()
    result = Run(
        prompts=tuple(
            tuple(ids[kept].tolist()) for ids, kept in zip(batch["input_ids"], mask, strict=True)
        ),
        completions=tuple(tuple(row) for row in new),
        texts=tuple(texts),
        logits=logits,
        readings=intervention.readings(log),
        receipt=intervention.receipt(log),
        provenance=source,
    )
    return Piece(result, batch["input_ids"].shape[1])


def join(pieces: Sequence[Piece]) -> Run:
    """All batches as one result, prompts in order."""
    runs = [piece.run for piece in pieces]
    widths = [piece.width for piece in pieces]
    return Run(
        prompts=tuple(prompt for run in runs for prompt in run.prompts),
        completions=tuple(row for run in runs for row in run.completions),
        texts=tuple(text for run in runs for text in run.texts),
        logits=torch.cat([run.logits for run in runs]),
        readings=tuple(
            stack_readings(list(batches), widths)
            for batches in zip(*(run.readings for run in runs), strict=True)
        ),
        receipt=join_receipts([run.receipt for run in runs]),
        provenance=runs[0].provenance,
    )


def provenance(
    model: TransformersModel, intervention: Intervention, generation: dict[str, Any] | None = None
) -> Provenance:
    """What a result under this intervention on this model depends on."""
    module = torch_module(model)
    first = next(module.parameters())
    name = getattr(getattr(module, "config", None), "name_or_path", "") or "in memory"
    dictionaries: dict[str, list[str]] = {}
    for step in intervention.parts():
        conditions = () if step.condition is None else step.condition.latents.parts
        for basis, indices in (*step.latents.parts, *conditions):
            text = f"{basis.source} {basis.fingerprint(indices)}"
            names = dictionaries.setdefault(str(basis.site), [])
            if text not in names:
                names.append(text)
    return Provenance(
        model=f"{type(module).__name__} {name}",
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        dictionaries={site: "; ".join(names) for site, names in dictionaries.items()},
        intervention=repr(intervention),
        latents=tuple(step.latents.to_dict() for step in intervention.parts()),
        versions=versions(),
        created=now(),
        generation=generation or {},
    )


def without_events(piece: Piece) -> Piece:
    """Counts alone, where rows of the model are not the prompts' (beams)."""
    receipt = piece.run.receipt
    rows = tuple(replace(row, events=None) for row in receipt.rows)
    return Piece(replace(piece.run, receipt=Receipt(rows, receipt.passes)), piece.width)


# ---------------------------------------------------------------- to files and back


def pack(piece: Piece) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A piece as named tensors and plain data. Latents, sites and provenance are the job's own."""
    run = piece.run
    tensors = {"logits": run.logits}
    for number, reading in enumerate(run.readings):
        for name, value in vars(reading).items():
            if isinstance(value, Tensor):
                tensors[f"readings.{number}.{name}"] = value
    rows = []
    for number, row in enumerate(run.receipt.rows):
        events = row.events
        rows.append(
            [row.tokens, row.changed, row.largest, None if events is None else events.prompts]
        )
        for name, column in events.columns().items() if events is not None else ():
            tensors[f"events.{number}.{name}"] = column
    meta = {"width": piece.width, "passes": run.receipt.passes, "rows": rows}
    return tensors, meta | {n: getattr(run, n) for n in ("prompts", "completions", "texts")}


def unpack(
    intervention: Intervention,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    source: Provenance,
) -> Piece:
    """What ``pack`` made, as a piece of a run of the same intervention."""
    probes = [step for step in intervention.parts() if step.change is None]
    edits = [step for step in intervention.parts() if step.change is not None]
    readings = [
        Readings(step.latents, **_named(Readings, tensors, f"readings.{number}."))
        for number, step in enumerate(probes)
    ]
    rows = []
    for number, (step, row) in enumerate(zip(edits, meta["rows"], strict=True)):
        tokens, changed, largest, prompts = row
        events = None
        if prompts is not None:
            sites = tuple(basis.site for basis, _ in step.latents.parts)
            events = Events(sites, prompts, **_named(Events, tensors, f"events.{number}."))
        rows.append(Fired(repr(step), tokens, changed, largest, events))
    prompts, completions = (
        tuple(tuple(row) for row in meta[name]) for name in ("prompts", "completions")
    )
    texts, receipt = tuple(meta["texts"]), Receipt(tuple(rows), meta["passes"])
    logits = tensors["logits"]
    run = Run(prompts, completions, texts, logits, tuple(readings), receipt, source)
    return Piece(run, meta["width"])


def _named(kind: Any, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [field.name for field in fields(kind)]
    return {name: tensors[prefix + name] for name in names if prefix + name in tensors}
