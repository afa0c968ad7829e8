"""How to attribute: where along the path from clean to baseline gradients are taken.

Both methods are one quadrature: nodes α in [0, 1] with weights that sum to one. The gradient is
averaged over the nodes and multiplied once, at the end, with the change of each latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import numpy as np

from ..errors import SaefeatError, explain

RULES = ("left", "midpoint", "gauss")


class Method(ABC):
    """A quadrature on the path from the clean run (α = 0) to the baseline (α = 1).

    Examples:
        >>> sf.AtP().nodes()
        ((0.0, 1.0),)
    """

    @abstractmethod
    def nodes(self) -> tuple[tuple[float, float], ...]:
        """(α, weight) pairs; the weights sum to one."""


@final
@dataclass(frozen=True)
class AtP(Method):
    """Attribution patching: one gradient, at the clean run.

    With the zero baseline this is gradient x activation, with the sign of removing the latent. It
    misleads where the metric is flat at the clean point, such as behind a saturated softmax.

    Examples:
        >>> sf.AtP()
        AtP()
    """

    def nodes(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, 1.0),)


@final
@dataclass(frozen=True)
class IG(Method):
    """Integrated gradients: the mean gradient along the path (Sundararajan et al. 2017).

    Args:
        steps: gradients taken, each one forward and one backward pass.
        rule: ``left`` (α = k/N, as published for refusal), ``midpoint``, or ``gauss``
            (Gauss-Legendre, exact for polynomials of degree 2N − 1).

    Raises:
        SaefeatError: for no steps or an unknown rule.

    Examples:
        >>> sf.IG(steps=2, rule="midpoint").nodes()
        ((0.25, 0.5), (0.75, 0.5))
    """

    steps: int = 10
    rule: str = "left"

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1 or self.rule not in RULES:
            raise SaefeatError(
                explain(
                    "IG",
                    "steps and rule",
                    got=f"{self.steps} and {self.rule!r}",
                    wanted="at least 1 step and a rule of " + ", ".join(RULES),
                    cause="a typing error",
                    call='IG(steps=10, rule="midpoint")',
                )
            )

    def nodes(self) -> tuple[tuple[float, float], ...]:
        if self.rule == "gauss":
            points, weights = np.polynomial.legendre.leggauss(self.steps)
            return tuple(
                (float((p + 1) / 2), float(w / 2)) for p, w in zip(points, weights, strict=True)
            )
        shift = 0.5 if self.rule == "midpoint" else 0.0
        return tuple(((k + shift) / self.steps, 1.0 / self.steps) for k in range(self.steps))
