"""What is seen at the nodes of a path, beside the gradients that are averaged.

At every node the metric is known, and so is its slope along the way from clean to baseline, at each
place and token. That costs one product with a gradient that is there anyway, and is all that is
needed to say how far the mean gradient can be trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .quadrature import left_out


class Settled(NamedTuple):
    """One place's integration over a batch, by prompt [b], on the CPU.

    ``lost`` is what the sum of its scores loses without some of the nodes, in size, token by token;
    NaN for a single node. ``total`` is the integral of the slope over the whole way, and ``reach``
    how far the metric was from its clean value at any node.
    """

    nodes: Tensor
    lost: Tensor
    total: Tensor
    reach: Tensor


class Trail:
    """The slopes [b, t] and the metric [b] at each node, by place, in the order of the nodes.

    ``ways`` are the values [b, t, d] where each place's way starts and where it ends.
    """

    def __init__(self, ways: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self._ways = ways
        self._slopes: dict[int, list[Tensor]] = {number: [] for number in ways}
        self._metrics: dict[int, list[Tensor]] = {number: [] for number in ways}

    def add(self, number: int, slopes: Iterable[Tensor], metrics: Iterable[Tensor]) -> None:
        """Add nodes of a place: gradients [b, t, d] or [b, t, ways, d], and the metric [b]."""
        start, end = self._ways[number]
        self._slopes[number] += [along(slope, start, end).cpu() for slope in slopes]
        self._metrics[number] += [metric.detach().double().cpu() for metric in metrics]

    def settled(
        self,
        number: int,
        nodes: Sequence[tuple[float, float]],
        rule: str,
        chosen: Tensor,
        clean: Tensor,
    ) -> Settled:
        """What the nodes say of a place.

        ``chosen`` [b, t] are the tokens that are scored, ``clean`` [b] is the metric at the start.
        """
        alphas, weights = zip(*nodes, strict=True)
        slopes = torch.stack(self._slopes[number]).double()  # [n, b, t]
        reach = (torch.stack(self._metrics[number]) - clean.double().cpu()).abs().amax(0)
        lost = torch.from_numpy(left_out(alphas, weights, rule))
        sizes = torch.einsum("kn,nbt->kbt", lost, slopes * chosen.cpu()).abs().sum(-1)
        one = torch.full_like(reach, torch.nan)
        return Settled(
            torch.full((len(reach),), len(nodes)),
            sizes.amax(0) if len(sizes) else one,
            torch.einsum("n,nbt->b", torch.tensor(weights, dtype=torch.float64), slopes),
            reach,
        )


def along(slope: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """[b, t]: the gradient's product with the way [b, t, d] from start to end.

    Of gradients [b, t, ways, d] whose sizes are averaged, the mean size of the products.
    """
    dtype = torch.promote_types(slope.dtype, torch.float32)
    way = end.to(slope.device, dtype) - start.to(slope.device, dtype)
    if slope.ndim == 3:
        return torch.linalg.vecdot(slope.to(dtype), way)
    return torch.linalg.vecdot(slope.to(dtype), way[:, :, None]).abs().mean(-1)
