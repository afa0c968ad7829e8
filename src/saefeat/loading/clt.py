"""Cross-layer transcoders: folders with one dictionary a layer, written at that layer and later.

Two layouts. circuit-tracer's: ``W_enc_<n>.safetensors`` and ``W_dec_<n>.safetensors`` a layer, and
``config.yaml``, which says where they read and write. Gemma Scope 2's: ``params_layer_<n>.
safetensors`` a layer. A decoder bias belongs to a layer's output, and to no latent: it is left out,
as it is of every edit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..dictionaries.cross_layer import CrossLayer
from ..dictionaries.planes import Planes
from ..dictionaries.weights import Mapped, OnDisk, View, Weights
from .declaration import Declared, Origin, read_json, refuse
from .directory import Entry
from .keys import Known

TRACER, SCOPE = r"W_enc_(\d+)\.safetensors", r"params_layer_(\d+)\.safetensors"
CONFIG = "config.yaml"
_KNOWN = Known(
    used=("model_name", "model_kind", "feature_input_hook", "feature_output_hook"),
    harmless=("scan", "scan_name", "repo_id", "revision", "subfolder", "n_layers", "d_*"),
)
_SCOPE_INPUT = {"pre_feedforward_layernorm.output": "mlp.hook_in"}
_SCOPE_OUTPUT = {"post_feedforward_layernorm.output": "hook_mlp_out"}
"""The end of Gemma Scope 2's module path → hook."""


def found(folder: Path) -> bool:
    """Whether these are the files of a cross-layer transcoder."""
    return bool(_layers(folder, TRACER) or _layers(folder, SCOPE))


def entries(folder: Path) -> list[Entry]:
    """One entry a layer, from configurations and names alone."""
    pattern = TRACER if _layers(folder, TRACER) else SCOPE
    listed = []
    for n in _layers(folder, pattern):
        read, write = _hooks(folder, n)
        listed.append(Entry(f"layer_{n}", str(folder), f"blocks.{n}.{read}", f"blocks.{n}.{write}"))
    return listed


def read(folder: Path, entry: Entry, origin: Origin | None = None) -> CrossLayer:
    """One layer's dictionary; rows are read when selected.

    Raises:
        DictionaryError: for files that are missing, not whole, or of another kind.
    """
    layer = int(entry.id.removeprefix("layer_"))
    tracer = bool(_layers(folder, TRACER))
    weights = _tracer(folder, layer) if tracer else _scope(folder, layer)
    jumps = "threshold" in weights.names()
    if jumps and bool((weights.read("threshold") < 0).any()):
        got, wanted = "with thresholds below zero", "thresholds from zero"
        cause = "a transcoder whose latents may be negative, which this version does not compute"
        raise refuse(folder, got, wanted, cause, "one trained with relu or positive thresholds")
    _, hook_out = _hooks(folder, layer)
    count = sum(name.startswith("W_dec.") for name in weights.names())
    sae = CrossLayer(
        weights,
        read_sites=[entry.hook or ""],
        write_sites=[f"blocks.{n}.{hook_out}" for n in range(layer, layer + count)],
        activation="jumprelu" if jumps else "relu",
        name=f"{folder.name}/{entry.id}",
    )
    layout = "circuit-tracer" if tracer else "gemma_scope"
    sae.origin = origin or Origin(layout, str(folder), entry.id)
    sae.declared = Declared(_config(folder).get("model_name"), sae.d_sae)
    return sae


def _tracer(folder: Path, n: int) -> Weights:
    encoder = OnDisk(folder / f"W_enc_{n}.safetensors")
    decoder = OnDisk(folder / f"W_dec_{n}.safetensors")
    views = {"W_enc.0": View(f"W_enc_{n}", transposed=True), "b_enc": View(f"b_enc_{n}")}
    if f"threshold_{n}" in encoder.names():
        views["threshold"] = View(f"threshold_{n}")
    Mapped(decoder, {"W_dec": View(f"W_dec_{n}")})  # refuses other tensors
    return Planes(Mapped(encoder, views, aside=(f"b_dec_{n}",)), decoder, f"W_dec_{n}")


def _scope(folder: Path, n: int) -> Weights:
    file = OnDisk(folder / f"params_layer_{n}.safetensors")
    views = {"W_enc.0": View("w_enc"), "b_enc": View("b_enc"), "threshold": View("threshold")}
    rest = Mapped(file, views, aside=("w_dec", "b_dec", "affine_skip_connection"))
    every = Planes(rest, file, "w_dec")
    first = torch.arange(min(16, every.shape("W_dec.0")[0]))
    # a layer's stack has a matrix for every layer of the model, and writes at none before its own
    if any(bool(every.take(f"W_dec.{layer}", first).any()) for layer in range(n)):
        got, wanted = f"whose layer {n} has decoders of earlier layers", "zeros there"
        cause = "decoders that are stacked in another way"
        raise refuse(folder, got, wanted, cause, "the files as they were published")
    return Planes(rest, file, "w_dec", range(n, file.shape("w_dec")[1]))


def _layers(folder: Path, pattern: str) -> list[int]:
    matches = (re.fullmatch(pattern, path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _config(folder: Path) -> dict[str, Any]:
    if (folder / CONFIG).is_file():
        import yaml

        try:
            config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            got = f"whose {CONFIG} is no YAML ({error})"
            cause, call = "an interrupted copy", "fetch the file again"
            raise refuse(folder, got, "a configuration", cause, call) from error
        return config if isinstance(config, dict) else {}
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _hooks(folder: Path, layer: int) -> tuple[str, str]:
    """Read and write hook within the block, as the configuration declares them."""
    config = _config(folder)
    if not _layers(folder, TRACER):
        read = _end(folder, config.get("hf_hook_point_in"), layer, _SCOPE_INPUT)
        return read, _end(folder, config.get("hf_hook_point_out"), layer, _SCOPE_OUTPUT)
    _KNOWN.require(config, folder)
    kind = config.get("model_kind", "cross_layer_transcoder")
    hooks = [config.get(f"feature_{end}_hook") for end in ("input", "output")]
    if kind == "cross_layer_transcoder" and all(isinstance(hook, str) for hook in hooks):
        return str(hooks[0]), str(hooks[1])
    got = f"whose {CONFIG} has model_kind = {kind!r} and hooks {hooks}"
    wanted = "feature_input_hook and feature_output_hook of a cross_layer_transcoder"
    cause = f"a folder without its {CONFIG}"
    call = f"feature_input_hook: hook_resid_mid, and the like, in {CONFIG}, as it was trained"
    raise refuse(folder, got, wanted, cause, call)


def _end(folder: Path, path: object, layer: int, known: Mapping[str, str]) -> str:
    """The hook of a module's path; where nothing is declared the one that all of them have."""
    path = path[layer] if isinstance(path, list) and layer < len(path) else path
    if path is None:
        return next(iter(known.values()))
    ends = [hook for end, hook in known.items() if str(path).endswith(end)]
    if ends:
        return ends[0]
    cause, call = (
        "another kind of site",
        "load_saes(folder, ids={...}), if the site is known to you",
    )
    raise refuse(folder, f"which names {path!r}", " or ".join(known), cause, call)
