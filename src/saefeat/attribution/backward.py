"""Backward rules: what stands in for the gradient where the plain one misleads.

``relp`` and ``graddrop`` hold one each. A rule changes how gradients flow through the model, never
a value. It is put on the modules by hooks for the length of one forward pass, and is gone after it,
after an error and after Ctrl-C alike; the graph that was built keeps it.

nnsight facts these lines rest on (0.8.1, each tried): its own reading and writing of a module lies
around ``forward``, inside torch's hooks. So a pre-hook comes before a site at the module's input,
and a hook after a site at its output: what a hook adds must be added to the value it is given, or
the site's node would drop out of the graph. ``type(module).forward`` runs without nnsight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..model.sites import Site

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
    order = sorted(nodes)
    slopes = torch.autograd.grad(
        total, [nodes[n] for n in order], materialize_grads=True, retain_graph=keep
    )
    return dict(zip(order, slopes, strict=True))
