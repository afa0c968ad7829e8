"""One batch attributed: baseline run, clean run, gradients or moves, scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernel.read import lift
from ..kernel.tokens import select
from ..kernel.view import View
from ..results.receipt import Receipt
from ..text.prompts import Prompts
from ..text.rules import plain
from ..text.tokens import Tokens
from ..verbs.rules import acts_at
from .endpoint import end, run_baseline
from .exact import effects
from .integrate import AtOnce, Runs, mean_gradients
from .job import Job
from .pairs import Goal, at_tokens
from .passes import Batch, Part, Watch
from .prepare import prepare, require_apart, require_finite, require_finite_scores
from .readout import score
from .scores import Attribution


def attribute_batch(
    job: Job, watch: Watch, batch: Batch, other: Batch | None, at_once: AtOnce
) -> tuple[Attribution, Receipt]:
    """One batch's scores, and what the baseline's edits did."""
    published = getattr(job.method, "endpoint", "") == "as_published"
    here = run_baseline(watch, job.baseline, batch, other, published)
    nodes = job.method.nodes()  # a path that starts at zero has the clean pass for its first node
    clean = watch.run(batch, gradient=watch.written if nodes and nodes[0][0] == 0.0 else ())
    masks = scored(job.where, watch, clean.view, batch.lengths is not None)
    reached = end(watch, job.baseline, batch, other, clean, masks, here)
    runs = Runs(watch, job.method, batch, clean, reached, at_once)
    require_apart(watch, batch, clean, runs.base())
    slopes = mean_gradients(runs, job.one_site) if nodes else {}
    with torch.no_grad():
        columns, dropped = (
            _by_gradient(runs, slopes, job.keep) if nodes else (_for_real(runs), None)
        )
        require_finite_scores(columns, batch.numbers)
        found = Attribution(
            tuple(part.dictionary for part in watch.parts),
            *columns,
            clean=require_finite(runs.of_clean(), "clean", batch.numbers).float().cpu(),
            baseline=require_finite(runs.of_base(), "baseline", batch.numbers).float().cpu(),
            tokens=torch.stack(reached.scored).any(0).sum(1).cpu(),
            scored=torch.stack(reached.scored).any(0).cpu()[batch.inputs["attention_mask"].bool()],
            ends=_alone(runs) if job.one_site else None,
            dropped=dropped,
        )
    return found, reached.here.receipt


def baseline_logits(job: Job, model: Any, prompts: Prompts, batch_size: int) -> Iterator[Tensor]:
    """[b, vocabulary] a batch: last logits of the baseline run of an attribution of these prompts.

    What ``BASELINE_TOP`` and ``kl("baseline")`` refer to.
    """
    watch = Watch(job.target, model, job.metric)
    with torch.no_grad():
        for batch, other in prepare(job, model, prompts).batches(batch_size):
            here = run_baseline(watch, job.baseline, batch, other, False)
            if here is None:
                clean = watch.run(batch)
                masks = scored(job.where, watch, clean.view, batch.lengths is not None)
                here = end(watch, job.baseline, batch, other, clean, masks, None).here
            yield here.last.cpu()


def baseline_top(job: Job, model: Any, prompts: Prompts, batch_size: int) -> Tensor:
    """[prompts] long: what ``BASELINE_TOP`` stands for in an attribution of these prompts."""
    found = baseline_logits(job, model, prompts, batch_size)
    return torch.cat([logits.argmax(-1) for logits in found])


def scored(where: Tokens | None, watch: Watch, view: View, continued: bool) -> tuple[Tensor, ...]:
    """[b, t] a part: which tokens are scored; never a continuation's, unless ``where`` says so."""
    rules = [acts_at(where, part.dictionary, watch.model) for part in watch.parts]
    if continued and where is None:
        rules = [rule & Tokens.prompt() for rule in rules]
    return tuple(select(plain(rule.rule, watch.model), view) for rule in rules)


def read_out(
    parts: Sequence[Part],
    masks: Sequence[Tensor],
    goals: Sequence[Goal],
    values: dict[int, Tensor],
    slopes: dict[int, Tensor],
    view: View,
    keep: int | None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Attribution's six columns, and the sums [b, 2] of what ``keep`` left out."""
    found, left = [], torch.zeros(len(view.real), 2)
    for part, mask, goal in zip(parts, masks, goals, strict=True):
        before = lift(at_tokens(values[part.read], mask), part.transform)  # [n, d_in]
        kept, dropped = score(part, before, goal, at_tokens(slopes[part.write], mask), keep)
        prompt = mask.nonzero()[:, 0].to(before.device)
        place = view.position[mask].to(before.device)[kept.token]
        numbers = (kept.score.float(), kept.activation.float(), kept.change.float())
        found.append((prompt[kept.token], place, kept.latent, *numbers))
        left.index_add_(0, prompt.cpu(), dropped.float().cpu())
    return _numbered(found), None if keep is None else left


def _by_gradient(
    runs: Runs, slopes: dict[int, Tensor], keep: int | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    parts, end, clean = runs.watch.parts, runs.end, runs.clean
    return read_out(parts, end.scored, end.goals, clean.values, slopes, clean.view, keep)


def _for_real(runs: Runs) -> tuple[Tensor, ...]:
    end = runs.end
    parts = zip(runs.watch.parts, end.scored, end.goals, strict=True)
    return _numbered([effects(runs, part, mask, goal) for part, mask, goal in parts])


def _numbered(found: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Every part's columns as one, on the CPU, with the part's number behind the prompt's."""
    numbered = [(row[0], torch.full_like(row[0], n), *row[1:]) for n, row in enumerate(found)]
    return tuple(torch.cat([c.cpu() for c in column]) for column in zip(*numbered, strict=True))


def _alone(runs: Runs) -> Tensor:
    """[b, dictionaries]: the metric with each dictionary's written site alone at the baseline."""
    rows, found = torch.arange(len(runs.batch.numbers)), {}
    for n in runs.watch.written:
        here = runs.watch.run(runs.batch, targets={n: runs.end.targets[n]}, copy=False)
        values = runs.metric(here, runs.batch, rows)
        found[n] = require_finite(values, "baseline", runs.batch.numbers).float().cpu()
    return torch.stack([found[part.write] for part in runs.watch.parts], 1)
