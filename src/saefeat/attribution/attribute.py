"""Attribute: which latents carry a metric, at the price of the bare model's passes.

The dictionary is never in the graph. With the error term kept and a linear decoder,
∂m/∂f_i = (∂m/∂x) · direction_i, so the model runs bare, gradients are taken at the sites'
values [b, t, d_model], averaged over the path, and only then read through the dictionary, a block
of latents at a time, into a sparse result. Memory does not grow with the dictionary's width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..checks import gradients_on, whole
from ..dictionaries.by_site import Dictionaries
from ..dictionaries.given import as_latents
from ..dictionaries.latents import Dictionary, Latents
from ..errors import GradientError, LatentError, PromptError, SaefeatError
from ..files.checkpoint import Checkpoint
from ..files.hashing import digest
from ..metrics.base import Metric
from ..metrics.evaluator import Batch, require_finite
from ..model.modules import torch_module
from ..results.provenance import model_identity, remote_identity
from ..results.receipt import Fired, Receipt, join_receipts
from ..shipping.server import Server
from ..text.prompts import Prompts
from ..text.texts import texts_of
from ..text.tokens import Tokens
from ..verbs.base import Intervention, require_fired
from .baselines import Baseline
from .convergence import joined as settled
from .convergence import taken, warn_of
from .exact import effects
from .in_trace import Watching, watch
from .integrate import mean_gradients, tolerance_of
from .methods import AtP, Backward, Method
from .passes import AtOnce, Job, Prepared, SitePasses, prepare, require_scored, source
from .path import Path, begin, joined, read_out
from .scores import Attribution

if TYPE_CHECKING:
    from nnsight import TransformersModel


@checked(own=("batch_size", "steps_at_once"))
@final
@dataclass(frozen=True)
class Attribute:
    """Score latents by how much the metric moves when each goes to its baseline value.

    Scores are first-order estimates, not effects (but for ``Exact``): verify the few that matter
    by ablating them.

    Args:
        target: ``Dictionaries`` (all their latents), a dictionary, or ``Latents`` (only these).
        metric: what to explain; ``logit_diff``, ``logit``, ``log_prob``, ``kl``, ``activation``,
            ``metric`` or ``at_site``.
        baseline: what latents are moved to. None: zero. ``Fixed``: given values, such as means.
            ``Paired``: what they are on another prompt. An intervention: what they are on the same
            prompt under it (so ``Ablate(direction)`` is the refusal paper's corrupt run); values
            are encoded anew: latents it ablates may read above zero there, so to remove the very
            latents that are scored, use None.
        method: ``AtP()``, ``IG(steps, rule)``; ``Exact()`` or ``FiniteDifference()`` for a few.
        where: which tokens are scored; every real token of the prompt by default.
        semantics: ``pass_through``: a site's gradient holds everything downstream of it, other
            watched sites included (Marks et al. 2024; the refusal paper's code does the same).
            ``through_sae``: past a watched site only what its dictionary encodes and decodes
            flows back, its error term being constant, as with SAELens's ``use_error_term``.
        one_site: every site on a path of its own, on which no other site is moved: as many times
            the passes, and a completeness gap for each site.
        backward: ``RelP()`` or ``GradDrop()`` in place of the plain gradient.
        keep: at each token and site only so many scores, the largest; what is left out is summed
            in ``Attribution.dropped``. Every latent that moved by default, which for a dictionary
            with nearly all latents active is 44 bytes a token, site and latent.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> attribute = sf.Attribute(saes, sf.logit_diff(5, 6), method=sf.IG(steps=2))
        >>> isinstance(attribute(model, ["hello"]).top(3), sf.Latents)
        True
    """

    target: Dictionaries | Dictionary | Latents
    metric: Metric
    baseline: Baseline = None
    method: Method = field(default_factory=AtP)
    where: Tokens | None = None
    semantics: str = field(default="pass_through", kw_only=True)
    one_site: bool = field(default=False, kw_only=True)
    backward: Backward | None = field(default=None, kw_only=True)
    keep: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _require_sense(self.job)

    @cached_property
    def job(self) -> Job:
        """These settings as plain values, for what carries them out."""
        latents = as_latents(self.target, "Attribute")
        path = (self.semantics, self.one_site, self.backward, self.keep)
        return Job(latents, self.metric, self.baseline, self.method, self.where, *path)

    def __call__(
        self,
        model: TransformersModel,
        prompts: Prompts,
        *,
        batch_size: int = 16,
        steps_at_once: AtOnce = "auto",
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = False,
        on: Server | None = None,
    ) -> Attribution:
        """Attribute over prompts, a batch at a time.

        Args:
            model: an nnsight ``TransformersModel``.
            prompts: strings, chats or token ids.
            batch_size: prompts a batch; each node of the method runs the batch once.
            steps_at_once: nodes of the method that share a pass, as copies of the batch's rows.
                ``"auto"`` fills a pass up to 128 tokens on a CPU, 8,192 elsewhere; the result is
                the same, memory is in proportion.
            checkpoint: a folder for finished batches: an interrupted call, made again, goes on
                from there. It belongs to this call; another's is refused.
            progress: show a progress bar.
            on: as in ``run``, of which the address and the ``payload_limit`` count: each pass is a
                job, waited for, and one with gradients two. A server that runs blocks in a process
                of their own has no gradients; ``Exact`` and ``FiniteDifference`` need none.

        Returns:
            An ``Attribution``, on the CPU.

        Raises:
            GradientError: under ``torch.no_grad``, for a model without weights or of inference
                tensors, or if the metric has no gradient, one that is not finite, or one that
                reaches from one prompt to another.
            FiringError: if ``where`` selects no token at all, or an edit of the baseline none.
            PromptError: as in ``run``, and for pairs that cannot be aligned.
            CheckpointError: for the folder of another call.
            RemoteError: for a job that is too large or bound to fail, or a result that does not
                fit it.
            SiteError, ModelError: as in ``run``.
        """
        job = self.job
        if job.method.nodes() and on is None:
            gradients_on("Attribute", torch_module(model))
        _require_sizes(job, batch_size, steps_at_once)
        passes = SitePasses(job, model, on)
        prepared = prepare(job, model, prompts)
        who = {} if checkpoint is None else _identity(job, model, prepared, batch_size, on)
        pieces, receipts = [], []
        with Checkpoint(checkpoint, who, "Attribute") as done:
            batches = tqdm(
                prepared.batches(batch_size), disable=not progress, desc="attribute", unit="batch"
            )
            for number, (batch, other) in enumerate(batches):
                saved = done.load(number)
                if saved is None:
                    piece, receipt = _attribute(job, passes, batch, other, steps_at_once)
                    if checkpoint is not None:
                        done.save(number, *_plain(piece, receipt, passes.there))
                else:
                    piece, receipt = _restored(saved, passes, job)
                pieces.append(piece)
                receipts.append(receipt)
        require_fired(join_receipts(receipts), "Attribute")  # over all of the data set
        scores = _join(pieces)
        require_scored(scores.tokens, "Attribute")
        warn_of(scores.convergence, [str(d.site) for d in scores.dictionaries], job.method)
        texts = texts_of(model, *prepared.data)
        signed = self.backward is None or self.backward.signed
        said = {"metric": repr(self.metric), "provenance": source(job, model, passes.there)}
        return replace(scores, texts=texts, signed=signed, **said)

    def watch(self, model: TransformersModel, intervention: Intervention | None = None) -> Watching:
        """Attribute inside an nnsight trace of your own, for the invoke it is called in.

        Call it before reading any layer, then compute a metric from whatever the block reads and
        ask for the scores: one gradient (``AtP``), zero or fixed baseline.

        Args:
            model: the nnsight model being traced.
            intervention: edits to apply in the same invoke; gradients pass through them.

        Returns:
            What to ask for ``scores``.

        Raises:
            GradientError: under ``torch.no_grad``.
            SaefeatError: for a method of several passes, a baseline with a run of its own, a
                backward rule, or a metric of a site or continuation: call ``attribute(model,
                prompts)`` outside the trace for these.

        Examples:
            >>> from saefeat.studies.refusal import tiny
            >>> model = tiny.model("chat")
            >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
            >>> attribute = sf.Attribute(saes, sf.logit_diff(5, 6))
            >>> with model.trace("hello"):
            ...     watching = attribute.watch(model)
            ...     scores = nnsight.save(watching.scores(model.output.logits))
            >>> isinstance(scores.top(3), sf.Latents)
            True
        """
        return watch(self.job, model, intervention)


SEMANTICS = ("pass_through", "through_sae")


def _require_sense(job: Job) -> None:
    """Refuse combinations that would not mean what they say."""
    gradients, keep, method = bool(job.method.nodes()), job.keep, f"{job.method!r}"
    plain = job.semantics == "pass_through"
    fits = keep is None or (gradients and type(keep) is int and keep > 0)
    checks = (  # right, parameter, got, wanted
        (job.semantics in SEMANTICS, "semantics", repr(job.semantics), " or ".join(SEMANTICS)),
        (
            gradients or (plain and job.backward is None and not job.one_site),
            *("method", f"{method} with semantics, backward or one_site"),
            "a method that takes gradients",
        ),
        (
            plain or job.backward is None,
            *("backward", f"{job.backward!r} with semantics={job.semantics!r}", "one of the two"),
        ),
        (
            isinstance(job.baseline, Intervention) or not job.as_published,
            *("method", f"{method} with baseline={job.baseline!r:.60}"),
            "an intervention as the baseline",
        ),
        (fits, "keep", f"{keep!r} with {method}", "at least 1, and a method with gradients"),
    )
    for right, parameter, got, wanted in checks:
        if not right:
            raise SaefeatError(
                f"Attribute: `{parameter}` is {got}, wanted {wanted}. Likely cause: two settings"
                " that exclude each other. Try: leave one of them at its default"
            )
    if job.metric.flat and job.at_clean_alone:
        raise GradientError(
            f"Attribute: `metric` is {job.metric!r} with {method}, wanted a method that looks"
            " beyond the clean run. Likely cause: a divergence from the clean run has no slope"
            " there: every score would be 0. Try: method=IG(8, 'midpoint') or Exact()"
        )


def _require_sizes(job: Job, batch_size: int, at_once: AtOnce) -> None:
    """Refuse sizes that are none, and a run for each latent of a whole dictionary."""
    whole("Attribute", "batch_size", batch_size, error=PromptError)
    count = len(job.target)
    limit = getattr(job.method, "limit", count)
    if count > limit:
        raise LatentError(
            f"Attribute: `target` is {count} latents for {job.method!r}, wanted at most {limit}."
            " Likely cause: a whole dictionary, when each latent costs a run of its own. Try:"
            f" attribute with IG first, then scores.top(100), or limit={count}"
        )
    if at_once != "auto" and not (type(at_once) is int and at_once > 0):
        raise SaefeatError(
            f'Attribute: `steps_at_once` is {at_once!r}, wanted "auto", or a number from 1. Try:'
            " attribute(model, prompts, steps_at_once=4)"
        )


def _attribute(
    job: Job, passes: SitePasses, batch: Batch, other: Batch | None, at_once: AtOnce
) -> tuple[Attribution, Receipt]:
    """One batch's scores, and what the baseline's edits did."""
    nodes = job.method.nodes()
    # A path that starts at zero has the clean pass for its first node.
    gradient = passes.written if nodes and nodes[0][0] == 0.0 else ()
    path = begin(job, passes, batch, other, at_once, gradient)
    with torch.no_grad():  # now, so that what is no metric is refused before it costs passes
        values = path.metric(path.clean, batch)
    slopes, convergence = mean_gradients(path) if nodes else ({}, None)
    with torch.no_grad():
        clean, of_parts = path.clean, (passes.parts, path.scored, path.targets)
        if nodes:
            rows, dropped = read_out(*of_parts, clean.values, slopes, clean.view, job.keep)
        else:
            rows, dropped = effects(path), None
        columns = joined(rows, batch.numbers)
        scored = torch.stack(path.scored).any(0).cpu()
        scores = Attribution(
            tuple(part.dictionary for part in passes.parts),
            *columns,
            clean=_finite(values, batch, "clean"),
            baseline=_finite(path.metric(path.baseline, path.other), batch, "baseline"),
            tokens=scored.sum(1),
            scored=scored[batch.inputs["attention_mask"].bool()],
            ends=_metric_by_site(path) if job.one_site else None,
            dropped=dropped,
            convergence=convergence,
        )
    _require_slope(job, slopes, scores)
    return scores, path.baseline.receipt


def _require_slope(job: Job, slopes: dict[int, Tensor], scores: Attribution) -> None:
    """Refuse gradients that are zero everywhere for a metric that moves: they read as no effect."""
    if not slopes:
        return
    sloped = torch.stack([slope.flatten(1).any(1).cpu() for slope in slopes.values()]).any(0)
    change = (scores.baseline - scores.clean).abs()
    flat = (change > 1e-5 * (1 + scores.clean.abs())) & ~sloped
    if bool(flat.any()):
        raise GradientError(
            f"Attribute: `metric` is {job.metric!r}, whose gradient is zero at every site while it"
            f" changes by {float(change[flat].max()):.3g} to the baseline, wanted a gradient that"
            " tells of it. Likely cause: a threshold or a saturated value in the metric, or a"
            " kernel without a gradient. Try: method=IG(8, 'midpoint'), which looks between the"
            " two; or Exact() for few latents"
        )


def _metric_by_site(path: Path) -> Tensor:
    """[b, dictionaries]: the metric with each dictionary's written site alone at the baseline."""
    by_place = {n: _finite(value, path.batch, "baseline") for n, value in path.alone.items()}
    return torch.stack([by_place[part.writes[0]] for part in path.passes.parts], 1)


def _finite(values: Tensor, batch: Batch, run: str) -> Tensor:
    return require_finite("Attribute", values, batch.numbers, run, GradientError)


# ---------------------------------------------------------------- batches kept and joined

_ALWAYS = (
    *("prompt", "dictionary", "position", "latent", "score", "activation", "change"),
    *("clean", "baseline", "tokens"),
)
_SOMETIMES = ("ends", "dropped", "scored")


def _identity(
    job: Job, model: TransformersModel, prepared: Prepared, batch_size: int, on: Server | None
) -> dict[str, Any]:
    """Everything that scores depend on; how many nodes share a pass is not among it."""
    names = ("metric", "baseline", "method", "where", "semantics", "one_site", "backward", "keep")
    return {
        **(model_identity(model) if on is None else remote_identity(model, on.remote)),
        "target": digest(job.target),
        **{name: digest(getattr(job, name)) for name in names},
        "prompts": digest(prepared.data, prepared.others),
        "batch_size": batch_size,
    }


def _plain(
    piece: Attribution, receipt: Receipt, there: Sequence[dict[str, str]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A batch's scores as tensors; its receipt and where it was made as plain data."""
    names = [name for name in (*_ALWAYS, *_SOMETIMES) if getattr(piece, name) is not None]
    rows = [row.counts() for row in receipt.rows]
    tensors = {name: getattr(piece, name) for name in names}
    tensors |= {} if piece.convergence is None else piece.convergence.tensors()
    return tensors, {"passes": receipt.passes, "rows": rows, "where": list(there)}


def _restored(
    saved: tuple[dict[str, Any], dict[str, Any]], passes: SitePasses, job: Job
) -> tuple[Attribution, Receipt]:
    tensors, meta = saved
    for there in meta["where"]:
        passes.heard(there)
    convergence = taken(tensors, tolerance_of(job.method))
    parts = tuple(part.dictionary for part in passes.parts)
    piece = Attribution(parts, **tensors, convergence=convergence)
    return piece, Receipt(tuple(map(Fired.counted, meta["rows"])), meta["passes"])


def _join(pieces: Sequence[Attribution]) -> Attribution:
    """Batches of prompts as one result; prompts are renumbered in order."""
    starts = torch.tensor([0] + [len(piece.tokens) for piece in pieces]).cumsum(0)
    columns: dict[str, Any] = {}
    for name in (*_ALWAYS, *_SOMETIMES):
        values = [getattr(piece, name) for piece in pieces]
        if name == "prompt":
            values = [column + start for column, start in zip(values, starts, strict=False)]
        columns[name] = None if any(column is None for column in values) else torch.cat(values)
    convergence = settled([piece.convergence for piece in pieces])
    return Attribution(pieces[0].dictionaries, **columns, convergence=convergence)
