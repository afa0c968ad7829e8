"""What an audit asks of its arguments, and of the scores it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attribution.passes import require_upstream
from ..attribution.scores import Attribution
from ..dictionaries.latents import Latents, as_latents
from ..errors import GradientError, LatentError, PromptError, SaefeatError
from ..metrics.base import Metric
from ..model.route import route

if TYPE_CHECKING:
    from .bench import Bench


def require(where: str, **given: tuple[Any, int]) -> None:
    """Whole numbers from a least value on."""
    for name, (number, least) in given.items():
        if type(number) is not int or number < least:
            raise SaefeatError(
                f"{where}: `{name}` is {number!r}, wanted an integer from {least}. Try:"
                f" {where}(..., {name}={max(least, 8)})"
            )


def require_several(latents: object, where: str, least: int) -> Latents:
    """Latents, at least so many."""
    found = as_latents(latents, where)
    if len(found) >= least:
        return found
    raise LatentError(
        f"{where}: `latents` is {found!r}, wanted at least {least}. Likely cause: a search that"
        " found too few. Try: scores.top(20)"
    )


def require_upstream_of(metric: Metric, model: Any, latents: Latents, where: str) -> None:
    """Refuse latents that the metric's own site does not depend on.

    Raises:
        SiteError: naming the first such site.
    """
    if metric.site is not None:
        written: list[Any] = [basis.write_site for basis, _ in latents.parts]  # type: ignore[attr-defined]
        require_upstream(where, metric, written, route(model, [metric.site, *written]))


def require_same(bench: Bench, clean: Tensor, scores: Attribution) -> None:
    """Refuse scores of other prompts, another metric or another model.

    Raises:
        PromptError: naming what differs.
    """
    remembered = scores.clean
    same = clean.shape == remembered.shape and _same_texts(bench, scores)
    # bfloat16 models move by a percent when rows are batched otherwise
    floats = (p for p in bench.watch.module.parameters() if p.is_floating_point())
    first = next(floats, clean)
    share = 2e-3 if torch.finfo(first.dtype).bits > 16 else 2e-2
    slack = share * (1 + float(remembered.abs().max())) if same else 0.0
    if same and bool(((clean - remembered).abs() <= slack).all()):
        return
    raise PromptError(
        f"{bench.where}: `scores` is of {len(remembered)} prompts with a mean metric of"
        f" {remembered.mean():.3f}, wanted scores of these {len(clean)} prompts, whose metric is"
        f" {clean.mean():.3f}. Likely cause: other prompts, another order, another metric or"
        " another model. Try: scores = attribute(model, prompts), and the same three here"
    )


def _same_texts(bench: Bench, scores: Attribution) -> bool:
    """Whether scores are of the bench's own tokens; true where they do not know theirs."""
    inputs = bench.data.inputs
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    ids = tuple(tuple(row[real].tolist()) for row, real in rows)
    return scores.texts is None or scores.texts.ids == ids


def require_gradients(where: str) -> None:
    """Refuse a context in which nothing has a gradient.

    Raises:
        GradientError: under ``torch.no_grad`` or ``torch.inference_mode``.
    """
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return
    raise GradientError(
        f"{where}: `context` is gradients switched off, wanted torch.is_grad_enabled(). Likely"
        " cause: a surrounding torch.no_grad() or torch.inference_mode(). Try: with"
        f" torch.enable_grad(): {where}(...)"
    )
