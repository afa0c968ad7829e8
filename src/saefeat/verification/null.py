"""What any dictionary would do: the same one on values that have no features.

Tokens are mixed by a random rotation among themselves. That leaves the mean and every covariance
of the values as they were, and makes each new token a blend of all: directions of much variance
are still there, and what is sparse in them is gone. A dictionary of random directions, however
wide, explains blends as well as tokens. One that was trained on these values does far better on
tokens, and with fewer latents. One of another model is in between, near the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEEDS = (0, 1)
"""Mixtures that the null is averaged over; they agree to a few percent."""
BLOCK = 512
"""Tokens mixed with each other: a rotation costs their cube."""


def mixed(values: Tensor, seed: int) -> Tensor:
    """Values [n, d] with tokens rotated among themselves, the mean kept.

    The same seed and n give the same rotation, so what two sites hold is mixed alike: what of one
    is linear in the other stays so.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = values.tensor_split(max(1, -(-len(values) // BLOCK)))  # of about one size
    return torch.cat([_rotated(block, generator) for block in blocks])


def _rotated(block: Tensor, generator: torch.Generator) -> Tensor:
    count = len(block)
    drawn = torch.randn(count, count, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(drawn).Q.to(block)
    mean = block.mean(0)
    turned = rotation @ (block - mean)
    return turned - turned.mean(0) + mean
