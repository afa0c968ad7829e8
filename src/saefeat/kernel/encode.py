"""Latents from a site's value, reading only the columns that were selected.

A ``columns`` dictionary holds the selected latents of one dictionary, k of them:

===============  =============  ==============================================================
key              shape          meaning
===============  =============  ==============================================================
``activation``   str            identity | relu | jumprelu | gated | topk | abstopk
``encoder``      [d_in, k]      encoder columns (all of them, [d_in, d_sae], for topk kinds)
``bias``         [k]            encoder bias with the decoder bias folded in
``directions``   [k, d_out]     what one unit of the latent adds to the write site
``threshold``    [k]            jumprelu only
``gate_bias``    [k]            gated only
``gain``         [k]            gated only: exp(r_mag)
``k``            int            topk kinds only: how many latents stay active
``selected``     [k]            topk kinds only: which of the d_sae latents were asked for
``norm``         str            none | layer_norm | constant_norm_rescale
===============  =============  ==============================================================

sae-lens keeps the scale of the last two norms on the module between ``encode`` and ``decode``,
so encode(a), encode(b), decode(f_a) is silently wrong there. Here it is a return value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def encode(
    columns: dict[str, Any], x: Float[Tensor, "*batch d_in"]
) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch 1"] | None]:
    """Activations of the selected latents, and the scale their directions carry.

    ``x`` must already be in the compute dtype (float32, or float64 for float64 models):
    a bfloat16 encode flips active latents. The scale is None where directions are constant.
    """
    x, scale = normalize(columns["norm"], x)
    h = x @ columns["encoder"]  # [*batch, k], or [*batch, d_sae] for topk kinds
    return activate(columns, h), scale


def normalize(
    norm: str, x: Float[Tensor, "*batch d_in"]
) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch 1"] | None]:
    """The input normalization an SAE was trained with, and the scale that undoes it."""
    if norm == "none":
        return x, None
    if norm == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5  # [*batch, 1]
        return x / scale, scale
    centered = x - x.mean(dim=-1, keepdim=True)
    scale = centered.std(dim=-1, keepdim=True)  # unbiased, as sae-lens has it
    return centered / (scale + 1e-5), scale


def activate(columns: dict[str, Any], h: Float[Tensor, "*batch h"]) -> Float[Tensor, "*batch k"]:
    """The activation function, on pre-activations without their bias."""
    kind = columns["activation"]
    if kind == "gated":
        open_gate = h + columns["gate_bias"] > 0
        return torch.relu(h * columns["gain"] + columns["bias"]) * open_gate
    h = h + columns["bias"]
    if kind == "identity":
        return h
    if kind == "relu":
        return torch.relu(h)
    if kind == "jumprelu":
        return torch.relu(h) * (h > columns["threshold"])
    return top(columns, h)[..., columns["selected"]]


def top(columns: dict[str, Any], h: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k largest pre-activations (by magnitude for abstopk), zero the rest.

    The support depends on every latent, which is why topk kinds carry all columns.
    """
    if columns["activation"] == "abstopk":
        index = h.abs().topk(columns["k"], dim=-1, sorted=False).indices
        return torch.zeros_like(h).scatter(-1, index, h.gather(-1, index))
    values, index = h.topk(columns["k"], dim=-1, sorted=False)
    return torch.zeros_like(h).scatter(-1, index, values.relu())
