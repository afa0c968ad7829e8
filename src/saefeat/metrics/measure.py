"""measure: a metric under an intervention, without attributing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attribution.passes import NOTHING, Watch
from ..attribution.prepare import Data, continued
from ..checks import one_a_prompt, whole
from ..dictionaries.latents import Latents
from ..errors import PromptError, SaefeatError
from ..text.prompts import Prompts, encode_prompts
from ..verbs.base import Intervention, require_fired, require_rows
from .base import Metric


def measure(
    model: Any,
    prompts: Prompts,
    metric: Metric,
    intervention: Intervention | None = None,
    *,
    batch_size: int = 32,
) -> Tensor:
    """Any metric of ``Attribute``, read off a run: what an attribution is to be checked against.

    Args:
        model: an nnsight ``TransformersModel``.
        prompts: strings, chats or token ids.
        metric: what to measure. ``BASELINE_TOP`` stands for the run's own most likely token,
            ``kl("clean")`` compares with the run without the intervention.
        intervention: what to apply; None runs the bare model.
        batch_size: prompts a batch.

    Returns:
        [prompts] float32, on the CPU.

    Raises:
        PromptError: for values made for another number of prompts.
        SaefeatError: for a metric that compares with a baseline run, of which there is none.
        FiringError: if an edit selected no token in the whole run.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> metric = sf.metrics.log_prob([5, 6])
        >>> sf.metrics.measure(model, ["hello", "how do i bake bread"], metric).shape
        torch.Size([2])
    """
    whole("measure", "batch_size", batch_size, error=PromptError)
    chosen = NOTHING if intervention is None else intervention
    tokenizer = getattr(model, "tokenizer", None)
    inputs, lengths = encode_prompts(tokenizer, prompts), None
    _require(metric, len(inputs["input_ids"]))
    require_rows(chosen, len(inputs["input_ids"]))
    if metric.continuation is not None:
        inputs, lengths = continued(tokenizer, inputs, metric.continuation(tokenizer))
    watch, found, receipts = Watch(Latents(()), model, metric), [], []
    with torch.no_grad():
        for batch, _ in Data(inputs, lengths).batches(batch_size):
            here = watch.run(batch, chosen)
            clean = watch.run(batch) if metric.reference == "clean" else here
            found.append(watch.read(batch, here, clean.last, here.last).float().cpu())
            receipts.append(here.receipt)
    require_fired(sum(receipts[1:], receipts[0]), "measure")
    return torch.cat(found)


def _require(metric: Metric, prompts: int) -> None:
    one_a_prompt("measure", "metric", metric.prompts, prompts)
    if metric.reference == "baseline":
        raise SaefeatError(
            f"measure: `metric` is {metric!r}, wanted a metric that needs no baseline run. Likely"
            ' cause: a metric made for Attribute(..., baseline=...). Try: kl("clean"), or'
            " kl(logits)"
        )
