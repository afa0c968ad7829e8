"""Backward rules: what stands in for the gradient where the plain one misleads.

A rule changes how gradients flow through the model, never a value. It is put on the modules by
hooks for the length of one forward pass, and is gone after it, after an error and after Ctrl-C
alike; the graph that was built keeps it.

nnsight facts these lines rest on (0.8.1, each tried): its own reading and writing of a module lies
around ``forward``, inside torch's hooks. So a pre-hook comes before a site at the module's input,
and a hook after a site at its output: what a hook adds must be added to the value it is given, or
the site's node would drop out of the graph. ``type(module).forward`` runs without nnsight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import ModelError, explain
from ..sites import Site, family, layer_count

Slopes = Callable[[Tensor, Mapping[int, Tensor], Mapping[int, Site]], dict[int, Tensor]]
"""``slopes(total [], nodes, sites)``: the gradient of the total at each node."""

LRP_FAMILIES = (
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2"),
    *("gemma", "gemma2", "gemma3_text", "gemma3"),
)
_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm", "ln_1", "ln_2"),
)
_BRANCHES = {"gpt2": ("attn", "mlp"), "gpt_neox": ("attention", "mlp")}


class Backward(ABC):
    """A way for gradients to flow backward through the model, in place of the plain one.

    Attributes:
        signed: whether scores are signed, or sizes alone.

    Examples:
        >>> issubclass(sf.RelP, sf.Backward)
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
    found = torch.autograd.grad(
        total, [nodes[n] for n in order], materialize_grads=True, retain_graph=keep
    )
    return dict(zip(order, found, strict=True))


@final
@dataclass(frozen=True)
class RelP(Backward):
    """Relevance propagation in place of the gradient, at the gradient's price.

    The rules of layer-wise relevance propagation as RelP has them (arXiv 2508.21258): a norm is
    linear, its scale a constant; an activation function is multiplication by f(x) / x, a constant;
    attention patterns are constants; where two values are multiplied each gets half. Linear
    layers are as they are, and so is the soft cap of Gemma-2's final logits.

    Scores are coefficients of the model linearized *as a whole* at the clean run, not slopes, so
    they may be right where a gradient saturates, and wrong about a small change. For gpt2, llama,
    mistral, qwen2, qwen3, olmo2, gemma and gemma2/3; others are refused.

    Examples:
        >>> sf.RelP()
        RelP()
    """

    def applied(self, module: nn.Module) -> AbstractContextManager[Slopes]:
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind in LRP_FAMILIES:
            return _linearized(module)
        raise ModelError(
            explain(
                "RelP",
                "model",
                got=f"of family {kind!r}",
                wanted="one of " + ", ".join(LRP_FAMILIES),
                cause="the rules name the parts of a block, and have not been checked on this one",
                call="AtP() or IG() without backward=",
            )
        )


@final
@dataclass(frozen=True)
class GradDrop(Backward):
    """The mean of gradients with one layer's attention and MLP left out in turn (AtP*).

    Where a direct effect and one through a later layer cancel, the plain gradient is near zero
    though each is large; leaving a layer out uncovers it (Kramár et al. 2024, section 3.1.2; they
    average absolute values, this keeps the sign). A site inside a layer's own branches is averaged
    over the other layers. One forward pass, and a backward pass for each layer.

    Examples:
        >>> sf.GradDrop()
        GradDrop()
    """

    def applied(self, module: nn.Module) -> AbstractContextManager[Slopes]:
        return _dropping(module)


@contextmanager
def _linearized(module: nn.Module) -> Iterator[Slopes]:
    """RelP's rules as hooks."""
    blocks = module.get_submodule(family(module)[0])
    stem = family(module)[0].rpartition(".")[0]
    final_norm = getattr(module.get_submodule(stem), "norm", None) or module.get_submodule(
        f"{stem}.ln_f"
    )
    with ExitStack() as stack:
        _linear_norm(stack, final_norm)
        for block in blocks.children():
            for name in _NORMS:
                if hasattr(block, name):
                    _linear_norm(stack, getattr(block, name))
            _constant_pattern(stack, block)
            _linear_mlp(stack, block.mlp)  # type: ignore[arg-type]
        yield plain_slopes


def _linear_norm(stack: ExitStack, norm: nn.Module) -> None:
    held: list[Tensor] = []

    def before(_: nn.Module, args: tuple) -> tuple:
        held[:] = [args[0]]
        return (args[0].detach(), *args[1:])

    def after(module: nn.Module, _: tuple, out: Tensor) -> Tensor:
        return _added(out, _times_scale(module, held.pop()))

    stack.callback(norm.register_forward_pre_hook(before).remove)
    stack.callback(norm.register_forward_hook(after).remove)


