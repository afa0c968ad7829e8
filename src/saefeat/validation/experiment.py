"""Experiment: one model, its prompts and a metric, measured under many edits.

All of validation asks it for the metric's values. Any metric of ``Attribute`` will do: the same
evaluator reads it, off passes with the continuations, columns of logits and sites that it asks for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..attribution.attribute import Attribute
from ..attribution.job import prepare
from ..attribution.path import baseline_logits
from ..attribution.scores import Attribution
from ..checks import whole
from ..dictionaries.latents import Latents
from ..errors import PromptError, SaefeatError
from ..files.checkpoint import Checkpoint
from ..files.hashing import digest
from ..metrics.base import Metric
from ..metrics.evaluator import (
    NOTHING,
    Batch,
    Data,
    Evaluator,
    References,
    metric_data,
    require_finite,
)
from ..results.identity import model_identity
from ..results.readings import Readings
from ..results.receipt import Fired, Receipt, join_receipts
from ..text.prompts import Prompts
from ..text.tokens import Tokens
from ..values.per_prompt import per_prompt
from ..verbs.base import Intervention, require_fired, require_rows
from ..verbs.edits import Clamp
from .memory import rows_that_fit

if TYPE_CHECKING:
    from nnsight import TransformersModel

Folder = str | os.PathLike[str] | None


@dataclass(frozen=True, eq=False)
class Experiment:
    """Encoded prompts and a metric.

    Attributes:
        evaluator: makes passes of the model, and reads the metric off them.
        data: the prompts, with what continues them.
        references: what the metric compares with, of all prompts, on the CPU.
        function: the public function's name, for errors.
        batch_size: the most rows a forward pass.
        done: measurements that an earlier call has finished, numbered in the order of asking.
    """

    evaluator: Evaluator
    data: Data
    references: References
    function: str
    batch_size: int
    done: Checkpoint
    numbers: Iterator[int] = field(default_factory=count)

    @classmethod
    def of_metric(
        cls,
        model: TransformersModel,
        prompts: Prompts,
        metric: Metric,
        *,
        function: str,
        batch_size: int,
        baseline: Intervention | None = None,
        checkpoint: Folder = None,
        **asked: Any,
    ) -> Experiment:
        """An experiment on a metric of its own.

        ``baseline`` is the run that ``BASELINE_TOP`` and ``kl("baseline")`` refer to; ``asked`` is
        what else a result depends on, for the checkpoint.

        Raises:
            PromptError: for a metric made for another number of prompts.
            SaefeatError: for a metric that refers to a baseline, without one.
        """
        whole(function, "batch_size", batch_size)
        edit = baseline or NOTHING
        data = metric_data(function, model, prompts, metric)
        _require_baseline(function, metric, baseline)
        require_rows(edit, data.prompts)
        evaluator = Evaluator(model, metric)
        asked |= {"baseline": baseline}
        done = _opened(checkpoint, evaluator, data, function, batch_size, **asked)
        logits = (evaluator.run(batch, edit).last.cpu() for batch in data.batches(batch_size))
        references = _references(evaluator, data, logits, batch_size)
        return cls(evaluator, data, references, function, batch_size, done)

    @classmethod
    def of_attribute(
        cls,
        attribute: Attribute,
        model: TransformersModel,
        prompts: Prompts,
        *,
        function: str,
        batch_size: int,
        checkpoint: Folder = None,
        **asked: Any,
    ) -> Experiment:
        """An experiment in which an attribution's metric is what it was there."""
        whole(function, "batch_size", batch_size)
        job = attribute.job
        data = prepare(job, model, prompts).data
        evaluator = Evaluator(model, job.metric)
        asked |= {"baseline": job.baseline, "tokens": job.where, "target": job.target}
        done = _opened(checkpoint, evaluator, data, function, batch_size, **asked)
        logits = baseline_logits(job, model, prompts, batch_size)
        references = _references(evaluator, data, logits, batch_size)
        return cls(evaluator, data, references, function, batch_size, done)

    def __len__(self) -> int:
        return self.data.prompts

    def under(self, intervention: Intervention | None = None, prompts: Any = None) -> Tensor:
        """[n] float32: the metric of these prompts (default: each once) under an intervention.

        Values of the intervention that differ by prompt are one a row, n of them.

        Raises:
            FiringError: if an edit selects no token in any of them.
        """
        rows = torch.arange(len(self)) if prompts is None else prompts
        edit = intervention or NOTHING
        starts = range(0, len(rows), self.batch_size)
        values, receipts = zip(*(self._piece(edit, rows, start) for start in starts), strict=True)
        require_fired(join_receipts(receipts), self.function)
        return torch.cat(values)

    def _piece(self, edit: Intervention, rows: Tensor, start: int) -> tuple[Tensor, Receipt]:
        """At most ``batch_size`` rows from ``start`` on: finished before, or measured and kept."""
        number = next(self.numbers)
        finished = self.done.load(number)
        if finished is not None:
            tensors, meta = finished
            fired = tuple(Fired(*row) for row in meta["rows"])
            return tensors["metric"], Receipt(fired, meta["passes"])
        values, receipts = [], []
        for batch, prompt in self._batches(edit, rows, start):
            run = self.evaluator.run(batch, edit)
            with torch.no_grad():
                value = self.evaluator.read(run, prompt, self.references.at(prompt))
            values.append(require_finite(self.function, value, prompt, "measured"))
            receipts.append(run.receipt)
        metric, receipt = torch.cat(values), join_receipts(receipts)
        fired = [[row.edit, row.tokens, row.changed, row.largest] for row in receipt.rows]
        self.done.save(number, {"metric": metric}, {"passes": receipt.passes, "rows": fired})
        return metric, receipt

    def readings(self, probe: Intervention) -> list[Readings]:
        """What a probe reads in the bare model, some prompts at a time."""
        every, readings = torch.arange(len(self)), []
        starts = range(0, len(self), self.batch_size)
        for batch, _ in (pair for start in starts for pair in self._batches(probe, every, start)):
            with torch.no_grad():
                program = self.evaluator.program(batch, probe)
                log, _ = self.evaluator.forward(batch, program)
            readings += probe.readings(log)
        return readings

    def without(
        self, sets: Sequence[Latents], where: Tokens | None, *, progress: bool = False
    ) -> Tensor:
        """[sets, prompts]: the metric with each set ablated; every pair is a row of a batch."""
        some = max(1, self.batch_size // len(self))
        starts = range(0, len(sets), some)
        bar = tqdm(starts, disable=not progress, desc=self.function, unit="batch")
        return torch.cat([self._without(sets[start : start + some], where) for start in bar])

    def _without(self, sets: Sequence[Latents], where: Tokens | None) -> Tensor:
        union, member = per_prompt(sets)
        prompts = torch.arange(len(self)).repeat(len(sets))
        scale = (~member).float().repeat_interleave(len(self), 0)  # [sets · prompts, k]
        edit = Clamp(union, scale=scale, where=where) if len(union) else None
        return self.under(edit, prompts).reshape(len(sets), len(self))

    def require_same(self, clean: Tensor, scores: Attribution) -> None:
        """Refuse scores of other prompts, another metric or another model.

        ``clean`` [prompts] is the metric in the bare model.

        Raises:
            PromptError: naming what differs.
        """
        remembered = scores.clean
        same = clean.shape == remembered.shape and self._same_texts(scores)
        # bfloat16 models move by a percent when rows are batched otherwise
        floats = (p for p in self.evaluator.module.parameters() if p.is_floating_point())
        first = next(floats, clean)
        share = 2e-3 if torch.finfo(first.dtype).bits > 16 else 2e-2
        slack = share * (1 + float(remembered.abs().max())) if same else 0.0
        if same and bool(((clean - remembered).abs() <= slack).all()):
            return
        raise PromptError(
            f"{self.function}: `scores` is of {len(remembered)} prompts with a mean metric of"
            f" {remembered.mean():.3f}, wanted scores of these {len(clean)} prompts, whose metric"
            f" is {clean.mean():.3f}. Likely cause: other prompts, another order, another metric or"
            " another model. Try: scores = attribute(model, prompts), and the same three here"
        )

    def _same_texts(self, scores: Attribution) -> bool:
        """Whether scores are of these very tokens; true where they do not know theirs."""
        inputs = self.data.inputs
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        ids = tuple(tuple(row[real].tolist()) for row, real in rows)
        return scores.texts is None or scores.texts.ids == ids

    def _batches(
        self, edit: Intervention, rows: Tensor, start: int
    ) -> Iterator[tuple[Batch, Tensor]]:
        """``batch_size`` rows from ``start`` on, fewer at a time where memory asks for it.

        With each batch its prompts. In a batch rows are numbered, not prompts: an intervention's
        values are one a row.
        """
        some = rows[start : start + self.batch_size]
        data = self.data.take(some)
        (widest,) = data.batches(len(some))
        for batch in data.batches(rows_that_fit(self.evaluator, widest, edit, len(some))):
            yield batch._replace(numbers=batch.numbers + start), some[batch.numbers]


def _references(
    evaluator: Evaluator, data: Data, baseline: Iterable[Tensor], size: int
) -> References:
    """What the metric compares with, run only if it does; ``baseline`` yields logits as it runs."""
    metric = evaluator.metric
    if metric.baseline_top:
        return References(top=torch.cat([logits.argmax(-1) for logits in baseline]))
    if metric.reference == "baseline":
        return References(base=torch.cat(list(baseline)))
    if metric.reference == "clean":
        clean = [evaluator.run(batch).last.cpu() for batch in data.batches(size)]
        return References(clean=torch.cat(clean))
    return References()


def _opened(
    folder: Folder, evaluator: Evaluator, data: Data, function: str, batch_size: int, **asked: Any
) -> Checkpoint:
    """The job's checkpoint, refused now if it is another's."""
    who: dict[str, Any] = {}
    if folder is not None:
        who = {
            **model_identity(evaluator.model),
            "job": function,
            "metric": digest(evaluator.metric),
        }
        who |= {"prompts": digest(*data), "batch_size": batch_size}
        who |= {name: digest(value) for name, value in asked.items()}
    with Checkpoint(folder, who, function) as done:  # it holds nothing open
        return done


def _require_baseline(function: str, metric: Metric, baseline: Intervention | None) -> None:
    """Refuse a metric that refers to a run nobody named."""
    if baseline is not None or not metric.needs_baseline:
        return
    name = "BASELINE_TOP" if metric.baseline_top else 'kl("baseline")'
    raise SaefeatError(
        f"{function}: `metric` is {metric!r}, wanted the baseline run it refers to, or a metric"
        f" that needs none. Likely cause: {name} is what a baseline run says, and there is none"
        f" here. Try: {function}(..., baseline=Ablate(latents))"
    )
