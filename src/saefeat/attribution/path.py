"""The path of one batch from clean to baseline: the metric at its ends, gradients along it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import GradientError, SaefeatError
from ..metrics.batches import Batch
from ..metrics.evaluator import Pass, References
from .endpoint import Endpoint
from .methods import Method
from .passes import SitePass, SitePasses

ON_CPU, ELSEWHERE = 128, 8192
"""Tokens a pass, when nobody says: a CPU gains nothing from more, a GPU would stand idle."""

AtOnce = str | int


def require_at_once(wanted: AtOnce) -> None:
    """Refuse anything but ``"auto"`` or a number from 1.

    Raises:
        SaefeatError: for anything else.
    """
    if wanted == "auto" or (type(wanted) is int and wanted > 0):
        return
    raise SaefeatError(
        f'Attribute: `steps_at_once` is {wanted!r}, wanted "auto", or a number from 1. Try:'
        " attribute(model, prompts, steps_at_once=4)"
    )


class Path(NamedTuple):
    """One batch under way: its clean run, its endpoint, and how the way between is taken."""

    passes: SitePasses
    method: Method
    batch: Batch
    clean: SitePass
    end: Endpoint
    at_once: AtOnce

    def metric(self, run: Pass, batch: Batch, rows: Tensor | slice = slice(None)) -> Tensor:
        """The metric of a pass over some rows of the batch, [rows]."""
        base = self.baseline_logits(rows)
        top = None if base is None else base.argmax(-1)
        references = References(top, self.clean.last[rows], base)
        return self.passes.evaluator.read(run, batch.numbers, references)

    def metric_at_clean(self) -> Tensor:
        """The metric in the clean run, [b]."""
        return self.metric(self.clean, self.batch)

    def metric_at_baseline(self) -> Tensor:
        """The metric in the baseline run, [b]."""
        return self.metric(self.end.run, self.end.batch)

    def baseline_logits(self, rows: Tensor | slice = slice(None)) -> Tensor | None:
        """The baseline run's last logits [rows, vocabulary], if the metric asks for them."""
        return self.end.run.last[rows] if self.passes.evaluator.metric.needs_baseline else None

    @property
    def copies(self) -> int:
        """How many copies of the batch share a pass."""
        if isinstance(self.at_once, int):
            return self.at_once
        budget = ON_CPU if self.clean.logits.device.type == "cpu" else ELSEWHERE
        return max(1, budget // self.batch.tokens)

    def mean_gradients(self, one_site: bool) -> dict[int, Tensor]:
        """The metric's gradient at each written place [b, t, d], averaged over the path.

        With ``one_site`` each place has a path of its own, on which nothing else is moved.
        """
        total: dict[int, Tensor] = {}
        nodes = list(self.method.nodes())
        if nodes[0][0] == 0.0:  # the clean pass is the node at zero, for every site
            weight = nodes.pop(0)[1]
            _add(total, gradients(self.metric_at_clean(), self.clean, self.passes), weight)
            self.clean.nodes.clear()  # one graph at a time
        written = list(self.passes.written)
        for group in [[number] for number in written] if one_site else [written]:
            for first in range(0, len(nodes), self.copies):
                some = nodes[first : first + self.copies]
                for n, slopes in self._slopes(some, group).items():
                    for (_, weight), one in zip(some, slopes, strict=True):
                        _add(total, {n: one}, weight)
        return total

    def _slopes(
        self, nodes: Sequence[tuple[float, float]], group: Sequence[int]
    ) -> dict[int, Tensor]:
        """[nodes, b, t, d]: gradients at several nodes in one pass, as copies of the batch."""
        rows = torch.arange(len(self.batch.numbers)).repeat(len(nodes))
        share = torch.tensor([alpha for alpha, _ in nodes], dtype=torch.float64)
        share = share.repeat_interleave(len(self.batch.numbers))
        targets = {n: self.end.values[n].repeat(len(nodes), 1, 1) for n in group}
        many = self.batch.take(rows)
        run = self.passes.run(
            many, gradient=group, targets=targets, share=share[:, None, None], copy=False
        )
        slopes = gradients(self.metric(run, many, rows), run, self.passes)
        return {n: slope.unflatten(0, (len(nodes), -1)) for n, slope in slopes.items()}


def _add(total: dict[int, Tensor], slopes: dict[int, Tensor], weight: float) -> None:
    """Sums in at least float32: in bfloat16 a mean of 200 gradients is wrong by several percent."""
    for number, slope in slopes.items():
        part = weight * slope.to(torch.promote_types(slope.dtype, torch.float32))
        total[number] = part if number not in total else total[number].add_(part)


def gradients(values: Tensor, run: SitePass, passes: SitePasses) -> dict[int, Tensor]:
    """∂(Σ metric)/∂x at each node; prompts do not mix, so rows are the prompts' own.

    Raises:
        GradientError: for a metric that is not one differentiable number a prompt.
    """
    if values.shape != run.logits.shape[:1] or not values.requires_grad:
        raise GradientError(
            f"Attribute: `metric` is of shape {tuple(values.shape)},"
            f" requires_grad={values.requires_grad}, wanted one differentiable number a prompt,"
            " [batch]. Likely cause: an argmax, a detach or a mean over prompts inside the metric."
            " Try: metric(lambda logits: logits[:, 5])"
        )
    return run.slopes(values.sum(), run.nodes, passes.written)
