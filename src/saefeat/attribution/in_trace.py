"""Attribution inside a trace of the user's own: watch the sites, then read scores of any metric."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor

from ..checks import gradients_on, one_a_prompt
from ..errors import GradientError, SaefeatError
from ..kernel.program import generating, whole_run
from ..kernel.state import Log
from ..metrics.evaluator import NOTHING, Pass, References, require_finite
from ..model.modules import require_tracing, takes_logits_to_keep, torch_module
from ..model.wrappers import root
from ..results.receipt import Receipt
from ..text.texts import texts_of
from ..verbs.base import Intervention
from ..verbs.lower import lower
from .baselines import Fixed
from .convergence import Convergence, of_one_node
from .crossing import crossed_now
from .methods import AtP, plain_slopes
from .passes import Job, SitePasses, require_scored, source
from .path import joined, read_out, target_of
from .scores import Attribution

if TYPE_CHECKING:
    from nnsight import TransformersModel


@final
@dataclass(frozen=True, repr=False)
class Watching:
    """Sites being watched in a trace; made by ``Attribute.watch``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> with model.trace("hello"):
        ...     watching = sf.Attribute(saes, sf.metrics.logit(5)).watch(model)
        ...     last = model.output.logits[:, -1].log_softmax(-1)
        ...     scores = nnsight.save(watching.scores(-(last.exp() * last).sum(-1)))
        >>> scores.clean.shape
        torch.Size([1])
    """

    job: Job
    passes: SitePasses
    log: Log
    looking: ExitStack  # at modules that gradients do not cross, until scores are read

    def scores(self, values: Tensor) -> Attribution:
        """The scores of a metric computed from this trace.

        Args:
            values: one number a prompt of this invoke [b], computed from anything behind the
                watched sites; or logits [b, t, vocabulary], to which the ``Attribute``'s own
                metric is applied.

        Returns:
            An ``Attribution`` on the CPU, to be kept with ``nnsight.save``. Its ``baseline`` is
            NaN, since no baseline run is made, and it has no gap. It knows the invoke's tokens;
            ``metric`` is the ``Attribute``'s own for logits, and "values of the trace" otherwise.

        Raises:
            GradientError: for values without a gradient at the watched sites.
        """
        self.looking.close()
        view, job = self.log.view, self.job
        rows = torch.arange(len(view.real))
        one_a_prompt("Attribute", "metric", job.metric.prompts, len(rows))
        if isinstance(job.baseline, Fixed):
            one_a_prompt("Attribute", "baseline", job.baseline.prompts, len(rows))
        name = "values of the trace"
        if values.ndim == 3:
            run = Pass(values, None, view, Receipt((), 1))
            values, name = self.passes.evaluator.read(run, rows, References()), repr(job.metric)
        slopes = self._slopes(values)
        with torch.no_grad():
            masks = self.passes.scored(view)
            parts, kept = self.passes.parts, self.log.kept
            targets = [
                target_of(job.baseline, part, mask.nonzero()[:, 0])
                for part, mask in zip(parts, masks, strict=True)
            ]
            found, dropped = read_out(parts, masks, targets, kept, slopes, view, job.keep)
            clean = require_finite("Watching.scores", values.detach(), rows, "clean", GradientError)
            columns = joined(found, rows)
            chosen = torch.stack(masks).any(0)
            require_scored(chosen.sum(1), "Watching.scores")
            texts = None  # the model was given embeddings
            if view.ids is not None:
                batch = {"input_ids": view.ids.cpu(), "attention_mask": view.real.cpu()}
                texts = texts_of(self.passes.evaluator.model, batch)
            return Attribution(
                tuple(part.dictionary for part in parts),
                *columns,
                clean=clean,
                baseline=torch.full_like(clean, torch.nan),
                tokens=chosen.sum(1).cpu(),
                dropped=dropped,
                scored=None if texts is None else chosen[view.real].cpu(),
                texts=texts,
                metric=name,
                provenance=source(job, self.passes.evaluator.model),
                convergence=self._convergence(len(rows)),
            )

    def _convergence(self, prompts: int) -> Convergence | None:
        one = isinstance(self.job.method, AtP)
        return None if one else of_one_node(prompts, len(self.passes.parts))

    def _slopes(self, values: Tensor) -> dict[int, Tensor]:
        rows = len(self.log.view.real)
        why = "without a gradient"
        if values.shape == (rows,) and values.requires_grad:
            nodes = dict(sorted(self.log.nodes.items()))
            # Powers of two scale exactly: a row's own slope is its share of the plain one, unless
            # another row's number reaches it.
            share = 0.5 ** (torch.arange(rows, device=values.device) % 3)
            total = (values * share.to(values.dtype)).sum()
            slopes = torch.autograd.grad(
                total, list(nodes.values()), retain_graph=True, allow_unused=True
            )
            if any(slope is not None for slope in slopes):
                plain = plain_slopes(values.sum(), self.log.nodes, {}, keep=True)
                _require_own(share, dict(zip(nodes, slopes, strict=True)), plain)
                return plain
            why = "which no watched site reaches"
        raise GradientError(
            f"Watching.scores: `values` is of shape {tuple(values.shape)}, {why}, wanted one"
            f" differentiable number a prompt, [{rows}]. Likely cause: an argmax or mean over"
            " prompts, values of another invoke, or a site read before the watched ones. Try:"
            " watching.scores(model.output.logits[:, -1, token])"
        )

    def __repr__(self) -> str:
        return f"Watching({self.job!r})"


def _require_own(
    share: Tensor, shared: Mapping[int, Tensor | None], plain: Mapping[int, Tensor]
) -> None:
    """Refuse values whose slopes, each row's number times its share, are not the plain ones so."""
    for number, found in shared.items():
        if found is None:
            continue
        slope = plain[number]
        wanted = slope * share.to(slope).view(-1, *[1] * (slope.ndim - 1))
        off = (found - wanted).abs().nan_to_num(0.0, 0.0, 0.0).amax()
        if float(off) > 0.01 * float(found.abs().nan_to_num(0.0, 0.0, 0.0).amax()):
            raise GradientError(
                "Watching.scores: `values` is of numbers that depend on other prompts, wanted each"
                " prompt's own. Likely cause: a mean, sum or normalization over the prompts. Try:"
                " watching.scores(model.output.logits[:, -1, token])"
            )


