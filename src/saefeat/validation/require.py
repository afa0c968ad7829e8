"""What the searches over latents ask of the latents they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dictionaries.latents import Latents, as_latents
from ..errors import LatentError
from ..metrics.base import Metric
from ..metrics.evaluator import Evaluator

if TYPE_CHECKING:
    from nnsight import TransformersModel


def require_several(latents: object, function: str, least: int) -> Latents:
    """Latents, at least so many."""
    chosen = as_latents(latents, function)
    if len(chosen) >= least:
        return chosen
    raise LatentError(
        f"{function}: `latents` is {chosen!r}, wanted at least {least}. Likely cause: a search that"
        " found too few. Try: scores.top(20)"
    )


def require_upstream_of(
    metric: Metric, model: TransformersModel, latents: Latents, function: str
) -> None:
    """Refuse latents that the metric's own site does not depend on.

    Raises:
        SiteError: naming the first such site.
    """
    if metric.site is not None:
        written = [basis.write_site for basis, _ in latents.parts]
        Evaluator(model, metric, written).require_upstream(function, written)
