"""One batch's path from its clean run to its baseline, gradients along it, and their scores."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
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

LARGE = 1 << 26
"""Logits of a metric that reads every token may be gigabytes: more than these are not copied."""


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
        out = ends.get(part.write, clean.values[part.write]).clone()
        on_site = mask.to(out.device)
        out[on_site], target = moved_by(part, before, target, out[on_site])
        targets.append(target)
        ends[part.write] = out
    return ends, targets


# ---------------------------------------------------------------- gradients


def require_apart(path: Path) -> None:
    """Refuse a metric whose number for one prompt depends on another of its batch.

    Its shape is right, and a batch's gradient would still be no prompt's own.
    """
    clean, count = path.clean, len(path.batch.numbers)
    if count < 2 or int(path.batch.numbers[0]) or torch.is_inference_mode_enabled():
        return
    if clean.logits.numel() > LARGE:
        return
    with torch.enable_grad():
        read = {"logits": clean.logits, "site": clean.site}
        leaves = {n: x.detach().requires_grad_() for n, x in read.items() if x is not None}
        values = path.metric(replace(clean, **leaves), path.batch)
        if values.shape != (count,) or not values.requires_grad:
            return  # refused where its gradient is taken; without one, it may do for Exact
        first, last = (
            torch.autograd.grad(
                one, list(leaves.values()), materialize_grads=True, retain_graph=True
            )
            for one in (values[0], values[-1])
        )
    crossed = [x for a, b in zip(first, last, strict=True) for x in (a[1:], b[:-1])]
    if any(bool(x.nan_to_num(0.0, 0.0, 0.0).any()) for x in crossed):  # NaN is refused by name
        raise GradientError(
            f"Attribute: `metric` is {path.job.metric!r}, whose number for one prompt depends on"
            " another prompt, wanted each prompt's own. Likely cause: a mean, sum or normalization"
            " over the first dimension, the prompts. Try: logits.softmax(-1)[:, 5], or batch_size=1"
        )


def mean_gradients(path: Path) -> dict[int, Tensor]:
    """The metric's gradient at each written place [b, t, d], averaged over the path.

    With ``one_site`` each place has a path of its own, on which nothing else is moved.
    """
    total: dict[int, Tensor] = {}
    nodes, count = list(path.job.method.nodes()), len(path.batch.numbers)
    if nodes[0][0] == 0.0:  # the clean pass is the node at zero, for every site
        _add_gradients(total, path, path.clean, path.batch, slice(None), [nodes.pop(0)[1]])
        path.clean.nodes.clear()  # one graph at a time
    written = list(path.passes.written)
    for group in [[number] for number in written] if path.job.one_site else [written]:
        for first in range(0, len(nodes), path.copies):
            shares, weights = zip(*nodes[first : first + path.copies], strict=True)
            share = torch.tensor(shares, dtype=torch.float64).repeat_interleave(count)
            targets = {n: path.ends[n].repeat(len(shares), 1, 1) for n in group}
            rows = torch.arange(count).repeat(len(shares))
            many = path.batch.take(rows)
            run = path.passes.run(
                many, gradient=group, targets=targets, share=share[:, None, None], copy=False
            )
            _add_gradients(total, path, run, many, rows, weights)
    return total


def _add_gradients(
    total: dict[int, Tensor],
    path: Path,
    run: SitePass,
    batch: Batch,
    rows: Tensor | slice,
    weights: Sequence[float],
) -> None:
    """Add weight · ∂(Σ metric)/∂x at each node of a pass, whose rows are the path's batch once a
    weight; prompts do not mix, so rows are the prompts' own.
    """
    values = path.metric(run, batch, rows)
    if values.shape != run.logits.shape[:1] or not values.requires_grad:
        raise GradientError(
            f"Attribute: `metric` is of shape {tuple(values.shape)} with"
            f" requires_grad={values.requires_grad}, wanted one differentiable number a prompt,"
            " [batch]. Likely cause: an argmax, detach or mean over prompts in it. Try:"
            " metric(lambda logits: logits[:, 5])"
        )
    for number, slopes in run.slopes(values.sum(), run.nodes, path.passes.written).items():
        for weight, slope in zip(weights, slopes.chunk(len(weights)), strict=True):
            # In bfloat16 a mean of 200 gradients is wrong by several percent.
            part = weight * slope.to(torch.promote_types(slope.dtype, torch.float32))
            total[number] = part if number not in total else total[number].add_(part)


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
        before, slope = part.read_at(values, mask), slopes[part.write]
        kept, dropped = score(part, before, target, slope[mask.to(slope.device)], keep)
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
