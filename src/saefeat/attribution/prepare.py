"""What an attribution is asked: checks that need no run, and the prompts in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import gradients_on, one_a_prompt
from ..errors import FiringError, GradientError, SaefeatError
from ..metrics.batches import Batch, Data, continued, metric_data
from ..text.prompts import Prompts, encode_prompts
from ..verbs.base import Intervention, require_rows
from .baselines import Fixed, Paired, require_pairs
from .job import Job
from .path import Path
from .semantics import SEMANTICS

if TYPE_CHECKING:
    from nnsight import TransformersModel


class Prepared(NamedTuple):
    """Encoded prompts, and those they are paired with."""

    data: Data
    others: Data | None = None

    def batches(self, size: int) -> list[tuple[Batch, Batch | None]]:
        """At most ``size`` prompts each, with their pairs."""
        batches = self.data.batches(size)
        if self.others is None:
            return [(batch, None) for batch in batches]
        return list(zip(batches, self.others.batches(size), strict=True))


def prepare(job: Job, model: TransformersModel, prompts: Prompts) -> Prepared:
    """Prompts encoded, continued where the metric wants it, and checked against what is per prompt.

    Raises:
        PromptError: for prompts that cannot be encoded, or another number of values or pairs.
    """
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
    """Refuse values made for another number of prompts.

    Raises:
        PromptError: naming both numbers.
    """
    one_a_prompt("Attribute", "metric", job.metric.prompts, count)
    if isinstance(job.baseline, Fixed):
        one_a_prompt("Attribute", "baseline", job.baseline.prompts, count)


def require_gradients(module: nn.Module) -> None:
    """Refuse where there are no gradients, which would read as "no effect".

    Raises:
        GradientError: with gradients switched off, tensors of inference mode, or no weights.
    """
    gradients_on("Attribute")
    got = cause = call = ""
    first = next(iter(module.parameters()), torch.zeros(0))
    if first.is_meta:
        got, cause = "a model without weights", "a model meant for remote runs, or not yet loaded"
        call = "TransformersModel(..., dispatch=True), or method=FiniteDifference()"
    elif any(p.is_inference() for p in module.parameters()):
        got = "a model of inference tensors"
        cause = "it was loaded or moved under torch.inference_mode()"
        call = "load the model outside torch.inference_mode()"
    if got:
        raise GradientError(
            f"Attribute: `model` is {got}, wanted weights that gradients can pass. Likely cause:"
            f" {cause}. Try: {call}"
        )


def require_scored(tokens: Tensor, function: str) -> None:
    """Refuse a result in which no token was scored: it would read as "no effect".

    ``tokens`` [prompts] are the counts.

    Raises:
        FiringError: for none in any prompt.
    """
    if bool(tokens.any()):
        return
    raise FiringError(
        f"{function}: `where` is a rule that selects no token in any of {len(tokens)} prompts,"
        " wanted at least one token to score. Likely cause: ids or a role these prompts lack,"
        " or tokens the dictionary was not trained on. Try: where=Tokens.all(), or"
        " Texts.select(rule) to see what a rule selects"
    )


LARGE = 1 << 26
"""Logits of a metric that reads every token may be gigabytes: more than these are not copied."""


def require_apart(path: Path) -> None:
    """Refuse a metric whose number for one prompt depends on another of its batch.

    Its shape is right, and a batch's gradient would still be no prompt's own. It is asked of the
    first and the last prompt of the first batch, unless its logits are ``LARGE``.

    Raises:
        GradientError: for such a metric.
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
        slopes = [
            torch.autograd.grad(
                one, list(leaves.values()), materialize_grads=True, retain_graph=True
            )
            for one in (values[0], values[-1])
        ]
    crossed = [x for a, b in zip(*slopes, strict=True) for x in (a[1:], b[:-1])]
    if any(bool(x.nan_to_num(0.0, 0.0, 0.0).any()) for x in crossed):  # NaN is refused by name
        raise GradientError(
            f"Attribute: `metric` is {path.passes.evaluator.metric!r}, whose number for one prompt"
            " depends on another prompt, wanted each prompt's own number, whatever its batch."
            " Likely cause: a mean, a sum or a normalization over the first dimension, the prompts."
            " Try: metric(lambda logits: logits.softmax(-1)[:, 5]), or batch_size=1"
        )


def require_finite_scores(columns: Sequence[Tensor], numbers: Tensor) -> None:
    """Refuse scores that are NaN or infinite: NaN would be ranked above every number.

    ``columns`` are an attribution's first seven after its dictionaries.

    Raises:
        GradientError: naming the first such prompt.
    """
    bad = ~torch.stack([column.isfinite() for column in columns[4:]]).all(0)
    if not bool(bad.any()):
        return
    prompt = int(numbers[columns[0][bad][0]])
    raise GradientError(
        f"Attribute: `metric` is without a finite gradient or effect for {int(bad.sum())} of"
        f" {len(bad)} scores, first in prompt {prompt}, wanted finite gradients, and finite metrics"
        " of moved latents. Likely cause: a square root or logarithm at zero in the metric, or a"
        " float16 model whose gradients overflow. Try: a metric that is smooth at the clean run, or"
        " the model in bfloat16 or float32"
    )


def require_sense(job: Job) -> None:
    """Refuse combinations that would not mean what they say.

    Raises:
        SaefeatError, GradientError: naming the two that do not go together.
    """
    for bad, parameter, got, wanted in _nonsense(job):
        if bad:
            raise SaefeatError(
                f"Attribute: `{parameter}` is {got}, wanted {wanted}. Likely cause: two settings"
                " that exclude each other. Try: leave one of them at its default"
            )
    if job.metric.flat and job.at_clean_alone:
        raise GradientError(
            f"Attribute: `metric` is {job.metric!r} with {job.method!r}, wanted a method that looks"
            " beyond the clean run. Likely cause: a divergence from the clean run has no slope"
            " there: every score would be 0. Try: method=IG(8, 'midpoint') or Exact()"
        )


def _nonsense(job: Job) -> Iterator[tuple[bool, str, str, str]]:
    """(wrong, parameter, got, wanted) of each combination."""
    gradients, keep = bool(job.method.nodes()), job.keep
    plain = job.semantics == "pass_through"
    named = f"{job.method!r}"
    yield job.semantics not in SEMANTICS, "semantics", repr(job.semantics), " or ".join(SEMANTICS)
    bare = plain and job.backward is None and not job.one_site
    got, wanted = f"{named} with semantics, backward or one_site", "a method that takes gradients"
    yield not gradients and not bare, "method", got, wanted
    got = f"{job.backward!r} with semantics={job.semantics!r}"
    yield not plain and job.backward is not None, "backward", got, "one of the two"
    published = getattr(job.method, "endpoint", "") == "as_published"
    got, wanted = f"{named} with baseline={job.baseline!r:.60}", "an intervention as the baseline"
    yield published and not isinstance(job.baseline, Intervention), "method", got, wanted
    fits = keep is None or (gradients and type(keep) is int and keep > 0)
    yield not fits, "keep", f"{keep!r} with {named}", "at least 1, and a method with gradients"
