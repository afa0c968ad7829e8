"""What a run does with each of its batches, wherever they are run, and what a batch gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import nnsight
import torch
from torch import Tensor, nn

from ..errors import FiringError, ModelError
from ..kernel.program import Program, whole_run
from ..kernel.state import Ends, Log
from ..model.alone import alone
from ..model.modules import torch_module
from ..model.route import Route
from ..model.wrappers import require_logits, root
from ..results.provenance import Provenance, provenance, together
from ..results.readings import Readings, stack_readings
from ..results.receipt import Events, Fired, Receipt, join_receipts, without_events
from ..results.run import Run
from ..verbs.base import Intervention, by_prompt, require_fired, require_rows
from ..verbs.lower import lower
from .decoding import Decoding, require_beamable, seeded, until_stop

if TYPE_CHECKING:
    from nnsight import TransformersModel


class Piece(NamedTuple):
    """One batch's result, and the columns its prompts had, padding included."""

    run: Run
    width: int


class Task:
    """An intervention, a way of decoding, and what is asked of the results.

    What does not fit the model, or has no meaning under beams, is refused when it is made.

    Args:
        function: the public function that was called, for error messages.
        way: the model's places, where they are known already.
    """

    def __init__(
        self, function: str, model: TransformersModel, intervention: Intervention,
        decoding: Decoding, batch_size: int, allow_unfired: bool, way: Route | None = None,
    ) -> None:  # fmt: skip
        require_beamable(function, intervention, decoding.beams)
        require_logits(function, torch_module(model))
        self.function, self.model, self.intervention = function, model, intervention
        self.decoding, self.batch_size, self.allow_unfired = decoding, batch_size, allow_unfired
        self._way = way
        program = lower(intervention, model, way=way)
        self._every_row = None if by_prompt(intervention) else program

    @cached_property
    def provenance(self) -> Provenance:
        """What the results depend on."""
        steps, parts = self.intervention.parts(), []
        for step in steps:
            conditions = () if step.condition is None else step.condition.latents.parts
            parts += [*step.latents.parts, *conditions]
        return provenance(
            self.model,
            parts,
            intervention=repr(self.intervention),
            latents=tuple(step.latents.to_dict() for step in steps),
            generation={**self.decoding.to_dict(self.model), "batch_size": self.batch_size},
        )

    def program(self, start: int, size: int) -> Program:
        """The program for the prompts start..start+size: its own rows of values by prompt."""
        if self._every_row is not None:
            return self._every_row
        rows, beams = slice(start, start + size), self.decoding.beams
        changes = [step.change for step in self.intervention.parts()]
        sizes = [change.prompts() for change in changes if change is not None]
        # a stream may go on longer than values that differ by prompt
        if any(known is not None and known < rows.stop for known in sizes):
            require_rows(self.intervention, rows.stop)
        if beams == 1:
            return lower(self.intervention, self.model, rows, self._way)
        number = torch.arange(start, rows.stop).repeat_interleave(beams)
        return lower(self.intervention, self.model, number, self._way)

    def piece(self, batch: dict[str, Tensor], log: Log, tokens: Tensor, logits: Tensor) -> Piece:
        """A batch's result, from its log, all its token ids and the logits after its prompts."""
        new = tokens[:, batch["input_ids"].shape[1] :]
        if self.intervention.parts() and not self.allow_unfired:
            require_passes(log, max(1, new.shape[1]), self.function)
        return self.result(batch, log, until_stop(new, self.decoding.stops), logits)

    def result(
        self, batch: dict[str, Tensor], log: Log, new: list[list[int]], logits: Tensor
    ) -> Piece:
        """The same from completions that end at their stop tokens."""
        require_numbers(self.function, torch_module(self.model), logits)
        tokenizer = getattr(self.model, "tokenizer", None)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True) if tokenizer else ()
        receipt, mask = self.intervention.receipt(log), batch["attention_mask"].bool()
        rows = zip(batch["input_ids"], mask, strict=True)
        run = Run(
            prompts=tuple(tuple(ids[real].tolist()) for ids, real in rows),
            completions=tuple(tuple(row) for row in new),
            texts=tuple(texts),
            logits=logits,
            readings=self.intervention.readings(log),
            # under beams the model's rows are not the prompts', so events would mislead
            receipt=receipt if self.decoding.beams == 1 else without_events(receipt),
            provenance=self.provenance,
        )
        return Piece(run, batch["input_ids"].shape[1])

    def join(self, pieces: Sequence[Piece]) -> Run:
        """All batches as one result, prompts in order."""
        runs, widths = [piece.run for piece in pieces], [piece.width for piece in pieces]
        readings = zip(*(run.readings for run in runs), strict=True)
        receipt = join_receipts([run.receipt for run in runs])
        if not self.allow_unfired:
            require_fired(receipt, self.function)
        return Run(
            prompts=tuple(prompt for run in runs for prompt in run.prompts),
            completions=tuple(row for run in runs for row in run.completions),
            texts=tuple(text for run in runs for text in run.texts),
            logits=torch.cat([run.logits for run in runs]),
            readings=tuple(stack_readings(list(batches), widths) for batches in readings),
            receipt=receipt,
            provenance=together([run.provenance for run in runs]),
        )


