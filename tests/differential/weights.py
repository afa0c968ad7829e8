"""The numbers of a case's models and dictionaries, the same for both sides."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from helpers import build

from .cases import Basis
from .places import width

LATENTS = 20
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
SAES = ("standard", "gated", "jumprelu", "topk", "abstopk", *TRANSCODERS)


@cache
def model(family: str, dtype: str, copy: str) -> torch.nn.Module:
    """A tiny model; ``copy`` tells the oracle's from saefeat's, so that neither sees a trace."""
    return build(family, getattr(torch, dtype))


@cache
def tensors(basis: Basis, family: str) -> dict[str, Tensor]:
    """A dictionary's raw tensors, under sae-lens's names; ``rows`` [k, d] of a direction."""
    g = torch.Generator().manual_seed(basis.seed)
    d, out = width(family, basis.site), width(family, basis.write or basis.site)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) / 4

    if basis.kind == "direction":
        rows = torch.linalg.qr(rand(d, 2)).Q.T
        return {"rows": rows if basis.seed % 2 else rows[:1]}
    if basis.kind == "neurons":
        return {}
    if basis.kind in ("function", "prefix"):
        return {"A": rand(d, 4), "directions": rand(4, out)}
    found = {"W_enc": rand(d, LATENTS), "W_dec": rand(LATENTS, out), "b_dec": rand(out)}
    kind = inner(basis)
    if kind == "gated":
        found |= {name: rand(LATENTS) for name in ("b_gate", "b_mag", "r_mag")}
    else:
        found["b_enc"] = rand(LATENTS)
    if "jumprelu" in kind:
        found["threshold"] = 2 * rand(LATENTS).abs()
    if "skip" in kind:
        found["W_skip"] = rand(out, d)
    return found


def inner(basis: Basis) -> str:
    """The architecture; of an error term, the SAE's (``error of topk``)."""
    return basis.kind.removeprefix("error of ")


def latents_of(basis: Basis, family: str) -> int:
    """How many latents a dictionary has."""
    if basis.kind.startswith("error of "):
        return 1
    if basis.kind == "neurons":
        return width(family, basis.site)
    if basis.kind in ("function", "prefix"):
        return 4
    return len(tensors(basis, family)["rows"]) if basis.kind == "direction" else LATENTS
