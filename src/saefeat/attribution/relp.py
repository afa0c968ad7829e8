"""RelP: relevance propagation in place of the gradient, as hooks on a block's modules.

Each rule is written as the graph that autograd is to see, added to the value the module made: a
module's own graph is cut before it (its input is detached), and after it what the rule says is
put in its place. The value stays what it is, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..errors import ModelError
from ..model.modules import blocks, family
from ..model.sites import Site
from .methods import Backward, Slopes, plain_slopes

_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm", "ln_1", "ln_2"),
)
_FINAL = ("norm", "ln_f", "final_layer_norm")
CHECKED = (
    *("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "olmo2"),
    *("gemma2", "gemma3_text", "gemma3"),
)
"""Model types whose blocks the rules were checked on: the table of sites has more."""
CHECKED_NESTED = ("llava", "mistral3", "qwen2_vl", "qwen2_5_vl")
"""Multimodal ones that GradDrop was checked on, whose branches have the usual names."""


@checked
@final
@dataclass(frozen=True)
class RelP(Backward):
    """Relevance propagation in place of the gradient, at the gradient's price.

    The rules of layer-wise relevance propagation as RelP has them (arXiv 2508.21258): a norm is
    linear, its scale a constant; an element-wise function is multiplication by f(x) / x, a
    constant, the activation functions and the soft cap of Gemma-2's final logits alike; attention
    patterns are constants, and with them everything before the softmax, its soft cap included;
    where two values are multiplied, as in a gated MLP, each gets half. Linear layers are as they
    are, and branches that run side by side (gpt_neox) add up as they do forward.

    Scores are coefficients of the model linearized *as a whole* at the clean run, not slopes, so
    they may be right where a gradient saturates, and wrong about a small change. For the
    model types it was checked on, fused projections (phi3, gpt_neox) included; others are
    refused, and so is a site at the input of a norm or an activation function, which is inside
    what a rule replaces.

    Examples:
        >>> sf.attribution.RelP()
        RelP()
    """

    def applied(self, module: nn.Module) -> AbstractContextManager[Slopes]:
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind in CHECKED:
            return _linearized(module)
        raise ModelError(
            f"RelP: `model` is of family {kind!r}, wanted one of {', '.join(CHECKED)}. Likely"
            " cause: the rules name the parts of a block, and have not been checked on this one."
            " Try: AtP() or IG() without backward="
        )


@contextmanager
def _linearized(module: nn.Module) -> Iterator[Slopes]:
    """RelP's rules as hooks."""
    path = family(module)[0]
    stem = module.get_submodule(path.rpartition(".")[0])
    norms = [getattr(stem, name) for name in _FINAL if hasattr(stem, name)]
    replaced: list[nn.Module] = []
    with ExitStack() as stack:
        # once each: a second pair of hooks on a norm would take the gradient away altogether
        for block in dict.fromkeys(blocks(module)):
            norms += [getattr(block, name) for name in _NORMS if hasattr(block, name)]
            _constant_pattern(stack, block)
            replaced.append(_linear_mlp(stack, block.get_submodule("mlp")))
        for norm in norms:
            _linear_norm(stack, norm)
        _linear_cap(stack, module)
        yield partial(_slopes, module, (*norms, *replaced))


def _slopes(
    module: nn.Module,
    replaced: tuple[nn.Module, ...],
    total: Tensor,
    nodes: Mapping[int, Tensor],
    sites: Mapping[int, Site],
) -> dict[int, Tensor]:
    """The gradient of the linearized model, where its graph holds the sites' nodes."""
    for site in sites.values():
        path, _, end = site.kind.rpartition(".")
        if end == "input" and any(module.get_submodule(path) is part for part in replaced):
            raise ModelError(
                f"RelP: `target` is written at {site}, wanted a site before or behind the module,"
                " not at its input. Likely cause: the rule replaces this module's graph, and no"
                " relevance would pass the site. Try: the site where the value is made, such as"
                ' "resid_pre.3" or "model.layers.3.mlp.gate_proj.output"'
            )
    return plain_slopes(total, nodes, sites)


def _linear_norm(stack: ExitStack, norm: nn.Module) -> None:
    held: list[Tensor] = []

    def before(_: nn.Module, args: tuple) -> tuple:
        held[:] = [args[0]]
        return (args[0].detach(), *args[1:])

    def after(module: nn.Module, _: tuple, out: Tensor) -> Tensor:
        x = held.pop()
        if isinstance(module, nn.LayerNorm):  # the mean is linear and stays
            return _added(out, (x - x.mean(-1, keepdim=True)) * _layer_scale(module, x))
        return _added(out, x * _rms_scale(module, x))

    stack.callback(norm.register_forward_pre_hook(before).remove)
    stack.callback(norm.register_forward_hook(after).remove)


