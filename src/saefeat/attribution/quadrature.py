"""Quadrature rules, and what each can say of itself from its own nodes.

No node is evaluated to learn how far a sum can be trusted. For rules whose nodes are given in
advance, every second node is left out and put back as the rule itself takes the function to be
between nodes: constant from the left, a straight line, or a polynomial. What the sum loses by it is
small where the function is as the rule assumes, and as large as the function's own jumps where it
is not. Adaptive nodes are Gauss-Kronrod's, seven to a panel, three of which are Gauss's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_OUTER = (0.9604912687080202, 0.7745966692414834, 0.4342437493468026)
_KRONROD = (0.1046562260264673, 0.2684880898683334, 0.4013974147759622, 0.4509165386584741)
_GAUSS = (0.0, 5 / 9, 0.0, 8 / 9)

POINTS = tuple(
    ((1 + point) / 2, kronrod / 2, gauss / 2)
    for point, kronrod, gauss in zip(
        (*(-p for p in _OUTER), 0.0, *reversed(_OUTER)),
        (*_KRONROD, *_KRONROD[2::-1]),
        (*_GAUSS, *_GAUSS[2::-1]),
        strict=True,
    )
)
"""(place in the panel, Kronrod's weight, Gauss's weight) of a panel's seven nodes."""

FIRST = ((0.0, 0.5), (0.5, 0.5))
"""(start, width) of the panels that adaptive nodes begin with."""


def in_panels() -> tuple[tuple[float, float], ...]:
    """(α, weight) of the nodes that adaptive integration begins with."""
    return tuple((a + at * width, w * width) for a, width in FIRST for at, w, _ in POINTS)


def left_out(alphas: Sequence[float], weights: Sequence[float], rule: str) -> np.ndarray:
    """[2, n]: weights of what a sum loses without its odd nodes, and without its even ones.

    Alphas ascend. With fewer than two nodes nothing can be left out: [0, n].
    """
    x, w = np.asarray(alphas), np.asarray(weights)
    if len(x) < 2:
        return np.zeros((0, len(x)))
    lost = np.zeros((2, len(x)))
    for row, first in enumerate((0, 1)):
        kept = np.arange(first, len(x), 2)
        for node in sorted({*range(len(x))} - {*kept.tolist()}):
            if rule == "left" and node == 0:
                continue  # nothing lies before it
            basis = _basis(x[kept], x[node], rule)
            lost[row, node] += w[node]
            lost[row, kept] -= w[node] * basis
    return lost


def _basis(kept: np.ndarray, at: float, rule: str) -> np.ndarray:
    """[k]: how much each kept node's value counts for the value at a node that is left out."""
    basis = np.zeros(len(kept))
    if rule == "left":
        basis[int((kept < at).sum()) - 1] = 1.0
        return basis
    near = (
        np.arange(len(kept)) if rule == "gauss" else np.argsort(abs(kept - at), kind="stable")[:2]
    )
    for k in near:
        others = kept[near[near != k]]
        basis[k] = np.prod((at - others) / (kept[k] - others))
    return basis
