"""One model, its prompts and a metric, measured under many edits: what all of validation asks.

Any metric of ``Attribute`` will do: a pass is read by the attribution's own ``Watch``, with the
continuations, columns of logits and sites that the metric asks for, and no others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..attribution.attribute import Attribute
from ..attribution.batch import baseline_logits
from ..attribution.passes import NOTHING, Batch, Pass, Watch
from ..attribution.prepare import Data, continued, prepare
from ..attribution.scores import Attribution
from ..checks import one_a_prompt, whole
from ..dictionaries.latents import Latents
from ..errors import PromptError, SaefeatError
from ..files.checkpoint import Checkpoint
from ..files.identity import digest, model_identity
from ..metrics.base import Metric, Seen
from ..results.readings import Readings
from ..results.receipt import Fired, Receipt, join_receipts
from ..text.prompts import Prompts, encode_prompts
from ..text.tokens import Tokens
from ..values.per_prompt import per_prompt
from ..verbs.base import Intervention, require_fired, require_rows
from ..verbs.edits import Clamp
from ..verbs.lower import lower
from .memory import rows_that_fit

Folder = str | os.PathLike[str] | None


class References(NamedTuple):
    """What a metric compares with, for each prompt; None where it does not.

    ``top`` [prompts] long stands for ``BASELINE_TOP``; ``clean`` and ``base`` are last logits
    [prompts, vocabulary] of those runs, on the CPU, in the model's own precision.
    """

    top: Tensor | None = None
    clean: Tensor | None = None
    base: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Experiment:
    """Encoded prompts and a metric.

    Attributes:
        watch: what the metric reads of a pass.
        data: the prompts, with what continues them.
        references: what the metric compares with.
        function: the public function's name, for errors.
        batch_size: the most rows a forward pass.
        done: measurements that an earlier call has finished, numbered in the order of asking.
    """

    watch: Watch
    data: Data
    references: References
    function: str
    batch_size: int
    done: Checkpoint
    numbers: Iterator[int] = field(default_factory=count)

    @classmethod
    def of_metric(
        cls,
        model: Any,
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
        tokenizer = getattr(model, "tokenizer", None)
        data = Data(encode_prompts(tokenizer, prompts), None)
        total = len(data.inputs["input_ids"])
        one_a_prompt(function, "metric", metric.prompts, total)
        _require_baseline(function, metric, baseline)
        require_rows(baseline or NOTHING, total)
        if metric.continuation is not None:
            data = Data(*continued(tokenizer, data.inputs, metric.continuation(tokenizer)))
        watch = Watch(Latents(()), model, metric)
        done = _opened(checkpoint, watch, data, function, batch_size, baseline=baseline, **asked)
        logits = (watch.run(b, baseline or NOTHING).last.cpu() for b, _ in data.batches(batch_size))
        references = _references(watch, data, logits, batch_size)
        return cls(watch, data, references, function, batch_size, done)

    @classmethod
    def of_attribute(
        cls,
        attribute: Attribute,
        model: Any,
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
        data = prepare(job, model, prompts)
        watch = Watch(Latents(()), model, job.metric)
        asked |= {"baseline": job.baseline, "tokens": job.where, "target": job.target}
        done = _opened(checkpoint, watch, data, function, batch_size, **asked)
        logits = baseline_logits(job, model, prompts, batch_size)
        references = _references(watch, data, logits, batch_size)
        return cls(watch, data, references, function, batch_size, done)

    def __len__(self) -> int:
        return len(self.data.inputs["input_ids"])

    def under(self, intervention: Intervention | None = None, prompts: Any = None) -> Tensor:
        """[n] float32: the metric of these prompts (default: each once) under an intervention.

        Values of the intervention that differ by prompt are one a row, n of them.

        Raises:
            FiringError: if an edit selects no token in any of them.
        """
        rows = torch.arange(len(self)) if prompts is None else prompts
        chosen = intervention or NOTHING
        starts = range(0, len(rows), self.batch_size)
        found, receipts = zip(*(self._piece(chosen, rows, start) for start in starts), strict=True)
        require_fired(join_receipts(receipts), self.function)
        return torch.cat(found)

    def _piece(self, chosen: Intervention, rows: Tensor, start: int) -> tuple[Tensor, Receipt]:
        """At most ``batch_size`` rows from ``start`` on: finished before, or measured and kept."""
        number = next(self.numbers)
        held = self.done.load(number)
        if held is not None:
            tensors, meta = held
            fired = tuple(Fired(*row) for row in meta["rows"])
            return tensors["metric"], Receipt(fired, meta["passes"])
        found, receipts = [], []
        with torch.no_grad():
            for batch, part in self._batches(chosen, rows, start):
                here = self.watch.run(batch, chosen)
                found.append(self._read(here, part))
                receipts.append(here.receipt)
        metric, receipt = torch.cat(found), join_receipts(receipts)
        fired = [[row.edit, row.tokens, row.changed, row.largest] for row in receipt.rows]
        self.done.save(number, {"metric": metric}, {"passes": receipt.passes, "rows": fired})
        return metric, receipt

    def readings(self, probe: Intervention) -> list[Readings]:
        """What a probe reads in the bare model, some prompts at a time."""
        every, found = torch.arange(len(self)), []
        starts = range(0, len(self), self.batch_size)
        with torch.no_grad():
            for batch, _ in (pair for s in starts for pair in self._batches(probe, every, s)):
                program = lower(probe, self.watch.model, batch.rows(), self.watch.way(probe))
                log, _ = self.watch.trace(batch, program)
                found += probe.readings(log)
        return found

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
        floats = (p for p in self.watch.module.parameters() if p.is_floating_point())
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
        self, chosen: Intervention, rows: Tensor, start: int
    ) -> Iterator[tuple[Batch, Tensor]]:
        """``batch_size`` rows from ``start`` on, fewer at a time if there is no room for them.

        With each batch its prompts. In a batch rows are numbered, not prompts: an intervention's
        values are one a row.
        """
        some = rows[start : start + self.batch_size]
        lengths = None if self.data.lengths is None else self.data.lengths[some]
        data = Data({name: held[some] for name, held in self.data.inputs.items()}, lengths)
        ((whole, _),) = data.batches(len(some))
        for batch, _ in data.batches(rows_that_fit(self.watch, whole, chosen, len(some))):
            yield batch._replace(numbers=batch.numbers + start), some[batch.numbers]

    def _read(self, here: Pass, prompts: Tensor) -> Tensor:
        """[b] float32: the metric of a pass whose rows are these prompts."""
        top, clean, base = (None if r is None else r[prompts] for r in self.references)
        seen = Seen(here.logits, top, prompts, here.view, clean, base, here.site)
        found = self.watch.reader(seen)
        if found.shape == here.logits.shape[:1] and bool(torch.isfinite(found).all()):
            return found.float().cpu()
        raise SaefeatError(
            f"{self.function}: `metric` is of shape {tuple(found.shape)}, or not finite, wanted one"
            " finite number a prompt, [batch]. Likely cause: a mean over prompts inside the metric,"
            " or a logarithm of zero. Try: metric(lambda logits: logits[:, 5])"
        )


def _references(watch: Watch, data: Data, base: Iterable[Tensor], size: int) -> References:
    """What the metric compares with, run only if it does; ``base`` yields logits as it runs."""
    metric, found = watch.metric, References()
    with torch.no_grad():
        if metric.baseline_top:
            found = found._replace(top=torch.cat([logits.argmax(-1) for logits in base]))
        elif metric.reference == "baseline":
            found = found._replace(base=torch.cat(list(base)))
        elif metric.reference == "clean":
            clean = [watch.run(batch).last.cpu() for batch, _ in data.batches(size)]
            found = found._replace(clean=torch.cat(clean))
    return found


def _opened(
    folder: Folder, watch: Watch, data: Data, function: str, batch_size: int, **asked: Any
) -> Checkpoint:
    """The job's checkpoint, refused now if it is another's."""
    who: dict[str, Any] = {}
    if folder is not None:
        who = {**model_identity(watch.model), "job": function, "metric": digest(watch.metric)}
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
