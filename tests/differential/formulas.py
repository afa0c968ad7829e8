"""Dictionaries by their textbook formulas, from the raw weights, nothing folded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Basis
from .weights import inner, tensors


@dataclass
class Read:
    """f [b, t, n] of all latents, what one unit of each adds ``[n, d]`` times ``scale`` [b, t, ·],
    pre-activations that compete in a topk, and how near any decision was."""

    f: Tensor
    directions: Tensor
    scale: Tensor
    open: Tensor
    near: Tensor  # [b, t, n] or [b, t, 1]: distance from where it would be another value


def read(basis: Basis, family: str, x: Tensor) -> Read:
    """A dictionary at every token of x [b, t, d]."""
    w = {name: t.to(x.dtype) for name, t in tensors(basis, family).items()}
    one, far = torch.ones_like(x[..., :1]), torch.full_like(x[..., :1], torch.inf)
    if basis.kind == "direction":
        f = x @ w["rows"].T
        return Read(f, w["rows"], one, f, far)
    if basis.kind == "neurons":
        return Read(x, torch.eye(x.shape[-1], dtype=x.dtype), one, x, far)
    if basis.kind == "function":
        f = (x @ w["A"]).pow(2)
        return Read(f, w["directions"], one, f, far)
    if basis.kind == "prefix":
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        f = (x @ w["A"]).cumsum(1) / count
        return Read(f, w["directions"], one, f, far)
    found, mean = _sae(basis, w, x)
    if not basis.kind.startswith("error of "):
        return found
    rebuilt = (found.f @ found.directions + w["b_dec"]) * found.scale + mean
    return Read(one, torch.ones(1, x.shape[-1], dtype=x.dtype), x - rebuilt, one, found.near)


def _sae(basis: Basis, w: dict[str, Tensor], x: Tensor) -> tuple[Read, Tensor]:
    """An SAE's latents, and the mean that its decoder puts back."""
    z, scale, mean = x, torch.ones_like(x[..., :1]), torch.zeros_like(x[..., :1])
    if basis.centered or basis.norm == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        z = x - mean
    if basis.norm == "layer_norm":
        scale = z.std(-1, keepdim=True)
        z = z / (scale + 1e-5)
    if basis.norm == "constant_norm_rescale":
        scale = z.norm(dim=-1, keepdim=True) / z.shape[-1] ** 0.5
        z = z / scale
    if basis.subtract:
        z = z - w["b_dec"]
    kind, directions = inner(basis), w["W_dec"]
    h = z @ w["W_enc"]
    if kind == "gated":
        gate, size = h + w["b_gate"], h * w["r_mag"].exp() + w["b_mag"]
        f = torch.where(gate > 0, size.relu(), 0.0)
        return Read(f, directions, scale, f, torch.minimum(gate.abs(), size.abs())), mean
    h = h + w["b_enc"]
    if "jumprelu" in kind:
        f = torch.where(h > w["threshold"], h.relu(), 0.0)
        return Read(f, directions, scale, f, (h - w["threshold"]).abs()), mean
    if kind in ("topk", "abstopk"):
        if basis.rescale:
            lengths = directions.norm(dim=1)
            h, directions = h * lengths, directions / lengths[:, None]
        open_ = h.relu() if kind == "topk" else h
        f, near = largest(kind, basis.k, open_), edge(kind, basis.k, open_)
        return Read(f, directions, scale, open_, near), mean
    return Read(h.relu(), directions, scale, h.relu(), h.abs()), mean


def largest(kind: str, k: int, h: Tensor) -> Tensor:
    """All but the k largest set to zero: by value and above zero, or by size for abstopk."""
    size = h.abs() if kind == "abstopk" else h
    kept = h * torch.zeros_like(h).scatter(-1, size.argsort(-1, descending=True)[..., :k], 1.0)
    return kept if kind == "abstopk" else kept.relu()


def edge(kind: str, k: int, h: Tensor) -> Tensor:
    """[..., 1]: how far the k-th largest is above the next, unless neither is anything."""
    size = (h.abs() if kind == "abstopk" else h.relu()).sort(-1, descending=True).values
    if k >= h.shape[-1]:
        return torch.full_like(size[..., :1], torch.inf)
    last, out = size[..., k - 1 : k], size[..., k : k + 1]
    return torch.where(last == 0, torch.inf, last - out)
