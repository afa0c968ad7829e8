"""One batch's path from its clean run to its baseline, gradients on it, and their scores."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import GradientError
from ..kernel.state import View
from ..metrics.evaluator import Batch, Pass, References
from ..text.prompts import Prompts
from ..verbs.base import Intervention
from .baselines import Baseline, Fixed, Paired, aligned
from .pairs import Part, Target, moved_by, score
from .passes import AtOnce, Job, SitePass, SitePasses, prepare

if TYPE_CHECKING:
    from nnsight import TransformersModel

ON_CPU, ELSEWHERE = 128, 8192
"""Tokens a pass, when nobody says: a CPU gains nothing from more, a GPU would stand idle."""


@dataclass(frozen=True)
class Path:
    """One batch under way: its clean run, where its path ends, and how the way between is taken.

    ``ends`` [b, t, d] a written place, ``targets`` a part, ``scored`` [b, t] a part; ``other`` is
    what the baseline run is made with, another batch for paired prompts; ``run`` is that run if it
    was made already.
    """

    job: Job
    passes: SitePasses
    at_once: AtOnce
    batch: Batch
    other: Batch
    clean: SitePass
    run: SitePass | None
    ends: dict[int, Tensor]
    targets: tuple[Target, ...]
    scored: tuple[Tensor, ...]

    @cached_property
    def baseline(self) -> SitePass:
        """The baseline run; made when asked for, so that it need not lie beside another's graph."""
        return self.run or self.passes.run(self.batch, targets=self.ends, copy=False)

    def metric(self, run: Pass, batch: Batch, rows: Tensor | slice = slice(None)) -> Tensor:
        """The metric of a pass over some rows of the batch, [rows]."""
        evaluator, top, base = self.passes.evaluator, None, None
        if evaluator.metric.needs_baseline:
            base = self.baseline.last[rows]
            top = base.argmax(-1)
        references = References(top, self.clean.last[rows], base)
        return evaluator.read(run, batch.numbers, references)

    def chosen(self, place: int) -> Tensor:
        """[b, t] bool: the tokens that are scored at a written place, by any dictionary there."""
        masks = zip(self.passes.parts, self.scored, strict=True)
        return torch.stack([mask for part, mask in masks if place in part.writes]).any(0)

    @cached_property
    def alone(self) -> dict[int, Tensor]:
        """The metric [b] with each written place alone at the path's end; a pass for each."""
        found = {}
        for n in self.passes.written:
            run = self.passes.run(self.batch, targets={n: self.ends[n]}, copy=False)
            found[n] = self.metric(run, self.batch).detach()
        return found

    @property
    def copies(self) -> int:
        """How many copies of the batch share a pass."""
        if isinstance(self.at_once, int):
            return self.at_once
        budget = ON_CPU if self.clean.logits.device.type == "cpu" else ELSEWHERE
        return max(1, budget // self.batch.inputs["input_ids"].numel())


# ---------------------------------------------------------------- the two ends


def baseline_run(
    job: Job, passes: SitePasses, batch: Batch, other: Batch | None
) -> SitePass | None:
    """The baseline's own run, where it has one."""
    if isinstance(job.baseline, Intervention):
        return passes.run(batch, job.baseline, before=job.as_published)
    return None if other is None else passes.run(other)


def begin(
    job: Job,
    passes: SitePasses,
    batch: Batch,
    other: Batch | None,
    at_once: AtOnce = "auto",
    gradient: Collection[int] = (),
) -> Path:
    """The batch's path, with its clean run made, and the baseline's where it has one of its own."""
    run = baseline_run(job, passes, batch, other)  # first: the clean run's graph takes memory
    clean = passes.run(batch, gradient=gradient)
    scored = passes.scored(clean.view)
    with torch.no_grad():
        if run is None:
            ends, targets = _moved(job, passes, batch, clean, scored)
        else:
            values = run.values
            if isinstance(job.baseline, Paired) and other is not None:
                values, scored = aligned(job.baseline, batch, other, clean.values, values, scored)
            ends = {n: (run.before or values)[n] for n in passes.written}
            targets = [
                Target(part.read_at(values, mask))
                for part, mask in zip(passes.parts, scored, strict=True)
            ]
    return Path(
        *(job, passes, at_once, batch, other or batch, clean), run, ends, tuple(targets), scored
    )


def baseline_logits(
    job: Job, model: TransformersModel, prompts: Prompts, batch_size: int
) -> Iterator[Tensor]:
    """[b, vocabulary] a batch: last logits of the baseline run, which a metric may refer to."""
    passes = SitePasses(job, model)
    with torch.no_grad():
        for batch, other in prepare(job, model, prompts).batches(batch_size):
            run = baseline_run(job, passes, batch, other)
            yield (run or begin(job, passes, batch, other).baseline).last.cpu()


def target_of(baseline: Baseline, part: Part, prompt: Tensor) -> Target:
    """What a part's latents are moved to at n tokens of these prompts: fixed values, or zero."""
    if not isinstance(baseline, Fixed):
        return Target()
    return Target(fixed=baseline.of(part.dictionary, part.indices, prompt))


def _moved(
    job: Job, passes: SitePasses, batch: Batch, clean: SitePass, scored: Sequence[Tensor]
) -> tuple[dict[int, Tensor], list[Target]]:
    """Latents at zero or at fixed values, each site moved from its own clean value."""
    targets: list[Target] = []
    ends: dict[int, Tensor] = {}
    for part, mask in zip(passes.parts, scored, strict=True):
        target = target_of(job.baseline, part, batch.numbers[mask.nonzero()[:, 0].cpu()])
        before = part.read_at(clean.values, mask)
        for n in part.writes:
            ends[n] = ends[n] if n in ends else clean.values[n].clone()
        out, target = moved_by(part, before, target, part.written_at(ends, mask))
        for n, value in part.by_place(out).items():
            ends[n][mask.to(ends[n].device)] = value.to(ends[n].device)
        targets.append(target)
    return ends, targets


# ---------------------------------------------------------------- gradients


def gradients(
    path: Path, group: Collection[int], rows: Tensor, share: Tensor
) -> tuple[Tensor, dict[int, Tensor]]:
    """The metric [m] and its gradient at the places of a group, with prompts, by their rows [m] in
    the batch, moved there by a share [m] of the way each.
    """
    many = path.batch.take(rows)
    targets = {n: path.ends[n][rows.to(path.ends[n].device)] for n in group}
    run = path.passes.run(
        many, gradient=group, targets=targets, share=share[:, None, None], copy=False
    )
    return gradients_of(path, run, many, rows)


def gradients_of(
    path: Path, run: SitePass, batch: Batch, rows: Tensor | slice = slice(None)
) -> tuple[Tensor, dict[int, Tensor]]:
    """The metric of a pass over some rows of the path's batch, and ∂(Σ metric)/∂x at its nodes;
    prompts do not mix, so rows are the prompts' own.
    """
    values = path.metric(run, batch, rows)
    if not values.requires_grad:
        raise GradientError(
            f"Attribute: `metric` is of shape {tuple(values.shape)} with requires_grad=False,"
            " wanted one differentiable number a prompt, [batch]. Likely cause: an argmax, a"
            " threshold or a detach in it. Try: metrics.custom(lambda logits: logits[:, 5]), or"
            " method=Exact(), which takes no gradient"
        )
    return values.detach(), run.slopes(values.sum(), run.nodes, path.passes.written)


# ---------------------------------------------------------------- scores


def read_out(
    parts: Sequence[Part],
    masks: Sequence[Tensor],
    targets: Sequence[Target],
    values: dict[int, Tensor],
    slopes: dict[int, Tensor],
    view: View,
    keep: int | None,
) -> tuple[list[tuple[Tensor, ...]], Tensor | None]:
    """Six columns of scores a part, and the sums [b, 2] of what ``keep`` left out."""
    rows, left_out = [], torch.zeros(len(view.real), 2, dtype=torch.float32)
    for part, mask, target in zip(parts, masks, targets, strict=True):
        before, slope = part.read_at(values, mask), part.written_at(slopes, mask)
        kept, dropped = score(part, before, target, slope, keep)
        prompt = mask.nonzero()[:, 0].to(before.device)
        position = view.position[mask].to(before.device)[kept.token]
        numbers = (kept.score.float(), kept.activation.float(), kept.change.float())
        rows.append((prompt[kept.token], position, kept.latent, *numbers))
        left_out.index_add_(0, prompt.cpu(), dropped.float().cpu())
    return rows, None if keep is None else left_out


def joined(rows: Sequence[tuple[Tensor, ...]], numbers: Tensor) -> tuple[Tensor, ...]:
    """Every part's columns as one, on the CPU, with the part's number behind the prompt's.

    Scores that are NaN or infinite are refused: NaN would be ranked above every number.
    """
    parts = [(row[0], torch.full_like(row[0], n), *row[1:]) for n, row in enumerate(rows)]
    columns = tuple(torch.cat([c.cpu() for c in column]) for column in zip(*parts, strict=True))
    bad = ~torch.stack([column.isfinite() for column in columns[4:]]).all(0)
    if bool(bad.any()):
        raise GradientError(
            f"Attribute: `metric` is without a finite gradient or effect for {int(bad.sum())} of"
            f" {len(bad)} scores, first in prompt {int(numbers[columns[0][bad][0]])}, wanted finite"
            " ones. Likely cause: a root or logarithm at zero in the metric, or a float16 model"
            " that overflows. Try: a metric that is smooth there, or the model in bfloat16"
        )
    return columns
