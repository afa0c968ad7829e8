"""measure: a metric under an intervention, without attributing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import whole
from ..errors import PromptError, SaefeatError
from ..results.receipt import join_receipts
from ..text.prompts import Prompts
from ..verbs.base import Intervention, require_fired, require_rows
from .base import Metric
from .batches import metric_data
from .evaluator import NOTHING, Evaluator, References

if TYPE_CHECKING:
    from nnsight import TransformersModel


def measure(
    model: TransformersModel,
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
    edit = NOTHING if intervention is None else intervention
    data = metric_data("measure", model, prompts, metric)
    _require_no_baseline(metric)
    require_rows(edit, data.prompts)
    evaluator, values, receipts = Evaluator(model, metric), [], []
    for batch in data.batches(batch_size):
        run = evaluator.run(batch, edit)
        clean = evaluator.run(batch) if metric.reference == "clean" else run
        references = References(run.last.argmax(-1), clean.last, run.last)
        with torch.no_grad():
            values.append(evaluator.read(run, batch.numbers, references).float().cpu())
        receipts.append(run.receipt)
    require_fired(join_receipts(receipts), "measure")
    return torch.cat(values)


def _require_no_baseline(metric: Metric) -> None:
    if metric.reference == "baseline":
        raise SaefeatError(
            f"measure: `metric` is {metric!r}, wanted a metric that needs no baseline run. Likely"
            ' cause: a metric made for Attribute(..., baseline=...). Try: kl("clean"), or'
            " kl(logits)"
        )