@torch.no_grad()
def _layer_scale(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A LayerNorm's weight / σ."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()
    return (scale if norm.weight is None else scale * norm.weight).to(x.dtype)


@torch.no_grad()
def _rms_scale(norm: nn.Module, x: Tensor) -> Tensor:
    """An RMS norm's weight / σ. Norms differ in how they hold their weight, and agree in that σ is
    all they know of x: so a vector of the same σ in all coordinates shows the weight.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = wide.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    return (type(norm).forward(norm, size.expand_as(wide)) / size).to(x.dtype)


def _constant_pattern(stack: ExitStack, block: nn.Module) -> None:
    """Queries and keys without gradient: the pattern they make is then a constant."""
    inner: Any = getattr(block, "attn", None) or getattr(block, "attention", None)
    inner = getattr(block, "self_attn", None) if inner is None else inner
    for name in ("q_proj", "k_proj"):
        if hasattr(inner, name):
            hook = getattr(inner, name).register_forward_hook(lambda _, __, out: out.detach())
            stack.callback(hook.remove)
    for name, of_values in _VALUES.items():
        if hasattr(inner, name):
            hook = partial(_only_values, inner, of_values)
            stack.callback(getattr(inner, name).register_forward_hook(hook).remove)


def _only_values(attention: Any, of_values: Any, _: nn.Module, __: tuple, out: Tensor) -> Tensor:
    """A fused projection's output, with the gradient of the values' columns alone."""
    column = torch.arange(out.shape[-1], device=out.device)
    return torch.where(of_values(attention, column), out, out.detach())


_VALUES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    # gpt2: queries, keys and values one after another
    "c_attn": lambda _, column: column >= len(column) // 3 * 2,
    # phi3: likewise, with fewer heads of keys and values
    "qkv_proj": lambda a, column: column >= len(column) - a.num_key_value_heads * a.head_dim,
    # gpt_neox: head by head, each with its query, key and value
    "query_key_value": lambda a, column: column % (3 * a.head_size) >= 2 * a.head_size,
}
"""Fused projection → which of its columns are values."""


def _linear_mlp(stack: ExitStack, mlp: nn.Module) -> nn.Module:
    """The rules of an MLP; gives its activation function."""
    fused = hasattr(mlp, "gate_up_proj")
    gated = fused or hasattr(mlp, "up_proj")
    names = ("act_fn", "activation_fn", "act")
    activation: nn.Module = next(getattr(mlp, name) for name in names if hasattr(mlp, name))
    held: list[Tensor] = []

    def before(_: nn.Module, args: tuple) -> tuple:
        held[:] = [args[0]]
        return (args[0].detach(),)

    def activated(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
        x = held.pop()  # ``out`` has no graph but that of a site here: both get the product's share
        return _added(out.detach(), out + x * _ratio(out, x), 0.5 if gated else 1.0)

    def halved(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
        share = torch.full_like(out[0, 0], 0.5)
        share[: len(share) // 2 if fused else 0] = 1.0  # gates have theirs behind the activation
        return _added(out.detach(), out * share)

    stack.callback(activation.register_forward_pre_hook(before).remove)
    stack.callback(activation.register_forward_hook(activated).remove)
    if gated:
        up = mlp.get_submodule("gate_up_proj" if fused else "up_proj")
        stack.callback(up.register_forward_hook(halved).remove)
    return activation


def _linear_cap(stack: ExitStack, module: nn.Module) -> None:
    """The soft cap of the final logits, cap · tanh(z / cap), as multiplication by a constant.

    No module makes it: transformers caps in the model's own forward, where nnsight looks at the
    output before any hook. So it is switched off for the pass, and done behind the unembedding,
    by the same three operations in the same order.
    """
    config: Any = module.config
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        return

    def capped(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
        value = torch.tanh(out / cap) * cap
        return _added(value.detach(), out * _ratio(value, out, at_zero=1.0))

    stack.callback(setattr, config, "final_logit_softcapping", cap)
    config.final_logit_softcapping = None
    head: Any = module.get_output_embeddings()  # type: ignore[operator]
    stack.callback(head.register_forward_hook(capped).remove)


def _ratio(y: Tensor, x: Tensor, at_zero: float = 0.0) -> Tensor:
    """The quotient y / x, a constant."""
    y, x = y.detach(), x.detach()
    return torch.where(x == 0, at_zero, y / torch.where(x == 0, 1.0, x))


def _added(value: Tensor, slope: Tensor, share: float = 1.0) -> Tensor:
    """The value, to the bit, with the slope's graph added to its own."""
    return value + share * (slope - slope.detach()).to(value.dtype)
