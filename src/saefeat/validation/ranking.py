"""A sparse attribution by latent, and the sets drawn as controls for its top."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..attribution.scores import Attribution
from ..dictionaries.latents import Dictionary, Latents
from ..dictionaries.places import lengths
from ..errors import SaefeatError


class Ranking(NamedTuple):
    """The latents that moved, largest |estimate| first.

    An estimate is the mean over prompts of the sum over scored tokens. ``keys`` [m, 2] are
    (dictionary, latent); ``number`` [n] tells for each row of the attribution which latent it is.
    """

    keys: Tensor
    number: Tensor

    def places(self, chosen: Tensor) -> Tensor:
        """[n]: the place of each row of the attribution in ``chosen`` [k] ranks, or −1."""
        place = torch.full((len(self.keys),), -1, dtype=torch.long)
        place[chosen] = torch.arange(len(chosen))
        return place[self.number]


def ranking(scores: Attribution, function: str) -> Ranking:
    """Rank by the size of the estimate, either sign."""
    if len(scores) == 0 or bool(scores.degenerate.all()):
        raise SaefeatError(
            f"{function}: `scores` is {len(scores)} scores, {int(scores.degenerate.sum())} of"
            f" {len(scores.tokens)} prompts degenerate, wanted scores with something in it. Likely"
            " cause: a baseline that changes nothing, or a `where` of no token. Try: print(scores)"
        )
    # a score that is NaN would rank above all others
    bad = (~torch.isfinite(scores.score)).nonzero().flatten()
    if len(bad):
        raise SaefeatError(
            f"{function}: `scores` is {len(bad)} that are not finite, the first of prompt"
            f" {int(scores.prompt[bad[0]])}, wanted finite scores. Likely cause: gradients that"
            " overflow, or a root or log at zero. Try: attribute without these prompts, in float32"
        )
    pairs = torch.stack([scores.dictionary, scores.latent], 1)
    keys, inverse = torch.unique(pairs, dim=0, return_inverse=True)
    sums = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, inverse, scores.score.double())
    order = sums.abs().argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return Ranking(keys[order], place[inverse])


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


NEAR = 5
"""A matched partner is drawn from so many of the nearest latents, so that draws differ."""


def random_sets(ranked: Ranking, k: int, draws: int, seed: int) -> Tensor:
    """[draws, k, 2]: keys drawn from the latents that moved and are not among the first k."""
    generator = torch.Generator().manual_seed(seed)
    pool = ranked.keys[k:]
    sets = [pool[torch.randperm(len(pool), generator=generator)[:k]] for _ in range(draws)]
    return torch.stack(sets)


def matched_sets(scores: Attribution, ranked: Ranking, k: int, draws: int, seed: int) -> Tensor:
    """[draws, k, 2]: a partner for each of the first k, in their order, each used once.

    Partners are of the same dictionary (of any, once that has none left) and write about as much:
    they are drawn from the ``NEAR`` whose mass is nearest on a logarithmic scale.
    """
    size = mass(scores, ranked).log()
    pool = torch.arange(k, len(size))
    draw = torch.Generator().manual_seed(seed)
    sets = []
    for _ in range(draws):
        free = torch.ones(len(pool), dtype=torch.bool)
        picked = []
        for member in range(k):
            own = free & (ranked.keys[pool, 0] == ranked.keys[member, 0])
            open_to = (own if bool(own.any()) else free).nonzero().squeeze(1)
            nearest = (size[pool[open_to]] - size[member]).abs().argsort(stable=True)[:NEAR]
            one = open_to[nearest[torch.randint(len(nearest), (1,), generator=draw)]]
            free[one] = False
            picked.append(ranked.keys[pool[one]])
        sets.append(torch.cat(picked))
    return torch.stack(sets)


def mass(scores: Attribution, ranked: Ranking) -> Tensor:
    """[m] > 0: how much each latent writes, Σ |activation| · ‖direction‖ where it moved."""
    size = torch.zeros(len(ranked.keys), dtype=torch.float64)
    size.index_add_(0, ranked.number, scores.activation.abs().double())
    for n, dictionary in enumerate(scores.dictionaries):
        own = ranked.keys[:, 0] == n
        if bool(own.any()):
            size[own] *= lengths(dictionary, ranked.keys[own, 1])
    return size.clamp(min=torch.finfo(torch.float64).tiny)


def members_mass(
    scores: Attribution, ranked: Ranking, sets: dict[str, Tensor]
) -> dict[str, Tensor]:
    """For each of the sets [draws, k, 2] what each member writes, [draws, k]."""
    written = mass(scores, ranked).tolist()
    table = dict(zip(map(tuple, ranked.keys.tolist()), written, strict=True))
    return {
        name: torch.tensor([[table[tuple(key)] for key in drawn.tolist()] for drawn in keys])
        for name, keys in sets.items()
    }
