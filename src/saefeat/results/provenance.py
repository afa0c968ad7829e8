"""Provenance: where a result comes from."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from.

    Attributes:
        model: class and name of the model.
        dtype: of its parameters.
        device: of its parameters.
        dictionaries: site → name and fingerprint.
        intervention: as it prints, long selections cut short.
        latents: every latent of each step, site → indices.
        versions: of Python and the libraries.
        created: UTC, ISO 8601.
        generation: how tokens were chosen: ``run``'s settings, and under ``model`` those of the
            model's own generation configuration that are not transformers' defaults.

    Examples:
        >>> origin = sf.results.Provenance("m", "float32", "cpu", {}, "", (), {}, "2026-01-01")
        >>> origin.to_dict()["dtype"]
        'float32'
    """

    model: str
    dtype: str
    device: str
    dictionaries: dict[str, str]
    intervention: str
    latents: tuple[dict[str, list[int]], ...]
    versions: dict[str, str]
    created: str
    generation: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result depends on.

    Examples:
        >>> sorted(sf.results.versions())[:2]
        ['nnsight', 'python']
    """
    names = ("saefeat", "nnsight", "torch", "transformers", "sae-lens", "safetensors")
    return {"python": platform.python_version(), **{name: installed(name) for name in names}}


@cache
def installed(name: str) -> str:
    """A package's version, read once: parsing six packages' metadata takes longer than a pass."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
