"""Outlier tokens: the few of a text whose values dwarf those of all others.

Many models park attention on a token or two, mostly the first, whose residual stream is a hundred
times as long as that of any other from some layer on. It is no property of a token's id, and it is
not only the first position: what is large is found by its size. Such tokens hold nearly all of a
text's variance, so every sum over tokens speaks of them alone unless they are set apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import checked

TIMES = 5.0
"""How many times the median norm makes an outlier. Measured on 50,000 tokens of text in a model of
30 layers: sinks are 80 to 157 times as long as the median in the middle of it and 7 to 21 times
near the end, and every other token there, and of what attention and MLPs write, is below 4."""


@checked
def outliers(values: Tensor) -> Tensor:
    """[n] bool: which tokens' values [n, d] are longer than ``TIMES`` their median length.

    None are where the median is zero: then there is nothing to be larger than. Up to half of the
    tokens can be outliers.

    Examples:
        >>> sf.results.outliers(torch.tensor([[90.0, 0.0], [1.0, 1.0], [0.0, 2.0]]))
        tensor([ True, False, False])
    """
    if not len(values):
        return torch.zeros(0, dtype=torch.bool, device=values.device)
    norms = values.double().norm(dim=-1)
    typical = norms.median()  # the lower of two, so that half of the tokens may be outliers
    return (norms > TIMES * typical) & (typical > 0)


LARGE = 0.25
"""A share of all that one token in eight, or fewer, should not hold without a word."""
TOKENS = 8
"""With fewer tokens a share says nothing: each has much of all."""


def few_hold_much(few: int, tokens: int, share: float) -> bool:
    """Whether some tokens hold a large share of all, being one in eight or fewer."""
    return 0 < few <= tokens / TOKENS and share > LARGE


def robust_top(sizes: Tensor, prompts: int = 1) -> float:
    """The size at which a color scale ends: the largest, unless a few dwarf all others.

    Sizes above it, at most one in a hundred and one a prompt, are then more than three times as
    large as it, and would leave nothing of the others to be seen.

    Args:
        sizes: [n], not negative; NaN where there is none.
        prompts: how many prompts they are of.
    """
    known = sizes[sizes.isfinite()].double().sort(descending=True).values
    if not len(known):
        return 0.0
    few = max(prompts, math.ceil(len(known) / 100))
    if len(known) < TOKENS or few >= len(known):
        return float(known[0])
    after = known[1 : few + 1]
    # the first place where the rest is much smaller
    gaps = (known[:few] > 3 * after) & (after > 0)
    cut = int(gaps.nonzero().max()) + 1 if bool(gaps.any()) else 0
    return float(known[cut])
