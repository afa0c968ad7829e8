"""How to attribute: gradients along the path from clean to baseline, or runs without gradients.

Gradient methods are one quadrature: nodes α in [0, 1] with weights that sum to one. The gradient is
averaged over the nodes and multiplied once, at the end, with the change of each latent. The others
move one latent at a time for real, and read the metric.

Where the plain gradient misleads a ``Backward`` rule stands in for it: ``relp`` and ``graddrop``
hold one each. A rule changes how gradients flow through the model, never a value. It is put on the
modules by hooks for the length of one forward pass, and is gone after it, after an error and after
Ctrl-C alike; the graph that was built keeps it.

nnsight facts these rules rest on (0.8.1, each tried): its own reading and writing of a module lies
around ``forward``, inside torch's hooks. So a pre-hook comes before a site at the module's input,
and a hook after a site at its output: what a hook adds must be added to the value it is given, or
the site's node would drop out of the graph. ``type(module).forward`` runs without nnsight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import final

import numpy as np
from torch import Tensor, nn

from ..arguments import checked
from ..checks import differentiated
from ..errors import SaefeatError
from ..model.sites import Site
from .quadrature import in_panels

RULES = ("left", "midpoint", "gauss")
ENDPOINTS = ("corrected", "as_published")


class Method(ABC):
    """Where gradients are taken on the path from clean (α = 0) to baseline (α = 1), or how far
    each latent is moved where none are.

    Examples:
        >>> sf.attribution.AtP().nodes()
        ((0.0, 1.0),)
        >>> sf.attribution.Exact().moves()
        ((1.0, 1.0), (0.0, -1.0))
    """

    @abstractmethod
    def nodes(self) -> tuple[tuple[float, float], ...]:
        """(α, weight) pairs; the weights sum to one. Empty for methods without gradients."""

    def moves(self) -> tuple[tuple[float, float], ...]:
        """(fraction, weight) pairs: the score is the weighted sum of the metric, with one latent
        moved by that fraction of its way. Empty for methods that take gradients.
        """
        return ()


@checked
@final
@dataclass(frozen=True)
class AtP(Method):
    """Attribution patching: one gradient, at the clean run.

    With the zero baseline this is gradient x activation, with the sign of removing the latent. It
    misleads where the metric is flat at the clean point, such as behind a saturated softmax.

    Examples:
        >>> sf.attribution.AtP()
        AtP()
    """

    def nodes(self) -> tuple[tuple[float, float], ...]:
        return ((0.0, 1.0),)


@checked
@final
@dataclass(frozen=True, repr=False)
class IG(Method):
    """Integrated gradients: the mean gradient along the path (Sundararajan et al. 2017).

    At α a site is moved that share of the way to the baseline's value, from where the pass has it.
    With several sites the pass was moved upstream already, as in the refusal paper's code; with
    ``Attribute(one_site=True)`` each has a straight path of its own.

    Args:
        steps: gradients taken, each one forward and one backward pass.
        rule: ``left`` (α = k/N, as published for refusal), ``midpoint``, or ``gauss``
            (Gauss-Legendre, exact for polynomials of degree 2N − 1).
        endpoint: where the path ends when the baseline is an intervention. ``corrected``: at what
            the intervention leaves. ``as_published``: the refusal paper's code stores the error
            of the corrupt run as x_before − decode(f(x_after)), so its path ends at the value
            *before* the site's own edit, while latents change by f(x_after) − f(x_clean).
        tolerance: adaptive nodes: more where the slope varies, until the error at every site is
            estimated below this share of the metric's change, prompt by prompt, or ``steps`` nodes
            are spent on a prompt, of which the result then warns. They are Gauss-Kronrod's, in
            panels of seven, so this needs the rule ``gauss`` and 14 steps or more.

    Raises:
        SaefeatError: for no steps, an unknown rule or endpoint, or a tolerance that is not above 0
            and at most 1, or with another rule or too few steps.

    Examples:
        >>> sf.IG(steps=2, rule="midpoint").nodes()
        ((0.25, 0.5), (0.75, 0.5))
        >>> len(sf.IG(256, "gauss", tolerance=0.05).nodes())  # to begin with
        14
    """

    steps: int = 10
    rule: str = "left"
    endpoint: str = field(default="corrected", kw_only=True)
    tolerance: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        known = self.rule in RULES and self.endpoint in ENDPOINTS
        if type(self.steps) is not int or self.steps < 1 or not known:
            raise SaefeatError(
                f"IG: `steps, rule and endpoint` is {self.steps}, {self.rule!r} and"
                f" {self.endpoint!r}, wanted at least 1 step, a rule of {', '.join(RULES)}, and an"
                f' endpoint of {" or ".join(ENDPOINTS)}. Try: IG(steps=10, rule="midpoint")'
            )
        _require_adaptable(self)

    def nodes(self) -> tuple[tuple[float, float], ...]:
        if self.tolerance is not None:
            return in_panels()
        if self.rule == "gauss":
            points, weights = np.polynomial.legendre.leggauss(self.steps)
            return tuple(
                (float((p + 1) / 2), float(w / 2)) for p, w in zip(points, weights, strict=True)
            )
        shift = 0.5 if self.rule == "midpoint" else 0.0
        return tuple(((k + shift) / self.steps, 1.0 / self.steps) for k in range(self.steps))

    def __repr__(self) -> str:
        end = "" if self.endpoint == "corrected" else f", endpoint={self.endpoint!r}"
        end += "" if self.tolerance is None else f", tolerance={self.tolerance!r}"
        return f"IG(steps={self.steps}, rule={self.rule!r}{end})"


def _require_adaptable(method: IG) -> None:
    """Refuse a tolerance that is none, or that no node could adapt to."""
    wanted, least = method.tolerance, len(in_panels())
    if wanted is None:
        return
    if not 0 < wanted <= 1 or method.rule != "gauss" or method.steps < least:
        raise SaefeatError(
            f"IG: `tolerance` is {wanted!r} with {method.steps} steps and rule {method.rule!r},"
            " wanted a share of the metric's change in (0, 1], the rule 'gauss' and at least"
            f" {least} steps, the most nodes a prompt. Try: IG(256, 'gauss', tolerance=0.05)"
        )


@checked
@final
@dataclass(frozen=True)
class Exact(Method):
    """Every latent moved to its baseline value for real, alone: the effects themselves.

    One run for each latent that moves in a prompt, many at a time as rows of a batch. Only the
    latent's own site is written; later sites follow from the run. No gradient is needed.

    Args:
        per: ``"latent"`` moves a latent at all scored tokens together, which is one score, at
            position −1 (activation and change are then means over those tokens). ``"token"``
            moves it at one token at a time.
        limit: the most latents accepted; ask for more only if you mean it.

    Raises:
        SaefeatError: for an unknown ``per`` or no limit at all.

    Examples:
        >>> sf.attribution.Exact(limit=20)
        Exact(per='latent', limit=20)
    """

    per: str = "latent"
    limit: int = 4096

    def __post_init__(self) -> None:
        _require_moves("Exact", self.per, self.limit, 1.0)

    def nodes(self) -> tuple[tuple[float, float], ...]:
        return ()

    def moves(self) -> tuple[tuple[float, float], ...]:
        return ((1.0, 1.0), (0.0, -1.0))


@checked
@final
@dataclass(frozen=True)
class FiniteDifference(Method):
    """What AtP estimates, without gradients: each latent moved a little way, to both sides.

    Score = (m(+step) − m(−step)) / (2 · step), in units of the latent's whole way to its baseline
    value. For places where gradients do not exist, such as remote servers; twice the runs of
    ``Exact``. In float32 a smaller step has more rounding error than truncation; in a bfloat16
    model this one does already (on the tiny model it correlates with AtP at .85 to .96, and at
    .99 with a step of .5).

    Args:
        step: the fraction of the way.
        per: as in ``Exact``.
        limit: as in ``Exact``.

    Raises:
        SaefeatError: for an unknown ``per``, no limit, or a step that is not above 0.

    Examples:
        >>> sf.attribution.FiniteDifference(step=0.5).moves()
        ((0.5, 1.0), (-0.5, -1.0))
    """

    step: float = 0.02
    per: str = "latent"
    limit: int = 4096

    def __post_init__(self) -> None:
        _require_moves("FiniteDifference", self.per, self.limit, self.step)

    def nodes(self) -> tuple[tuple[float, float], ...]:
        return ()

    def moves(self) -> tuple[tuple[float, float], ...]:
        weight = 1 / (2 * self.step)
        return ((self.step, weight), (-self.step, -weight))


def _require_moves(function: str, per: str, limit: int, step: float) -> None:
    if per in ("latent", "token") and type(limit) is int and limit > 0 and 0 < step <= 1:
        return
    raise SaefeatError(
        f'{function}: `per, limit and step` is {per!r}, {limit!r} and {step!r}, wanted "latent" or'
        f" \"token\", at least 1 latent, and a step in (0, 1]. Try: {function}(per='latent',"
        " limit=4096)"
    )


Slopes = Callable[[Tensor, Mapping[int, Tensor], Mapping[int, Site]], dict[int, Tensor]]
"""``slopes(total [], nodes, sites)``: the gradient of the total at each node [b, t, d]; or for a
rule that averages sizes, the gradients whose sizes are averaged, [b, t, ways, d]."""


class Backward(ABC):
    """A way for gradients to flow backward through the model, in place of the plain one.

    Attributes:
        signed: whether scores are signed, or sizes alone.

    Examples:
        >>> issubclass(sf.attribution.RelP, sf.attribution.Backward)
        True
    """

    signed: bool = True

    @abstractmethod
    def applied(self, module: nn.Module) -> AbstractContextManager[Slopes]:
        """Put the rule on the model for one forward pass; gives what computes the gradients."""


def plain_slopes(
    total: Tensor, nodes: Mapping[int, Tensor], sites: Mapping[int, Site], keep: bool = False
) -> dict[int, Tensor]:
    """The gradient as it is."""
    order, at = zip(*sorted(nodes.items()), strict=True)
    slopes = differentiated("Attribute", total, at, keep=keep)
    return dict(zip(order, slopes, strict=True))