def no_numbers(logits: Tensor) -> Tensor:
    """[...] bool, for logits [..., v]: whether they hold NaN or +inf, or nothing but −inf.

    A model may give −inf to words it never says; the others come from nothing that is meant.
    """
    return ~logits.detach().amax(-1).isfinite()


def require_numbers(function: str, module: nn.Module, logits: Tensor) -> None:
    """Refuse logits that are no numbers: the token they give is the first of the vocabulary."""
    bad = no_numbers(logits)
    if bool(bad.any()):
        row, dtype = int(bad.nonzero()[0]), next(module.parameters()).dtype
        raise ModelError(
            f"{function}: `model`, in {dtype}, gives logits that are not finite for prompt {row} of"
            " its batch, wanted finite logits. Likely cause: a model trained in bfloat16 and run in"
            " float16, an edit whose values its dtype cannot hold, or weights with a NaN. Try: the"
            " same without the intervention, which tells the two apart; dtype=torch.bfloat16 or"
            " float32"
        )


def require_passes(log: Log, wanted: int, where: str) -> None:
    """Refuse a generation of which an edit or a reading saw only some forward passes."""
    if log.passes >= wanted:
        return
    raise FiringError(
        f"{where}: `intervention` is applied to {log.passes} of the {wanted} forward passes"
        " decoded, wanted every forward pass. Likely cause: a generate of the model's own, whose"
        " later passes do not call the whole model, so that they were not edited. Try: the model's"
        " standard generate; allow_unfired=True if one pass decodes several tokens"
    )


# ---------------------------------------------------------------- a batch in the model here


def run_batch(
    model: TransformersModel, program: Program, batch: dict[str, Tensor], settings: Decoding
) -> tuple[Log, Tensor, Tensor]:
    """One batch: the log, all token ids, and the logits after the prompt."""
    program, module = honoring(program, settings), torch_module(model)
    # The logits are read in an invoke of their own: nothing of a block runs after its loop over
    # forward passes has parked.
    if settings.new == 0:
        with alone(module), torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(batch):
                log = nnsight.save(Log())
                whole_run(root(model), program, log)
            with tracer.invoke():
                logits = nnsight.save(root(model).output.logits[:, -1].float().clone())
        return log, batch["input_ids"], logits
    arguments = settings.arguments()
    with alone(module), seeded(settings.seed, module), model.generate(**arguments) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save(Log())
            whole_run(root(model), program, log)
        with tracer.invoke():
            logits = nnsight.save(root(model).output.logits[:, -1].float().clone())
            tokens = nnsight.save(tracer.result)
    return log, tokens, logits[:: settings.beams]


def honoring(program: Program, settings: Decoding) -> Program:
    """The program for a generation that is known to stop at the settings' stop tokens."""
    pad = -1 if program.ends is None else program.ends.pad
    return program.replace(ends=Ends(stops=settings.stops, pad=pad, honored=True, otherwise=False))


# ---------------------------------------------------------------- to files and back


def pack(piece: Piece) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A piece as named tensors and plain data. Latents, sites and provenance are the job's own."""
    run, rows = piece.run, []
    tensors = {"logits": run.logits}
    for n, reading in enumerate(run.readings):
        values = {name: value for name, value in vars(reading).items() if name != "latents"}
        tensors |= {f"readings.{n}.{k}": v for k, v in values.items() if v is not None}
    for n, row in enumerate(run.receipt.rows):
        prompts = None if row.events is None else row.events.prompts
        columns = {} if row.events is None else row.events.columns()
        rows.append([*row.counts()[1:], prompts])
        tensors |= {f"events.{n}.{name}": column for name, column in columns.items()}
    where = {name: getattr(run.provenance, name) for name in ("dtype", "device", "server")}
    meta = {"width": piece.width, "passes": run.receipt.passes, "rows": rows, "where": where}
    return tensors, meta | {n: getattr(run, n) for n in ("prompts", "completions", "texts")}


def unpack(task: Task, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Piece:
    """What ``pack`` made, as a piece of a run of the same task."""

    def named(kind: Any, prefix: str) -> dict[str, Tensor]:
        names = [field.name for field in fields(kind) if prefix + field.name in tensors]
        return {name: tensors[prefix + name] for name in names}

    steps = task.intervention.parts()
    probes = [step for step in steps if step.change is None]
    edits = [step for step in steps if step.change is not None]
    readings = [
        Readings(step.latents, **named(Readings, f"readings.{n}.")) for n, step in enumerate(probes)
    ]
    rows = []
    for n, (step, row) in enumerate(zip(edits, meta["rows"], strict=True)):
        *counts, prompts = row
        events, sites = None, tuple(basis.site for basis, _ in step.latents.parts)
        if prompts is not None:
            events = Events(sites, prompts, **named(Events, f"events.{n}."))
        rows.append(Fired.counted([repr(step), *counts], events))
    prompts, completions = (tuple(map(tuple, meta[key])) for key in ("prompts", "completions"))
    receipt = Receipt(tuple(rows), meta["passes"])
    origin = replace(task.provenance, **meta.get("where", {}))
    outputs = tuple(meta["texts"]), tensors["logits"], tuple(readings), receipt, origin
    return Piece(Run(prompts, completions, *outputs), meta["width"])
