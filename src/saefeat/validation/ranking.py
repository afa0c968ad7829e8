"""A sparse attribution by latent: sums over scored tokens, which exact effects are compared with.

``Attribution.totals`` gives means over a prompt's scored tokens, so that long prompts do not
outweigh short ones. The effect of ablating a latent at all of those tokens is no mean: its
first-order estimate is the *sum*. Everything in this room uses sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..attribution.scores import Attribution
from ..dictionaries.latents import Dictionary, Latents
from ..errors import SaefeatError


class Ranking(NamedTuple):
    """The latents that moved, largest |estimate| first.

    An estimate is the mean over prompts of the sum over scored tokens. ``keys`` [m, 2] are
    (dictionary, latent); ``number`` [n] tells for each row of the attribution which latent it is.
    """

    keys: Tensor
    number: Tensor

    def among(self, chosen: Tensor) -> Tensor:
        """[n]: for each row of the attribution its place in ``chosen`` [k] ranks, or −1."""
        place = torch.full((len(self.keys),), -1)
        place[chosen] = torch.arange(len(chosen))
        return place[self.number]


def ranking(scores: Attribution, function: str) -> Ranking:
    """Rank by the size of the estimate, either sign.

    Raises:
        SaefeatError: if nothing was scored, a score is not finite, or every prompt's metric is
            degenerate.
    """
    if len(scores) == 0 or bool(scores.degenerate.all()):
        raise SaefeatError(
            f"{function}: `scores` is {len(scores)} scores, {int(scores.degenerate.sum())} of"
            f" {len(scores.tokens)} prompts degenerate, wanted an attribution with something in it."
            " Likely cause: a baseline that changes nothing, or `where` that selects no token. Try:"
            " print(scores), and compare the metric before and after"
        )
    _require_finite(scores, function)
    pairs = torch.stack([scores.dictionary, scores.latent], 1)
    keys, inverse = torch.unique(pairs, dim=0, return_inverse=True)
    sums = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, inverse, scores.score.double())
    order = sums.abs().argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return Ranking(keys[order], place[inverse])


def _require_finite(scores: Attribution, function: str) -> None:
    """A score that is NaN would rank above all others."""
    bad = (~torch.isfinite(scores.score)).nonzero().flatten()
    if not len(bad):
        return
    row = int(bad[0])
    raise SaefeatError(
        f"{function}: `scores` is {len(bad)} that are not finite, the first of prompt"
        f" {int(scores.prompt[row])}, wanted finite scores. Likely cause: a gradient that"
        " overflows, or of a root or logarithm at zero in the metric. Try: attribute again without"
        " these prompts, in float32"
    )


def by_prompt(scores: Attribution, number: Tensor, values: Tensor, count: int) -> Tensor:
    """[count, prompts]: values [n] of the attribution's rows summed by ``number`` and prompt.

    Rows with a negative number are left out.
    """
    prompts = len(scores.tokens)
    kept = number >= 0
    flat = number[kept] * prompts + scores.prompt[kept]
    table = torch.zeros(count * prompts, dtype=torch.float64)
    return table.index_add_(0, flat, values[kept].double()).reshape(count, prompts)


def selection(dictionaries: tuple[Dictionary, ...], keys: Tensor) -> Latents:
    """Latents from keys [k, 2], sites in the order a forward pass reaches them."""
    table: dict[int, list[int]] = {}
    for number, index in keys.tolist():
        table.setdefault(number, []).append(index)
    parts = sorted(table.items(), key=lambda item: dictionaries[item[0]].site.order)
    return Latents(tuple((dictionaries[n], tuple(indices)) for n, indices in parts))


def singles(dictionaries: tuple[Dictionary, ...], keys: Tensor) -> tuple[Latents, ...]:
    """Each key as a selection of its own, in order."""
    return tuple(selection(dictionaries, key[None]) for key in keys)
