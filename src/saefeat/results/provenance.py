"""Where a result comes from: its provenance, and the identity that tells two jobs apart."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ModelError, RemoteError
from ..files.hashing import computation, content_hash, digest, weights
from ..model.inferred import is_inferred
from ..model.modules import torch_module
from .result import Result

if TYPE_CHECKING:
    from nnsight import TransformersModel


@dataclass(frozen=True, repr=False)
class Provenance(Result):
    """Where a result comes from.

    Attributes:
        model: class and name of the model; of one loaded from a folder the folder's name and a
            hash of its configuration.
        dtype: of its parameters.
        device: of its parameters.
        dictionaries: site → name and fingerprint.
        intervention: as it prints, long selections cut short; empty where nothing was edited.
        latents: every latent of each step, site → indices.
        versions: of Python and the libraries.
        created: UTC, ISO 8601.
        generation: how tokens were chosen: ``run``'s settings, and under ``model`` those of the
            model's own generation configuration that are not transformers' defaults.
        settings: what else was asked, as it prints, cut at 300 characters: an attribution's
            method, baseline (with a hash of its content, ``baseline_hash``), where, semantics,
            one_site, backward and keep; a validation's metric and settings.
        adapters: names of the active adapters (PEFT), none for a plain model.
        quantization: how weights are quantized; empty where they are not.
        server: what a server said of itself, empty for a result made here: ``url``, ``repository``
            and ``revision`` of the model, versions, and in a block beside the model its ``commit``.
            ``dtype`` and ``device`` are the server's then, and ``versions`` those here.

    Examples:
        >>> origin = sf.results.Provenance("m", "float32", "cpu", {}, "", (), {}, "2026-01-01")
        >>> origin.to_dict()["dtype"]
        'float32'
        >>> origin.line
        'm, float32 on cpu'
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
    settings: dict[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    quantization: str = ""
    server: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Any) -> Provenance:
        """What ``to_dict`` gave, also by way of JSON.

        Raises:
            ValueError: for data of another form.
        """
        values = {"server": {}, **document} if isinstance(document, dict) else {}
        if set(values) != {one.name for one in fields(cls)}:
            raise ValueError("not the fields of a provenance")
        for name, kinds in _KINDS.items():
            if not isinstance(values[name], kinds):
                raise ValueError(f"{name} is a {type(values[name]).__name__}")
        for name in ("latents", "adapters"):
            values[name] = tuple(values[name])
        return cls(**values)

    @property
    def line(self) -> str:
        """Model and settings in one line, without dictionaries, versions and time."""
        tuned = f", adapters {', '.join(self.adapters)}" if self.adapters else ""
        tuned += f", {self.quantization}" if self.quantization else ""
        plain = ("None", "False", "pass_through")  # the defaults: they go without saying
        said = [
            (name, value)
            for name, value in sorted(self.settings.items())
            if value not in plain and name != HASH
        ]
        asked = "".join(f"; {name} {value:.80}" for name, value in said)
        place = f" at {self.server['url']}" if self.server.get("url") else ""
        where = f"{self.dtype} on {self.device}{place}"
        return " ".join(f"{self.model}, {where}{tuned}{asked}".split())

    def __repr__(self) -> str:
        edited = [f"  intervention: {self.intervention:.200}"] if self.intervention else []
        read = [f"  at {site}: {name:.120}" for site, name in list(self.dictionaries.items())[:8]]
        more = len(self.dictionaries) - len(read)
        read += [f"  and at {more} other sites"] if more else []
        names = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        made = f"  {self.created}" + (f"; {names}" if names else "")
        return "\n".join([f"Provenance({self.line})", *edited, *read, made])


@dataclass(frozen=True, eq=False, repr=False)
class Sourced(Result):
    """A result that says where it comes from.

    Attributes:
        provenance: model, dictionaries and settings; None for one made by hand.
    """

    provenance: Provenance | None = field(default=None, kw_only=True)

    @property
    def origin(self) -> str:
        """A last line for what it prints."""
        return "" if self.provenance is None else f"\n  from {self.provenance.line}"


HASH = "baseline_hash"
"""Of a baseline's content: two directions print alike. It is compared, and not printed."""

_TEXTS = ("model", "dtype", "device", "intervention", "created", "quantization")
_KINDS = dict.fromkeys(_TEXTS, (str,)) | dict.fromkeys(("latents", "adapters"), (list, tuple))
_KINDS |= dict.fromkeys(("dictionaries", "versions", "generation", "settings", "server"), (dict,))
"""Fields → the types they may have."""


