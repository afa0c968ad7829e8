"""audit: a fixed budget of exact ablations, over the top of an attribution and a random tail."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attribution.attribute import Attribute
from ..attribution.columns import require
from ..attribution.scores import Attribution
from ..checks import wholes
from ..errors import SaefeatError
from ..text.prompts import Prompts
from .audited import Audit
from .effects import effects, require_movable
from .experiment import Experiment, Folder
from .ranking import by_prompt, ranking

if TYPE_CHECKING:
    from nnsight import TransformersModel


def audit(
    attribute: Attribute,
    model: TransformersModel,
    prompts: Prompts,
    scores: Attribution,
    *,
    k: int | None = None,
    budget: int = 64,
    seed: int = 0,
    batch_size: int = 32,
    checkpoint: Folder = None,
    progress: bool = False,
) -> Audit:
    """Check an attribution by moving latents for real.

    The k latents with the largest estimates, of either sign, are all checked. The rest of the
    budget goes to the tail: all other latents that moved (a latent that never moved has no
    effect). The tail is cut by rank into strata, each twice the size of the one before it, and
    each gives as many latents, drawn at random; so most is spent where misses are likely.

    Every (prompt, latent) pair in which the latent moved is one row of a batch: at most
    ``budget`` x prompts rows, each one forward pass of the bare model over its prompt.

    Args:
        attribute: the verb that made the scores: its metric and baseline are used again.
        model: an nnsight ``TransformersModel``.
        prompts: the prompts that were attributed, in the same order.
        scores: what ``attribute(model, prompts)`` gave.
        k: how many of the top to check; half of the budget by default.
        budget: how many latents to move in all.
        seed: of the draw from the tail.
        batch_size: the most rows a forward pass; fewer where prompts are long.
        checkpoint: a folder for finished batches: an interrupted call, made again, goes on from
            there.
        progress: show a progress bar.

    Returns:
        An ``Audit``.

    Raises:
        PromptError: if the metric of these prompts is not the one in ``scores``.
        SaefeatError: for scores with nothing in them, of whole prompts (``Exact``, which needs no
            audit) or without a sign (``GradDrop``), a budget below two, k outside it, or a
            baseline on a dictionary whose directions move with the input.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> attribute = sf.Attribute(saes[3], sf.logit_diff(5, 6))
        >>> scores = attribute(model, ["hello", "how do i bake bread"])
        >>> found = sf.audit(attribute, model, ["hello", "how do i bake bread"], scores, budget=8)
        >>> found.exact.shape, found.top.n
        (torch.Size([8]), 4)
    """
    wholes("audit", budget=(budget, 2), seed=(seed, 0))
    wanted = _at_the_top(k, budget)
    require(scores, "audit", "signed")
    ranked = ranking(scores, "audit")
    require_movable(scores, "audit")
    asked = {"scores": scores, "k": wanted, "budget": budget, "seed": seed}
    experiment = Experiment.of_attribute(
        attribute, model, prompts, function="audit", batch_size=batch_size, checkpoint=checkpoint,
        **asked,
    )  # fmt: skip
    clean = experiment.under()
    experiment.require_same(clean, scores)
    chosen, stratum, sizes = draw(len(ranked.keys), wanted, budget - wanted, seed)
    keys, place = ranked.keys[chosen], ranked.among(chosen)
    change, gap = _gaps(scores)
    return Audit(
        scores.dictionaries,
        keys,
        stratum,
        sizes,
        by_prompt(scores, place, scores.score, len(keys)),
        effects(experiment, scores, keys, place, clean, progress=progress),
        change,
        gap,
        int(scores.degenerate.sum()),
        noise=float((clean - scores.clean).abs().max()),
        dropped=_dropped(scores),
    )


def _at_the_top(k: int | None, budget: int) -> int:
    """How many of the top to check."""
    wanted = budget // 2 if k is None else k
    if type(wanted) is int and 1 <= wanted <= budget:
        return wanted
    raise SaefeatError(
        f"audit: `k` is {k!r}, wanted an integer in 1..{budget}, the budget. Likely cause: more"
        f" latents to check than may be moved. Try: audit(..., k={budget // 2}, budget={budget})"
    )


def _gaps(scores: Attribution) -> tuple[Tensor, Tensor]:
    """The metric's change and the completeness gap: one a prompt, or one a site as well."""
    if scores.ends is not None and scores.dropped is None:
        return scores.ends - scores.clean[:, None], scores.gap_by_site
    return scores.baseline - scores.clean, scores.gap


def _dropped(scores: Attribution) -> float:
    """The share of the scores' size that ``keep=`` left out."""
    if scores.dropped is None:
        return 0.0
    left = float(scores.dropped[:, 1].sum())
    return left / max(left + float(scores.score.abs().sum()), torch.finfo(torch.float32).tiny)


def draw(population: int, k: int, budget: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which ranks to move: the first k, and a sample of the others, stratified by rank.

    Returns:
        ranks [n], the stratum of each [n], and the size of each stratum.
    """
    k = min(k, population)
    tail = population - k
    budget = min(budget, tail)
    # four draws a stratum at least, so that its spread can be told; none at all leave one unknown
    strata = min(6, max(1, budget // 4), int(math.log2(tail + 1)))
    cuts = [round(tail * (2**h - 1) / max(1, 2**strata - 1)) for h in range(strata + 1)]
    sizes = [stop - start for start, stop in pairwise(cuts)]
    generator = torch.Generator().manual_seed(seed)
    ranks, left = [torch.arange(k)], budget
    counts = []
    for h, size in enumerate(sizes):  # what a small stratum cannot use goes to the later ones
        count = min(size, -(-left // (strata - h)))
        left -= count
        counts.append(count)
        picked = torch.randperm(size, generator=generator)[:count].sort().values
        ranks.append(k + cuts[h] + picked)
    stratum = torch.arange(strata + 1).repeat_interleave(torch.tensor([k, *counts]))
    return torch.cat(ranks), stratum, torch.tensor([k, *sizes])
