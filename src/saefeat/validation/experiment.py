"""Experiment: one model, its prompts and a metric, measured under many edits."""

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
from ..attribution.columns import require
from ..attribution.passes import prepare
from ..attribution.path import baseline_logits
from ..attribution.scores import Attribution
from ..checks import whole
from ..dictionaries.latents import Latents
from ..errors import PromptError, SaefeatError
from ..files.checkpoint import Checkpoint
from ..files.hashing import digest
from ..kernel.encode import encode
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
from ..results.provenance import model_identity
from ..results.readings import Readings
from ..results.receipt import Fired, Receipt, join_receipts
from ..text.prompts import Prompts
from ..text.tokens import Tokens
from ..values.patch import Patch
from ..values.per_prompt import per_prompt
from ..verbs.base import Intervention, require_fired, require_rows
from ..verbs.edits import Clamp
from .ranking import selection

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
        """
        whole(function, "batch_size", batch_size)
        edit = baseline or NOTHING
        data = metric_data(function, model, prompts, metric)
        if baseline is None and metric.needs_baseline:
            name = "BASELINE_TOP" if metric.baseline_top else 'kl("baseline")'
            raise SaefeatError(
                f"{function}: `metric` is {metric!r}, wanted the baseline run it refers to, or a"
                f" metric that needs none. Likely cause: {name} is what a baseline run says, and"
                f" there is none here. Try: {function}(..., baseline=Ablate(latents))"
            )
        require_rows(edit, data.prompts)
        evaluator = Evaluator(model, metric, function)
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
        evaluator = Evaluator(model, job.metric, function)
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
            fired = tuple(map(Fired.counted, meta["rows"]))
            return tensors["metric"], Receipt(fired, meta["passes"])
        values, receipts = [], []
        for batch, prompt in self._batches(edit, rows, start):
            run = self.evaluator.run(batch, edit)
            with torch.no_grad():
                value = self.evaluator.read(run, prompt, self.references.at(prompt))
            values.append(require_finite(self.function, value, prompt, "measured"))
            receipts.append(run.receipt)
        metric, receipt = torch.cat(values), join_receipts(receipts)
        fired = [row.counts() for row in receipt.rows]
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
        together, values = max(1, self.batch_size // len(self)), []
        starts = range(0, len(sets), together)
        for start in tqdm(starts, disable=not progress, desc=self.function, unit="batch"):
            some = sets[start : start + together]
            union, member = per_prompt(some)
            scale = (~member).float().repeat_interleave(len(self), 0)  # [some · prompts, k]
            edit = Clamp(union, scale=scale, where=where) if len(union) else None
            prompts = torch.arange(len(self)).repeat(len(some))
            values.append(self.under(edit, prompts).reshape(len(some), len(self)))
        return torch.cat(values)

    def require_same(self, clean: Tensor, scores: Attribution) -> None:
        """Refuse scores of other prompts, another metric or another model.

        ``clean`` [prompts] is the metric in the bare model.
        """
        remembered, inputs = scores.clean, self.data.inputs
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        ids = tuple(tuple(row[real].tolist()) for row, real in rows)
        same = clean.shape == remembered.shape
        same &= scores.texts is None or scores.texts.ids == ids
        # bfloat16 models move by a percent when rows are batched otherwise
        floats = (p for p in self.evaluator.module.parameters() if p.is_floating_point())
        first = next(floats, clean)
        share = 2e-3 if torch.finfo(first.dtype).bits > 16 else 2e-2
        slack = share * (1 + float(remembered.abs().max())) if same else 0.0
        if same and bool(((clean - remembered).abs() <= slack).all()):
            return
        raise PromptError(
            f"{self.function}: `scores` is of {len(remembered)} prompts with a mean metric of"
            f" {remembered.mean():.3f}, wanted these {len(clean)} prompts, of {clean.mean():.3f}."
            " Likely cause: other prompts, another order, another metric or another model. Try:"
            " scores = attribute(model, prompts), and the same three here"
        )

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
        who = model_identity(evaluator.model) | {"job": function, "batch_size": batch_size}
        who |= {"metric": digest(evaluator.metric), "prompts": digest(*data)}
        who |= {name: digest(value) for name, value in asked.items()}
    with Checkpoint(folder, who, function) as done:  # it holds nothing open
        return done


CAPACITY = 1 << 28
"""Numbers that a pass may hold beside the weights: 1 GiB of float32. On a GPU half of what is free,
if that is more."""


def rows_that_fit(evaluator: Evaluator, batch: Batch, intervention: Intervention, most: int) -> int:
    """At most ``most`` rows as wide as this batch, and one at least.

    Counted are the logits that the metric reads (three times: as they are, in float32, and their
    logarithms), the latents that an intervention encodes, the block's own activations, and the
    attention weights of one layer. It is an estimate: it keeps 32 rows of 2,000 tokens, or logits
    of every token, from filling the memory.
    """
    tokens = batch.inputs["input_ids"].shape[1]
    config: Any = getattr(evaluator.module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("vocab_size", "hidden_size", "num_attention_heads")
    words, width, heads = (getattr(text, name, None) or 0 for name in names)
    latents = sum(len(step.latents) for step in intervention.parts())
    row = 3 * (evaluator.columns(batch) or tokens) * words
    row += tokens * (4 * latents + 16 * width + 2 * heads * tokens)
    capacity, device = CAPACITY, next((p.device for p in evaluator.module.parameters()), None)
    if device is not None and device.type == "cuda":
        capacity = max(capacity, torch.cuda.mem_get_info(device)[0] // 8)
    return max(1, min(most, capacity // max(1, row)))


def effects(
    experiment: Experiment,
    scores: Attribution,
    keys: Tensor,
    place: Tensor,
    clean: Tensor,
    *,
    progress: bool,
) -> Tensor:
    """[k, prompts] float64: the metric's exact change when a latent moves alone.

    It is the exact counterpart of a score. A score at (prompt, position, latent) is the estimated
    effect of adding ``change`` to that latent there, so a prompt's sum over positions is the
    estimate of one edit, which the attribution's record is enough to make. Latents that did not
    move in a prompt have no row in the batch: their effect is exactly zero.

    ``keys`` [k, 2] are (dictionary, latent), ``place`` [n] which key each of the attribution's rows
    is of, or −1, and ``clean`` [prompts] the metric in the clean run.
    """
    moves = (place >= 0).nonzero().squeeze(1)
    edits, edit = torch.unique(  # [edits, 2] (key, prompt), and the edit each move belongs to
        torch.stack([place[moves], scores.prompt[moves]], 1), dim=0, return_inverse=True
    )
    effect = torch.zeros(len(keys), len(experiment), dtype=torch.float64)
    starts = range(0, len(edits), experiment.batch_size)
    for start in tqdm(starts, disable=not progress, desc=experiment.function, unit="batch"):
        rows = edits[start : start + experiment.batch_size]
        here = (edit >= start) & (edit < start + len(rows))
        shifted = _shifted(scores, keys, rows, moves[here], edit[here] - start)
        values = experiment.under(shifted, rows[:, 1])
        effect[rows[:, 0], rows[:, 1]] = values.double() - clean[rows[:, 1]].double()
    return effect


def _shifted(scores: Attribution, keys: Tensor, rows: Tensor, moves: Tensor, edit: Tensor) -> Clamp:
    """The edit of one batch, whose row r moves latent rows[r, 0] in prompt rows[r, 1].

    ``moves`` [n] are the attribution's rows, ``edit`` [n] the batch's row each belongs to. Values
    are by position in the text, so that padding and batching do not matter.
    """
    latents = selection(scores.dictionaries, keys[rows[:, 0].unique()])
    number = {id(dictionary): n for n, dictionary in enumerate(scores.dictionaries)}
    pairs = [(number[id(basis)], i) for basis, indices in latents.parts for i in indices]
    column = {pair: n for n, pair in enumerate(pairs)}
    places = torch.tensor([column[tuple(key)] for key in keys[rows[edit, 0]].tolist()])
    position = scores.position[moves]
    shift = torch.zeros(
        len(rows), int(position.max()) + 1, len(latents), dtype=torch.float32
    )  # [b, t, k]
    shift[edit, position, places] = scores.change[moves].cpu()
    every = torch.ones_like(shift, dtype=torch.bool)
    values = Readings(latents, shift, every, torch.zeros(len(rows), dtype=torch.long))
    return Clamp(latents, add=Patch(values), where=Tokens.all())


def require_movable(scores: Attribution, function: str) -> None:
    """Refuse scores that do not say at which tokens, and how far, each latent is to be moved."""
    require(scores, function, "positions")  # an exact score of a whole prompt is no estimate
    if torch.equal(scores.change, -scores.activation):
        return
    for dictionary in scores.dictionaries:
        columns = dictionary.columns(torch.zeros(1, dtype=torch.long))
        if encode(columns, torch.ones(1, dictionary.d_in, dtype=torch.float32))[1] is not None:
            raise SaefeatError(
                f"{function}: `attribute` is with a baseline, on {dictionary!r}, whose directions"
                " move with the input, wanted the zero baseline there. Likely cause: an SAE that"
                " normalizes its input, or the error term. Try: Attribute(..., baseline=None)"
            )


def require_upstream_of(
    metric: Metric, model: TransformersModel, latents: Latents, function: str
) -> None:
    """Refuse latents that the metric's own site does not depend on."""
    if metric.site is not None:
        written = [basis.write_site for basis, _ in latents.parts]
        Evaluator(model, metric, function, written).require_upstream(written)
