"""Latents from a site's value, reading only the columns that were selected.

A ``columns`` dictionary holds the selected latents of one dictionary, k of them:

===============  =============  ==============================================================
key              shape          meaning
===============  =============  ==============================================================
``activation``   str            identity | relu | jumprelu | gated | topk | abstopk | error,
                                or a function x [..., d_in] → f [..., k]
``prefix``       bool           of a function: whether f depends on earlier tokens; x is then
                                [..., tokens, d_in], whole sequences
``local``        str            of a function: why it cannot be sent to a server, if it cannot
``encoder``      [d_in, k]      encoder columns (all of them, [d_in, d_sae], for topk kinds)
``bias``         [k]            encoder bias with the decoder bias folded in
``directions``   [k, d_out]     what one unit of the latent adds to the write site
``threshold``    [k]            jumprelu only
``gate_bias``    [k]            gated only
``gain``         [k]            gated only: exp(r_mag)
``k``            int            topk kinds only: how many latents stay active
``selected``     [k]            topk kinds only: which of the d_sae latents were asked for
``norm``         str            none | layer_norm | constant_norm_rescale
``inner``        str            error only: the activation function of the SAE
``decoder``      [d_sae, d]     error only, with ``decoder_bias`` [d] and ``centered``,
                                whether it decodes x less its mean
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
) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch _"] | None]:
    """Activations of the selected latents, and the scale their directions carry.

    The error term is one latent that is always 1 and whose direction is the error itself, so its
    scale is [*batch, d_in] on a direction of ones.

    ``x`` must already be in the compute dtype (float32, or float64 for float64 models):
    a bfloat16 encode flips active latents. The scale is None where directions are constant.
    """
    own = columns["activation"]
    z, scale = normalize(columns["norm"], x)
    if not isinstance(own, str):  # a dictionary of somebody else's making
        return own(z), scale
    h = z @ columns["encoder"]  # [*batch, k], or [*batch, d_sae] for topk kinds
    if columns["activation"] == "error":
        f = activate({**columns, "activation": columns["inner"]}, h)
        return torch.ones_like(x[..., :1]), x - decode(columns, f, x, scale)
    return activate(columns, h), scale


def scored(scorer: Any, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 1"]:
    """A user's score of a site's value as one latent: how a condition reads a function."""
    with torch.no_grad():
        score = scorer(x.detach())
    if not isinstance(score, Tensor) or score.shape != x.shape[:2]:
        got = f"of shape {tuple(score.shape)}" if isinstance(score, Tensor) else repr(score)
        raise ValueError(
            f"saefeat: the scorer of a When gave a score {got} for x of shape {tuple(x.shape)},"
            f" wanted {tuple(x.shape[:2])}, one number a token. Likely cause: a last dimension of"
            " one, or a mean over tokens. Try: lambda x: probe(x).squeeze(-1)."
        )
    return score.to(x.dtype).unsqueeze(-1)


def decode(
    columns: dict[str, Any],
    f: Float[Tensor, "*batch k"],
    x: Float[Tensor, "*batch d_in"],
    scale: Float[Tensor, "*batch 1"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """The reconstruction from all latents; x and its scale undo an input normalization."""
    out = f @ columns["decoder"] + columns["decoder_bias"]
    out = out if scale is None else out * scale
    mean_out = columns["norm"] == "layer_norm" or columns.get("centered", False)
    return out + x.mean(dim=-1, keepdim=True) if mean_out else out


def normalize(
    norm: str, x: Float[Tensor, "*batch d_in"]
) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch 1"] | None]:
    """The input normalization an SAE was trained with, and the scale that undoes it."""
    if norm == "none":
        return x, None
    if norm == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5  # [*batch, 1]
        return x / scale.clamp(min=torch.finfo(x.dtype).tiny), scale  # a zero stays zero
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
    return top(kind, columns["k"], h)[..., columns["selected"]]


def top(kind: str, k: int, h: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k largest pre-activations (by magnitude for abstopk), zero the rest.

    The support depends on every latent, which is why topk kinds carry all columns.
    """
    if kind == "abstopk":
        index = h.abs().topk(k, dim=-1, sorted=False).indices
        return torch.zeros_like(h).scatter(-1, index, h.gather(-1, index))
    values, index = h.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(h).scatter(-1, index, values.relu())


def picked(own: Any, indices: Tensor, x: Float[Tensor, "*batch d_in"]) -> Tensor:
    """The selected latents of an encoder of somebody else's making; here, so that it travels."""
    return own(x)[..., indices.to(x.device)]
