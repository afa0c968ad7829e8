"""Readings as the source of a value: which of their columns hold the latents of an edit."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ..dictionaries.latents import Latents
from ..errors import LatentError
from ..results.readings import Readings


def columns_of(readings: Readings, latents: Latents, where: str) -> list[int]:
    """Which columns of the readings hold these latents, in their order.

    Raises:
        LatentError: naming the first latent that was not read.
    """
    place = {key: column for column, key in enumerate(_keys(readings.latents))}
    wanted = _keys(latents)
    missing = [key for key in wanted if key not in place]
    if not missing:
        return [place[key] for key in wanted]
    _, site, index = missing[0]
    raise LatentError(
        f"{where}: `readings` is of {readings.latents!r}, without latent {index} of {site}, wanted"
        " readings of all latents of the edit. Likely cause: another selection, or another"
        " dictionary of the same site. Try: run(model, prompts, Probe(latents)).readings[0], with"
        " the edit's own latents"
    )


def _keys(latents: Latents) -> list[tuple[Any, Any, int]]:
    """One key a latent; a dictionary loaded twice from one place is the same dictionary."""
    return [
        (getattr(basis, "origin", None) or id(basis), basis.site, index)
        for basis, indices in latents.parts
        for index in indices
    ]


def _require_readings(where: str, given: object) -> None:
    """Refuse what is no ``Readings``, or holds no number where it says it does."""
    finite = isinstance(given, Readings) and bool(torch.isfinite(given.values[given.mask]).all())
    if not finite:
        parameter = "readings" if where == "Patch" else "activations"
        got = (
            "Readings that are not finite" if isinstance(given, Readings) else type(given).__name__
        )
        wanted = "the Readings of a Probe, finite" + (
            "" if where == "Patch" else ", or a tensor [n, k]"
        )
        raise LatentError(
            f"{where}: `{parameter}` is {got}, wanted {wanted}. Likely cause: a tensor without its"
            f" tokens, or a model whose activations overflow. Try: {where}(run(model, prompts,"
            " Probe(latents)).readings[0])"
        )


def _brief(given: Readings | Tensor) -> str:
    """Too much to print: the shape and a hash of the content, so that provenance tells apart."""
    tensors = (given.values, given.mask) if isinstance(given, Readings) else (given,)
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    of = f" of {given.latents!r}" if isinstance(given, Readings) else ""
    return f"<{list(tensors[0].shape)}{of}, {digest.hexdigest()[:8]}>"
