"""Control sets: what as many latents do that the attribution did not pick."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attribution.scores import Attribution
from ..errors import SaefeatError
from .ranking import Ranking

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
            size[own] *= dictionary.directions(ranked.keys[own, 1]).norm(dim=1).double()
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


def require_pool(ranked: Ranking, k: int, function: str) -> None:
    """Refuse sets so large that no control of their size is left."""
    if len(ranked.keys) < 2 * k:
        raise SaefeatError(
            f"{function}: `sizes` is up to {k}, wanted at most {len(ranked.keys) // 2}: half of the"
            f" {len(ranked.keys)} latents that moved, so that as many are left for a control."
            f" Likely cause: few latents are active on these prompts. Try: {function}(...,"
            f" sizes=(1, {max(1, len(ranked.keys) // 2)})), or controls=0"
        )