def _times_scale(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm with its scale a constant: weight · x / σ, centered first for a LayerNorm."""
    if isinstance(norm, nn.LayerNorm):
        centered = x - x.mean(-1, keepdim=True)
        scale = (x.var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()
        return centered * (scale * norm.weight).detach()
    with torch.no_grad():  # RMS norms differ in how they hold their weight: y / x is it, scaled
        y = type(norm).forward(norm, x)
    return x * _ratio(y, x)


def _ratio(y: Tensor, x: Tensor) -> Tensor:
    """The quotient y / x, a constant; zero where x is, as y is there too."""
    y, x = y.detach(), x.detach()
    return torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x))


def _added(value: Tensor, slope: Tensor, share: float = 1.0) -> Tensor:
    """The value, to the bit, with the slope's graph added to its own."""
    return value + share * (slope - slope.detach()).to(value.dtype)


def _constant_pattern(stack: ExitStack, block: nn.Module) -> None:
    """Queries and keys without gradient: the pattern they make is then a constant."""
    if hasattr(block, "attn"):  # gpt2: one projection, queries and keys first

        def cut(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
            third = out.shape[-1] // 3
            return torch.cat([out[..., : 2 * third].detach(), out[..., 2 * third :]], -1)

        stack.callback(block.attn.c_attn.register_forward_hook(cut).remove)  # type: ignore[union-attr, operator]
        return
    for name in ("q_proj", "k_proj"):
        projection: nn.Module = getattr(block.self_attn, name)
        stack.callback(projection.register_forward_hook(lambda _, __, out: out.detach()).remove)


def _linear_mlp(stack: ExitStack, mlp: nn.Module) -> None:
    gated = hasattr(mlp, "up_proj")

    def activated(_: nn.Module, args: tuple, out: Tensor) -> Tensor:
        x = args[0]
        return _added(out.detach(), x * _ratio(out, x), 0.5 if gated else 1.0)

    def halved(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
        return _added(out.detach(), out, 0.5)

    activation: nn.Module = mlp.act_fn if gated else mlp.act  # type: ignore[assignment]
    stack.callback(activation.register_forward_hook(activated).remove)
    if gated:
        stack.callback(mlp.up_proj.register_forward_hook(halved).remove)  # type: ignore[union-attr, operator]


@contextmanager
def _dropping(module: nn.Module) -> Iterator[Slopes]:
    """A gate behind every branch, to be closed layer by layer in the backward passes."""
    state: dict[str, int] = {"closed": -1}
    kind = getattr(getattr(module, "config", None), "model_type", "")
    blocks = module.get_submodule(family(module)[0])
    with ExitStack() as stack:
        for layer, block in enumerate(blocks.children()):
            for name in _BRANCHES.get(kind, ("self_attn", "mlp")):
                hook = partial(_gated, state, layer)
                stack.callback(getattr(block, name).register_forward_hook(hook).remove)
        yield partial(_dropped_in_turn, state, layer_count(module))


def _gated(state: dict[str, int], layer: int, _: nn.Module, __: tuple, out: Any) -> Any:
    if isinstance(out, Tensor):
        return _Gate.apply(out, state, layer)
    return (_Gate.apply(out[0], state, layer), *out[1:])


class _Gate(torch.autograd.Function):
    """The value as it is; backward nothing, if the layer is closed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: dict[str, int], layer: int) -> Tensor:  # type: ignore[override]
        ctx.state, ctx.layer = state, layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        closed = ctx.state["closed"] == ctx.layer
        return torch.zeros_like(gradient) if closed else gradient, None, None


def _dropped_in_turn(
    state: dict[str, int],
    layers: int,
    total: Tensor,
    nodes: Mapping[int, Tensor],
    sites: Mapping[int, Site],
) -> dict[int, Tensor]:
    """The mean over layers; a layer's own branches do not count for the sites inside them."""
    whole = ("resid_pre", "resid_post")
    counted = {
        n: [k for k in range(layers) if sites[n].kind in whole or k != sites[n].layer] or [-1]
        for n in nodes
    }
    found = {n: torch.zeros_like(node) for n, node in nodes.items()}
    order = [-1] if layers == 1 else range(layers)
    for layer in order:
        state["closed"] = layer
        slopes = plain_slopes(total, nodes, sites, keep=layer != order[-1])
        for n, slope in slopes.items():
            if layer in counted[n]:
                found[n] += slope / len(counted[n])
    return found