def provenance(
    model: object, parts: Iterable[tuple[Any, Sequence[int]]], **rest: Any
) -> Provenance:
    """The provenance of a result of this model and these latents, made now.

    Args:
        model: an nnsight model or a module.
        parts: dictionaries with the latents that were used.
        rest: other fields of ``Provenance``.
    """
    module = torch_module(model)
    floating = (weight for weight in module.parameters() if weight.is_floating_point())
    first = next(floating, torch.zeros(0, dtype=torch.float32))  # packed weights are integers
    dictionaries: dict[str, dict[str, None]] = {}  # site → names, each once, in order
    for basis, indices in parts:
        every = len(indices) == basis.d_sae  # a file that is read whole is hashed once
        name = f"{_source(basis)} {basis.fingerprint(range(basis.d_sae) if every else indices)}"
        dictionaries.setdefault(str(basis.site), {})[name] = None
    found: dict[str, Any] = {"intervention": "", "latents": (), **rest}
    if is_inferred(module):
        found["settings"] = {**found.get("settings", {}), "sites": "inferred from the modules"}
    return Provenance(
        model=_name(module),
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        dictionaries={site: "; ".join(names) for site, names in dictionaries.items()},
        versions=versions(),
        created=now(),
        adapters=_adapters(module),
        quantization=_quantization(module),
        **found,
    )


def added(source: Provenance | None, **settings: object) -> Provenance | None:
    """A provenance with more settings, made now."""
    if source is None:
        return None
    return replace(source, settings={**source.settings, **told(**settings)}, created=now())


def elsewhere(source: Provenance, there: dict[str, str]) -> Provenance:
    """The provenance of the same result, made on a server that said this of itself."""
    rest = {name: text for name, text in there.items() if name not in ("dtype", "device")}
    return replace(source, dtype=there["dtype"], device=there["device"], server=rest)


def together(sources: Sequence[Provenance]) -> Provenance:
    """The provenance of several batches as one: a server may differ from one to the next."""

    def each(texts: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(texts))

    names = dict.fromkeys(name for source in sources for name in source.server)
    return replace(
        sources[0],
        dtype=each(source.dtype for source in sources),
        device=each(source.device for source in sources),
        server={name: each(s.server[name] for s in sources if name in s.server) for name in names},
    )


def called_there(model: TransformersModel, remote: bool | str) -> dict[str, str]:
    """What a server is asked for: its address, and the model's repository and revision there."""
    asked = json.loads(model_key(model).partition(":")[2])
    named = {name: asked.get(key) for name, key in (("repository", "repo_id"), ("revision",) * 2)}
    return {"url": host_of(remote)} | {
        name: str(text) for name, text in named.items() if text is not None
    }


def told(**settings: object) -> dict[str, str]:
    """Settings as they print, without addresses in memory; a long one is cut, its hash behind it.

    So two records differ where the settings did.
    """
    texts = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in settings.items()}
    texts = {name: " ".join(text.split()) for name, text in texts.items()}
    return {
        name: text if len(text) <= 300 else f"{text:.288}... {digest(text)[:8]}"
        for name, text in texts.items()
    }


def _name(module: nn.Module) -> str:
    """Class and name. A folder's path says whose it is; its name and contents say what it is."""
    config = getattr(module, "config", None)
    name = getattr(config, "name_or_path", "") or "in memory"
    if Path(name).is_absolute() or Path(name).is_dir():
        name = f"{Path(name).absolute().name} (configuration {digest(_settings(config))})"
    return f"{type(module).__name__} {name}"


def _source(basis: Any) -> str:
    """Where a dictionary came from, without the folders around it."""
    origin = basis.origin
    if getattr(origin, "file", None) and getattr(origin, "repo", None) is None:
        return f"{origin.id} ({origin.layout})"
    return basis.source


def _adapters(module: nn.Module) -> tuple[str, ...]:
    """Adapters that take part in the forward pass, as PEFT's layers hold them."""
    names: dict[str, None] = {}
    for part in module.modules():
        # properties of PEFT's layers; a module of another kind may have methods of these names
        active = getattr(part, "active_adapters", None)
        off = getattr(part, "disable_adapters", False)
        if isinstance(active, list | tuple) and off is not True:
            names |= dict.fromkeys(map(str, active))
    return tuple(names)


def _quantization(module: nn.Module) -> str:
    """The method that the configuration declares, or the library of its layers or weights."""
    declared = getattr(getattr(module, "config", None), "quantization_config", None)
    if declared is not None:
        own = declared.get if isinstance(declared, dict) else partial(getattr, declared)
        method = own("quant_method", None) or type(declared).__name__
        return f"quantized by {getattr(method, 'value', method)}"
    kinds = {type(part).__module__ for part in (*module.modules(), *module.parameters())}
    names = sorted({name.partition(".")[0] for name in kinds} & _QUANTIZERS)
    names += ["torch"] if any(".quantized" in name for name in kinds) else []
    return f"quantized by {', '.join(names)}" if names else ""


_QUANTIZERS = {"torchao", "bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq", "optimum"}
"""Libraries whose layers and tensors hold quantized weights."""


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
    return {"model": model_key(model), "remote": host_of(remote), "versions": versions()}


def host_of(remote: bool | str) -> str:
    """The address of nnsight's ``remote=``: True is the host that it is set to."""
    from nnsight import CONFIG

    return remote if isinstance(remote, str) else CONFIG.API.HOST


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
            " folder, a private repository, or no network. Try:"
            ' remote.named(model, "organization/model"), with the name that the server knows; or'
            ' nnsight.TransformersModel("organization/model"), whose weights need not be loaded'
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