def watch(job: Job, model: TransformersModel, intervention: Intervention | None) -> Watching:
    """Put the watched sites into the user's trace, behind an intervention's edits."""
    _require_one_pass(job)
    require_tracing("Attribute.watch", model)
    gradients_on("Attribute", torch_module(model))
    # A generation runs without gradients and passes the sites many times.
    with suppress(OutOfOrderError):  # ``whole_run`` says what to do
        inputs = root(model).inputs  # from here on the model's own gradient mode holds
        if generating(takes_logits_to_keep(torch_module(model)), inputs[1]):
            raise GradientError(
                "Attribute.watch: `model` is in a generation, wanted a trace. Likely cause: it"
                " has no gradients. Try: model.trace(prompt + completion), or log_prob outside"
            )
    passes = SitePasses(job, model)
    way = passes.evaluator.route_with(intervention or NOTHING)
    program, log = lower(intervention or NOTHING, model, way=way), Log()
    # What came before the first site stays in the user's graph.
    program = passes.watched(program, way, passes.written, detach=False)
    whole_run(root(model), program, log, None)
    looking = crossed_now("Attribute.watch", torch_module(model), log)
    return Watching(job, passes, log, looking)


def _require_one_pass(job: Job) -> None:
    metric = job.metric
    wrong = (
        (not job.at_clean_alone, "method", job.method, "AtP()"),
        (job.baseline is not None and not isinstance(job.baseline, Fixed), "baseline", job.baseline,
         "None or Fixed(...)"),
        (job.backward is not None, "backward", job.backward, "None"),
        (job.one_site, "one_site", job.one_site, "False"),
        (metric.site is not None or metric.continuation is not None or metric.reference, "metric",
         metric, "a metric of this trace's logits, or values of your own"),
    )  # fmt: skip
    for bad, parameter, got, wanted in wrong:
        if bad:
            raise SaefeatError(
                f"Attribute.watch: `{parameter}` is {got!r}, wanted {wanted} inside a trace. Likely"
                " cause: a trace is one pass, and this takes others. Try: attribute(model,"
                " prompts), outside the trace"
            )
