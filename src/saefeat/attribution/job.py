"""What an attribution is asked: its settings as plain values, what they exclude, its prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import gradients_on, one_a_prompt, whole
from ..dictionaries.latents import Latents
from ..errors import FiringError, GradientError, LatentError, PromptError, SaefeatError
from ..metrics.base import Metric
from ..metrics.evaluator import Batch, Data, continued, metric_data
from ..text.prompts import Prompts, encode_prompts
from ..text.tokens import Tokens
from ..verbs.base import Intervention, require_rows
from .baselines import Baseline, Fixed, Paired, require_pairs
from .methods import Backward, Method

if TYPE_CHECKING:
    from nnsight import TransformersModel

SEMANTICS = ("pass_through", "through_sae")
AtOnce = str | int


class Job(NamedTuple):
    """The fields of an ``Attribute``, which documents them, with its target as latents."""

    target: Latents
    metric: Metric
    baseline: Baseline
    method: Method
    where: Tokens | None
    semantics: str
    one_site: bool
    backward: Backward | None
    keep: int | None

    @property
    def at_clean_alone(self) -> bool:
        """Whether the one gradient taken is that of the clean run."""
        return [alpha for alpha, _ in self.method.nodes()] == [0.0]

    @property
    def as_published(self) -> bool:
        """Whether the path ends before the baseline's own edits, as in the refusal paper's code."""
        return getattr(self.method, "endpoint", "") == "as_published"


class Prepared(NamedTuple):
    """Encoded prompts, and those they are paired with."""

    data: Data
    others: Data | None = None

    def batches(self, size: int) -> list[tuple[Batch, Batch | None]]:
        """At most ``size`` prompts each, with their pairs."""
        batches = self.data.batches(size)
        others = [None] * len(batches) if self.others is None else self.others.batches(size)
        return list(zip(batches, others, strict=True))


def prepare(job: Job, model: TransformersModel, prompts: Prompts) -> Prepared:
    """Prompts encoded, continued where the metric wants it, and as many as values are made for."""
    data = metric_data("Attribute", model, prompts, job.metric)
    require_count(job, data.prompts)
    if isinstance(job.baseline, Intervention):
        require_rows(job.baseline, data.prompts)
    if not isinstance(job.baseline, Paired):
        return Prepared(data)
    tokenizer = getattr(model, "tokenizer", None)
    others = encode_prompts(tokenizer, job.baseline.prompts)
    require_pairs(job.baseline, data.prompts, len(others["input_ids"]))
    return Prepared(data, continued(tokenizer, others, job.metric))


def require_count(job: Job, count: int) -> None:
    """Refuse values made for another number of prompts."""
    one_a_prompt("Attribute", "metric", job.metric.prompts, count)
    if isinstance(job.baseline, Fixed):
        one_a_prompt("Attribute", "baseline", job.baseline.prompts, count)


def require_sense(job: Job) -> None:
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


def require_sizes(job: Job, batch_size: int, at_once: AtOnce) -> None:
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


def require_gradients(module: nn.Module) -> None:
    """Refuse where there are no gradients, which would read as "no effect"."""
    gradients_on("Attribute")
    first = next(iter(module.parameters()), torch.zeros(0))
    if first.is_meta:
        got, cause = "a model without weights", "a model meant for remote runs, or not yet loaded"
        call = "TransformersModel(..., dispatch=True), or method=FiniteDifference()"
    elif any(p.is_inference() for p in module.parameters()):
        got = "a model of inference tensors"
        cause = "it was loaded or moved under torch.inference_mode()"
        call = "load the model outside torch.inference_mode()"
    else:
        return
    raise GradientError(
        f"Attribute: `model` is {got}, wanted weights that gradients can pass. Likely cause:"
        f" {cause}. Try: {call}"
    )


def require_scored(tokens: Tensor, function: str) -> None:
    """Refuse a result in which no token was scored: it would read as "no effect".

    ``tokens`` [prompts] are the counts.
    """
    if not bool(tokens.any()):
        raise FiringError(
            f"{function}: `where` is a rule that selects no token in any of {len(tokens)} prompts,"
            " wanted at least one token to score. Likely cause: ids or a role these prompts lack,"
            " or tokens the dictionary was not trained on. Try: where=Tokens.all(), or"
            " Texts.select(rule) to see what a rule selects"
        )
