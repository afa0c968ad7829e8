"""One batch attributed: baseline run, clean run, gradients or moves, scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import GradientError
from ..kernel.read import lift
from ..kernel.tokens import select
from ..kernel.view import View
from ..metrics.batches import Batch
from ..metrics.evaluator import require_finite
from ..results.receipt import Receipt
from ..text.prompts import Prompts
from ..text.rules import plain
from ..text.tokens import Tokens
from ..verbs.rules import acts_at
from .endpoint import Endpoint, endpoint, run_baseline
from .exact import effects
from .job import Job
from .pairs import Target, at_tokens
from .part import Part
from .passes import SitePass, SitePasses
from .path import AtOnce, Path
from .prepare import prepare, require_apart, require_finite_scores
from .readout import score
from .scores import Attribution

if TYPE_CHECKING:
    from nnsight import TransformersModel


def attribute_batch(
    job: Job, passes: SitePasses, batch: Batch, other: Batch | None, at_once: AtOnce
) -> tuple[Attribution, Receipt]:
    """One batch's scores, and what the baseline's edits did."""
    published = getattr(job.method, "endpoint", "") == "as_published"
    baseline_run = run_baseline(passes, job.baseline, batch, other, published)
    nodes = job.method.nodes()  # a path that starts at zero has the clean pass for its first node
    clean = passes.run(batch, gradient=passes.written if nodes and nodes[0][0] == 0.0 else ())
    end = _endpoint(job, passes, batch, other, clean, baseline_run)
    path = Path(passes, job.method, batch, clean, end, at_once)
    require_apart(path)
    slopes = path.mean_gradients(job.one_site) if nodes else {}
    with torch.no_grad():
        columns, dropped = (
            _by_gradient(path, slopes, job.keep) if nodes else (_by_moving(path), None)
        )
        require_finite_scores(columns, batch.numbers)
        scored = torch.stack(end.scored).any(0).cpu()
        scores = Attribution(
            tuple(part.dictionary for part in passes.parts),
            *columns,
            clean=_finite(path.metric_at_clean(), batch, "clean"),
            baseline=_finite(path.metric_at_baseline(), batch, "baseline"),
            tokens=scored.sum(1),
            scored=scored[batch.inputs["attention_mask"].bool()],
            ends=_metric_by_site(path) if job.one_site else None,
            dropped=dropped,
        )
    return scores, end.run.receipt


def _finite(values: Tensor, batch: Batch, run: str) -> Tensor:
    return require_finite("Attribute", values, batch.numbers, run, GradientError)


def _endpoint(
    job: Job,
    passes: SitePasses,
    batch: Batch,
    other: Batch | None,
    clean: SitePass,
    run: SitePass | None,
) -> Endpoint:
    scored = scored_tokens(job.where, passes, clean.view, batch.lengths is not None)
    return endpoint(passes, job.baseline, batch, other, clean, scored, run)


def baseline_logits(
    job: Job, model: TransformersModel, prompts: Prompts, batch_size: int
) -> Iterator[Tensor]:
    """[b, vocabulary] a batch: last logits of the baseline run of an attribution of these prompts.

    What ``BASELINE_TOP`` and ``kl("baseline")`` refer to.
    """
    passes = SitePasses(job.target, model, job.metric)
    with torch.no_grad():
        for batch, other in prepare(job, model, prompts).batches(batch_size):
            run = run_baseline(passes, job.baseline, batch, other, False)
            if run is None:
                run = _endpoint(job, passes, batch, other, passes.run(batch), None).run
            yield run.last.cpu()


def scored_tokens(
    where: Tokens | None, passes: SitePasses, view: View, continued: bool
) -> tuple[Tensor, ...]:
    """[b, t] a part: which tokens are scored; never a continuation's, unless ``where`` says so."""
    model = passes.evaluator.model
    rules = [acts_at(where, part.dictionary, model) for part in passes.parts]
    if continued and where is None:
        rules = [rule & Tokens.prompt() for rule in rules]
    return tuple(select(plain(rule.rule, model), view) for rule in rules)


def read_out(
    parts: Sequence[Part],
    masks: Sequence[Tensor],
    targets: Sequence[Target],
    values: dict[int, Tensor],
    slopes: dict[int, Tensor],
    view: View,
    keep: int | None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Attribution's seven columns, and the sums [b, 2] of what ``keep`` left out."""
    rows, left_out = [], torch.zeros(len(view.real), 2)
    for part, mask, target in zip(parts, masks, targets, strict=True):
        before = lift(at_tokens(values[part.read], mask), part.norm)  # [n, d_in]
        kept, dropped = score(part, before, target, at_tokens(slopes[part.write], mask), keep)
        prompt = mask.nonzero()[:, 0].to(before.device)
        position = view.position[mask].to(before.device)[kept.token]
        numbers = (kept.score.float(), kept.activation.float(), kept.change.float())
        rows.append((prompt[kept.token], position, kept.latent, *numbers))
        left_out.index_add_(0, prompt.cpu(), dropped.float().cpu())
    return _numbered(rows), None if keep is None else left_out


def _by_gradient(
    path: Path, slopes: dict[int, Tensor], keep: int | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    end, clean = path.end, path.clean
    parts = path.passes.parts
    return read_out(parts, end.scored, end.targets, clean.values, slopes, clean.view, keep)


def _by_moving(path: Path) -> tuple[Tensor, ...]:
    """The columns of scores for which latents are moved, without gradients."""
    parts = zip(path.passes.parts, path.end.scored, path.end.targets, strict=True)
    return _numbered([effects(path, part, mask, target) for part, mask, target in parts])


def _numbered(rows: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Every part's columns as one, on the CPU, with the part's number behind the prompt's."""
    numbered = [(row[0], torch.full_like(row[0], n), *row[1:]) for n, row in enumerate(rows)]
    return tuple(torch.cat([c.cpu() for c in column]) for column in zip(*numbered, strict=True))


def _metric_by_site(path: Path) -> Tensor:
    """[b, dictionaries]: the metric with each dictionary's written site alone at the baseline."""
    by_place = {}
    for n in path.passes.written:
        run = path.passes.run(path.batch, targets={n: path.end.values[n]}, copy=False)
        by_place[n] = _finite(path.metric(run, path.batch), path.batch, "baseline")
    return torch.stack([by_place[part.write] for part in path.passes.parts], 1)
