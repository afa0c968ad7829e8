"""GradDrop: gradients with one layer left out at a time, for effects that cancel.

A gate lies behind every branch of every block. Forward it is the value as it is; backward it is
closed for the layer that is left out. So one forward pass serves a backward pass for each layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..errors import ModelError, SaefeatError
from ..model.modules import blocks, family
from ..model.sites import Site
from .methods import Backward, Slopes, plain_slopes
from .relp import CHECKED, CHECKED_NESTED

_BRANCHES = {"gpt2": ("attn", "mlp"), "gpt_neox": ("attention", "mlp")}


@checked
@final
@dataclass(frozen=True)
class GradDrop(Backward):
    """The mean *size* of a score, with one layer's attention and MLP left out in turn (AtP*).

    Where a direct effect and one through a later layer cancel, the plain gradient is near zero
    though each is large; leaving that layer out uncovers it. Kramár et al. 2024 (arXiv 2403.00745,
    section 3.1.2) average absolute values, since the layers left out may disagree in sign:
    score = 1 / (L − 1) · Σ_ℓ |Δf · (∂m/∂x without layer ℓ) · direction|. So scores are sizes:
    ``top`` finds latents that matter either way, no sum of them is the metric's change, there is
    no ``gap``, and ``audit`` refuses them.

    A site inside a layer's own branches is not reached without them, which leaves L − 1 layers. A
    site of the residual stream lies in none, and has the mean over all L: with no cancellation
    either is the size of the plain score. One forward pass, a backward pass for each layer, and a
    gradient held for each layer: L times the memory of ``AtP``'s gradients, unless ``signed``.

    Args:
        signed: keep the sign, and average the gradients themselves. Two layers whose effects
            cancel are each uncovered by leaving the other out, with opposite signs, and cancel
            again in this mean: it is a sign at the price of the very case the rule is for.

    Raises:
        SaefeatError: for a ``signed`` that is no truth value.

    Examples:
        >>> sf.attribution.GradDrop()
        GradDrop(signed=False)
    """

    signed: bool = False

    def __post_init__(self) -> None:
        if type(self.signed) is not bool:
            raise SaefeatError(
                f"GradDrop: `signed` is {self.signed!r}, wanted True or False. Try:"
                " GradDrop(signed=True)"
            )

    def applied(self, module: nn.Module) -> AbstractContextManager[Slopes]:
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind in (*CHECKED, *CHECKED_NESTED):
            return _dropping(module, self.signed)
        raise ModelError(
            f"GradDrop: `model` is of family {kind!r}, wanted one of"
            f" {', '.join([*CHECKED, *CHECKED_NESTED])}. Likely cause: the rule names a block's"
            " branches, and is not checked on this family's. Try: AtP() or IG() without backward="
        )


@contextmanager
def _dropping(module: nn.Module, signed: bool) -> Iterator[Slopes]:
    """A gate behind every branch, to be closed layer by layer in the backward passes."""
    closed = {"layer": -1}  # whose gates are closed
    kind = getattr(getattr(module, "config", None), "model_type", "")
    with ExitStack() as stack:
        for layer, block in enumerate(blocks(module)):
            for name in _BRANCHES.get(kind, ("self_attn", "mlp")):
                hook = partial(_gated, closed, layer)
                stack.callback(getattr(block, name).register_forward_hook(hook).remove)
        yield partial(_dropped_in_turn, closed, family(module)[0], len(blocks(module)), signed)


def _gated(closed: dict[str, int], layer: int, _: nn.Module, __: tuple, out: Any) -> Any:
    if isinstance(out, Tensor):
        return _Gate.apply(out, closed, layer)
    return (_Gate.apply(out[0], closed, layer), *out[1:])


class _Gate(torch.autograd.Function):
    """The value as it is; backward nothing, if the layer is closed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, closed: dict[str, int], layer: int) -> Tensor:  # type: ignore[override]
        ctx.closed, ctx.layer = closed, layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        shut = ctx.closed["layer"] == ctx.layer
        return torch.zeros_like(gradient) if shut else gradient, None, None


def _dropped_in_turn(
    closed: dict[str, int],
    blocks: str,
    layers: int,
    signed: bool,
    total: Tensor,
    nodes: Mapping[int, Tensor],
    sites: Mapping[int, Site],
) -> dict[int, Tensor]:
    """Gradients without each layer but the site's own: their mean [b, t, d] if signed, else all
    of them [b, t, layers, d], to be averaged when their sizes are known.
    """
    own = {n: layer_around(sites[n], blocks) for n in nodes}
    counted = {n: [k for k in range(layers) if k != own[n]] or [-1] for n in nodes}
    order = sorted({layer for others in counted.values() for layer in others})
    slopes: dict[int, list[Tensor]] = {n: [] for n in nodes}
    for layer in order:
        closed["layer"] = layer
        for n, slope in plain_slopes(total, nodes, sites, keep=layer != order[-1]).items():
            if layer not in counted[n]:
                continue
            if signed:
                part = slope.to(torch.promote_types(slope.dtype, torch.float32)) / len(counted[n])
                slopes[n] = [slopes[n][0].add_(part)] if slopes[n] else [part]
            else:
                slopes[n].append(slope)
    return {n: some[0] if signed else torch.stack(some, 2) for n, some in slopes.items()}


def layer_around(site: Site, blocks: str) -> int | None:
    """The layer whose branches a site lies in; None for the residual stream around them."""
    if site.kind in ("resid_pre", "resid_post"):
        return None
    if site.layer is not None:
        return site.layer
    inside = re.match(re.escape(blocks) + r"\.(\d+)\.(?!input$|output$)", site.kind)
    return None if inside is None else int(inside[1])
