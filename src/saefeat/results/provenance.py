"""Where a result comes from: its provenance, and the identity that tells two jobs apart."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ModelError, RemoteError
from ..files.hashing import computation, content_hash, digest, weights
from ..model.modules import torch_module

if TYPE_CHECKING:
    from nnsight import TransformersModel


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


def model_identity(model: object) -> dict[str, Any]:
    """What of a model decides a result: weights, code, settings, ambient state and libraries."""
    module = torch_module(model)
    require_unedited(model)
    config, decoding = (getattr(module, name, None) for name in ("config", "generation_config"))
    device = next((tensor.device.type for tensor in module.parameters()), "cpu")
    cast = torch.is_autocast_enabled(device)
    return {
        "model": type(module).__name__,
        "weights": weights(module),
        "configuration": digest(_settings(config)),
        "generation configuration": digest(_settings(decoding)),
        "tokenizer": _tokenizer(getattr(model, "tokenizer", None)),
        "computation": computation(module),
        # torch's settings of this thread that change what a model computes
        "ambient": {
            "autocast": str(torch.get_autocast_dtype(device)) if cast else None,
            "default dtype": str(torch.get_default_dtype()),
        },
        "versions": versions(),
    }


def remote_identity(model: TransformersModel, remote: bool | str) -> dict[str, Any]:
    """The same of a model on a server, whose weights nobody here can hash: its name, and where."""
    require_unedited(model)
    return {"model": model_key(model), "remote": str(remote), "versions": versions()}


def model_key(model: TransformersModel) -> str:
    """The name by which a server knows the model."""
    import httpx  # as late as nnsight imports it

    try:
        return model.to_model_key()
    except (ValueError, OSError, httpx.HTTPError) as error:
        name = getattr(model, "repo_id", None)
        raise RemoteError(
            f"remote: `model` is {name!r}, which has no name on the Hub ({type(error).__name__}),"
            " wanted the model of a repository, by its id. Likely cause: a model in memory or in a"
            " folder, which only `serve` knows, or no network. Try:"
            ' nnsight.TransformersModel("organization/model", tokenizer=...), whose weights need'
            " not be loaded; or `with serve(model) as server:` around the call"
        ) from error


def require_unedited(model: object) -> None:
    """Refuse an edited copy, whose results could not be told from another copy's."""
    if getattr(model, "_edits", None):
        raise ModelError(
            "checkpoint: `model` is an edited copy, wanted the model itself. Likely cause: what a"
            " copy's edits do cannot be hashed, so another copy's results could be taken for this"
            " one's. Try: run(model, prompts, intervention, checkpoint=...) on the original"
        )


_ORIGINS = ("_name_or_path", "transformers_version")
"""Settings that say where a configuration was loaded from."""


def _settings(config: Any) -> dict[str, Any]:
    """A configuration's settings, less those that only say where it was loaded from."""
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = {name: value for name, value in settings.items() if name not in _ORIGINS}
    return settings | {"attention": getattr(config, "_attn_implementation", None)}


def _tokenizer(tokenizer: Any) -> str | None:
    """What a result depends on of a tokenizer, beside the ids that it made of the prompts: which
    of them are special, what a chat looks like, and what words a metric or a stop stands for.
    """
    if tokenizer is None:
        return None
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    special = tuple(getattr(tokenizer, "all_special_ids", ()))
    template = getattr(tokenizer, "chat_template", None)
    return digest(content_hash(vocabulary, {}), special, template)
