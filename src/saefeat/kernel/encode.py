"""Latents from a site's value, reading only the columns that were selected.

Dictionaries give plain columns, and ``encoder_of`` makes the typed encoder of them that travels: of
one activation function and one input norm, so that a request brings no others. A ``columns``
dictionary holds the selected latents of one dictionary, k of them:

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
``norm``         str            none | layer_norm | constant_norm_rescale |
                                centered_norm_rescale
``inner``        str            error only: the activation function of the SAE
``decoder``      [d_sae, d]     error only, with ``decoder_bias`` [d] and ``centered``,
                                whether it decodes x less its mean
===============  =============  ==============================================================

sae-lens keeps the scale of the last two norms on the module between ``encode`` and ``decode``,
so encode(a), encode(b), decode(f_a) is silently wrong there. Here it is a return value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import SaefeatError
from .frozen import Frozen, plainly

if TYPE_CHECKING:
    from jaxtyping import Float


@runtime_checkable
class AnyEncoder(Protocol):
    """Latents of a site's value."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """f [*batch, k] of x [*batch, d_in], and the scale their directions carry, if not 1."""
        ...


class Encoder(Frozen):
    """Latents whose activation is a function of one linear map."""

    encoder: Tensor  # [d_in, k], or [d_in, d_sae] for topk kinds
    activation: Any  # one of the classes below
    norm: Any  # LayerNorm, ConstantNorm or None

    def encode(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch 1"] | None]:
        z, scale = (x, None) if self.norm is None else self.norm.normalize(x)
        return self.activation.of(z @ self.encoder), scale


class Identity(Frozen):
    """f = h + bias."""

    bias: Tensor

    def of(self, h: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        return h + self.bias


class ReLU(Frozen):
    """f = relu(h + bias)."""

    bias: Tensor

    def of(self, h: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        return torch.relu(h + self.bias)


class JumpReLU(Frozen):
    """f = relu(h + bias) where h + bias exceeds the threshold."""

    bias: Tensor
    threshold: Tensor

    def of(self, h: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        h = h + self.bias
        return torch.relu(h) * (h > self.threshold)


class Gated(Frozen):
    """f = relu(h · gain + bias) where h + gate_bias is positive."""

    bias: Tensor
    gain: Tensor
    gate_bias: Tensor

    def of(self, h: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        return torch.relu(h * self.gain + self.bias) * (h + self.gate_bias > 0)


class TopK(Frozen):
    """The k largest of all d_sae pre-activations, of which some latents were asked for.

    The support depends on every latent, which is why topk kinds carry all columns.
    """

    bias: Tensor  # [d_sae]
    kind: str  # topk or abstopk
    k: int
    selected: Tensor

    def of(self, h: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch k"]:
        return top(self.kind, self.k, h + self.bias)[..., self.selected]


def top(kind: str, k: int, h: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k largest pre-activations (by magnitude for abstopk), zero the rest."""
    if kind == "abstopk":
        index = h.abs().topk(k, dim=-1, sorted=False).indices
        return torch.zeros_like(h).scatter(-1, index, h.gather(-1, index))
    values, index = h.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(h).scatter(-1, index, values.relu())


class LayerNorm(Frozen):
    """x less its mean, over its standard deviation."""

    def normalize(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch 1"]]:
        """The value an SAE was trained on, and the scale that undoes it."""
        centered = x - x.mean(dim=-1, keepdim=True)
        scale = centered.std(dim=-1, keepdim=True)  # unbiased, as sae-lens has it
        return centered / (scale + 1e-5), scale


class ConstantNorm(Frozen):
    """x with a norm of sqrt(d_in)."""

    def normalize(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch 1"]]:
        """The value an SAE was trained on, and the scale that undoes it."""
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / scale.clamp(min=torch.finfo(x.dtype).tiny), scale  # a zero stays zero


class CenteredNorm(Frozen):
    """x less its mean, with a norm of sqrt(d_in)."""

    def normalize(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch 1"]]:
        """The value an SAE of a centered stream was trained on, and the scale that undoes it."""
        centered = x - x.mean(dim=-1, keepdim=True)
        scale = centered.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return centered / scale.clamp(min=torch.finfo(x.dtype).tiny), scale


class Decoder(Frozen):
    """The reconstruction from all latents."""

    decoder: Tensor  # [d_sae, d]
    bias: Tensor
    centered: bool  # whether the encoder took the mean of x away

    def decode(
        self,
        f: Float[Tensor, "*batch d_sae"],
        x: Float[Tensor, "*batch d"],
        scale: Float[Tensor, "*batch 1"] | None,
    ) -> Float[Tensor, "*batch d"]:
        """x and its scale undo an input normalization."""
        out = f @ self.decoder + self.bias
        out = out if scale is None else out * scale
        return out + x.mean(dim=-1, keepdim=True) if self.centered else out


class Error(Frozen):
    """The error term: one latent that is always 1, and whose direction is the error itself.

    So its scale is [*batch, d], on a direction of ones.
    """

    inner: Encoder
    outer: Decoder

    def encode(
        self, x: Float[Tensor, "*batch d"]
    ) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch d"]]:
        f, scale = self.inner.encode(x)
        return torch.ones_like(x[..., :1]), x - self.outer.decode(f, x, scale)


class Called(Frozen):
    """Latents that a function of somebody else's making gives."""

    function: Callable[[Tensor], Tensor]
    norm: Any
    local: str | None = None  # why it cannot be sent to a server

    def encode(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch 1"] | None]:
        z, scale = (x, None) if self.norm is None else self.norm.normalize(x)
        return self.function(z), scale


NORMS = {
    "none": None,
    "layer_norm": LayerNorm(),
    "constant_norm_rescale": ConstantNorm(),
    "centered_norm_rescale": CenteredNorm(),
}


def encoder_of(columns: dict[str, Any]) -> AnyEncoder:
    """The encoder of a dictionary's columns."""
    kind, norm = columns["activation"], NORMS[columns["norm"]]
    if not isinstance(kind, str):
        return Called(function=kind, norm=norm, local=columns.get("local"))
    inner = columns["inner"] if kind == "error" else kind
    bias = columns["bias"]
    if inner in ("topk", "abstopk"):
        activation = TopK(bias=bias, kind=inner, k=columns["k"], selected=columns["selected"])
    elif inner == "gated":
        activation = Gated(bias=bias, gain=columns["gain"], gate_bias=columns["gate_bias"])
    elif inner == "jumprelu":
        activation = JumpReLU(bias=bias, threshold=columns["threshold"])
    else:
        activation = (Identity if inner == "identity" else ReLU)(bias=bias)
    encoder = Encoder(encoder=columns["encoder"], activation=activation, norm=norm)
    return Error(inner=encoder, outer=decoder_of(columns)) if kind == "error" else encoder


def decoder_of(columns: dict[str, Any]) -> Decoder:
    """The decoder of all of a dictionary's columns."""
    centered = columns["norm"] == "layer_norm" or columns.get("centered", False)
    return Decoder(decoder=columns["decoder"], bias=columns["decoder_bias"], centered=centered)


def encode(
    columns: dict[str, Any], x: Float[Tensor, "*batch d_in"]
) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch _"] | None]:
    """Activations of the selected latents, and the scale their directions carry, if not 1.

    ``x`` must already be in the compute dtype (float32, or float64 for float64 models):
    a bfloat16 encode flips active latents.
    """
    with plainly(x.device.type):
        return encoder_of(columns).encode(x)


def scored(scorer: Any, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 1"]:
    """A user's score of a site's value as one latent: how a condition reads a function."""
    with torch.no_grad():
        score = scorer(x.detach())
    if not isinstance(score, Tensor) or score.shape != x.shape[:2]:
        got = f"of shape {tuple(score.shape)}" if isinstance(score, Tensor) else repr(score)
        raise SaefeatError(
            f"saefeat: the scorer of a When gave a score {got} for x of shape {tuple(x.shape)},"
            f" wanted {tuple(x.shape[:2])}, one number a token. Likely cause: a last dimension of"
            " one, or a mean over tokens. Try: lambda x: probe(x).squeeze(-1)."
        )
    return score.to(x.dtype).unsqueeze(-1)


def picked(own: Any, indices: Tensor, x: Float[Tensor, "*batch d_in"]) -> Tensor:
    """The selected latents of an encoder of somebody else's making; here, so that it travels."""
    return own(x)[..., indices.to(x.device)]
