"""sae-lens's own layout: ``cfg.json`` beside ``sae_weights.safetensors``, and its objects.

Files of sae-lens before 6 differ in three ways, all handled: other key names, topk written as an
activation function of a standard SAE, and a boolean for the normalization.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dictionaries.exclusion import Excluded, either, not_on, untrained
from ..dictionaries.sae import SAE
from ..dictionaries.weights import InMemory, Mapped, OnDisk, View, Weights
from ..errors import DictionaryError
from ..model.sites import Site
from .declaration import Facts, Origin, Source, assemble, l0_in, read_json, refuse
from .whole import ARCHITECTURES, Whole

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
AVERAGE = "expected_average_only_in"
_BY_SAE_LENS = (AVERAGE, "constant_scalar_rescale")
"""Norms that are no norm of a token's value: a factor, which is folded in, or which sae-lens's
temporal SAE applies itself."""
_OLD = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
_OLD |= {"activation_fn_str": "activation_fn"}


def found(folder: Path) -> bool:
    """Whether these are its files; a configuration alone counts, and is then refused."""
    return (folder / CONFIG).is_file()


def facts(source: Source) -> Facts:
    """What ``cfg.json`` declares."""
    return _declared(_config(source), source.folder, source.path)


def weights(source: Source) -> Weights:
    """The tensors, read when selected; factors sae-lens keeps beside them are folded in."""
    config = _config(source)
    file = OnDisk(_existing(source.folder, WEIGHTS))
    scale, gain = _scale(source, config), _finetuned(config, file, source)
    if scale == 1.0 and gain is None:
        return file
    views = {name: View(name) for name in file.names()}
    views["W_enc"] = View("W_enc", scale=scale)
    views["b_dec"] = View("b_dec", scale=1 / scale)
    views["W_dec"] = View("W_dec", scale=1 / scale if gain is None else gain / scale)
    return Mapped(file, views)


def from_object(
    sae: Any, *, site: Site | str | None = None, write_site: Site | str | None = None
) -> SAE | Whole:
    """A dictionary from a sae-lens object; its tensors are shared, its state is never used."""
    name = sae.get_name()
    facts = _declared(sae.cfg.to_dict(), name)
    origin = Origin(layout="sae_lens", file="memory", id=name)
    if facts.architecture in ARCHITECTURES:
        return Whole(sae, facts, origin, name=name, site=site)
    state = sae.state_dict()
    sae.process_state_dict_for_saving(state)
    return assemble(facts, InMemory(state), origin, name=name, site=site, write_site=write_site)


def _existing(folder: Path, name: str) -> Path:
    if (folder / name).is_file():
        return folder / name
    raise DictionaryError(
        f"load_sae: `folder` is {folder}, which has no {name}, wanted a folder of SAE files, such"
        f" as sae-lens's {CONFIG} and {WEIGHTS}. Likely cause: a wrong path, an interrupted copy,"
        " or a layout that is not known. Try: sae.save_inference_model(folder) in sae-lens writes"
        " the native layout"
    )


def _config(source: Source) -> dict[str, Any]:
    return {**read_json(_existing(source.folder, CONFIG)), **source.overrides}


def _declared(config: dict[str, Any], label: object, path: str = "") -> Facts:
    """The facts in a sae-lens configuration dictionary."""
    flat = {**config, **(config.get("metadata") or {})}
    flat |= {new: flat[old] for old, new in _OLD.items() if old in flat and new not in flat}
    if flat.get("hook_head_index") is not None:
        got = f"which reads head {flat['hook_head_index']} of {flat.get('hook_name')} alone"
        cause = "SAEs of one attention head have no site in this version"
        call = "an SAE trained on all heads of the layer"
        raise refuse(label, got, "an SAE that reads a whole site", cause, call)
    architecture, k = _architecture(flat, label)
    transcoder = "transcoder" in architecture
    pretrained = flat.get("model_from_pretrained_kwargs") or {}
    norm = _norm(flat)
    l0 = flat.get("l0") if k is None else k
    return Facts(
        layout="sae_lens",
        hook=flat.get("hook_name"),
        hook_out=flat.get("hook_name_out") if transcoder else None,
        architecture=architecture,
        norm="none" if norm in _BY_SAE_LENS else norm,
        subtract_bias=not transcoder and bool(flat.get("apply_b_dec_to_input", True)),
        centered=bool(pretrained.get("center_writing_weights", False)),
        k=k,
        rescale=bool(flat.get("rescale_acts_by_decoder_norm", False)),
        excluded=_excluded(flat, label),
        width=flat.get("d_sae"),
        l0=float(l0) if isinstance(l0, int | float) else l0_in(path),
        model=flat.get("model_name"),
        prepend_bos=flat.get("prepend_bos"),
    )


def _excluded(flat: dict[str, Any], label: object) -> Excluded:
    """The tokens left out of training: special ones, and positions outside ``seqpos_slice``."""
    special = flat.get("exclude_special_tokens")
    listed = isinstance(special, list | tuple)
    excluded = tuple(map(int, special)) if listed else "special" if special else ()
    taken = slice(*(flat.get("seqpos_slice") or (None,)))  # [n] alone is a stop, as for slice
    parts = (taken.start, taken.stop)
    plain = all(part is None or (type(part) is int and part >= 0) for part in parts)
    if not plain or taken.step not in (None, 1) or taken.stop == 0:
        got = f"whose seqpos_slice is {flat['seqpos_slice']!r}"
        wanted = "positions counted from a text's beginning, without a step"
        cause = "training on texts of one fixed length, whose end is known"
        call = f'"seqpos_slice": [start, stop] in {CONFIG}, both from the beginning'
        raise refuse(label, got, wanted, cause, call)
    positions = not_on(*parts)
    return excluded if positions is None else either(untrained(excluded), positions) or ()


def _architecture(flat: dict[str, Any], label: object) -> tuple[str, int | None]:
    """Architecture and k; old files call a topk SAE standard, with topk as its activation."""
    activation, k = flat.get("activation_fn") or "relu", flat.get("k")
    if activation == "topk":
        return "topk", (flat.get("activation_fn_kwargs") or {}).get("k", k)
    if activation == "relu":
        return flat.get("architecture", "standard"), k
    got = f"whose activation function is {activation}"
    cause = "sae-lens 6 dropped the others and would read this one as relu, with other latents"
    raise refuse(label, got, "relu or topk", cause, "an SAE with another activation function")


def _norm(flat: dict[str, Any]) -> str:
    norm = flat.get("normalize_activations")
    if isinstance(norm, bool):
        return AVERAGE if norm else "none"
    return norm or "none"


def _scale(source: Source, config: dict[str, Any]) -> float:
    """The factor by which activations are multiplied before the SAE, 1 where it is folded in."""
    # sae-lens writes ``none`` into a file whose factor is folded in, so a file that still asks
    # for it was not; without the factor its latents are off by that factor.
    if _norm(config) != AVERAGE:
        return 1.0
    if source.scale is not None:
        return source.scale
    scaler = source.folder / "activation_scaler.json"
    factor = read_json(scaler).get("scaling_factor") if scaler.is_file() else None
    if factor is None:
        warnings.warn(
            f"{source.folder} was trained on rescaled activations and does not say by how much; "
            "it is read unscaled, as sae-lens reads it, so check its L0 before trusting it",
            stacklevel=2,
        )
    return 1.0 if factor is None else float(factor)


def _finetuned(config: dict[str, Any], file: OnDisk, source: Source) -> Tensor | None:
    """One factor a latent, [d_sae], by which a fine-tuned SAE multiplies what it decodes."""
    names = ("scaling_factor", "finetuning_scaling_factor")
    name = next((name for name in names if name in file.names()), "")
    factor = file.read(name) if name else torch.ones(())
    if torch.allclose(factor, torch.ones_like(factor)):
        return None
    if config.get("finetuning_scaling_factor"):
        return factor
    got = f"whose {name} is not 1 while its {CONFIG} says finetuning_scaling_factor = false"
    cause = "a fine-tuned SAE saved with the configuration it started from"
    call = f'"finetuning_scaling_factor": true in {CONFIG}, if its directions carry the factor'
    raise refuse(source.folder, got, "either of the two", cause, call)
