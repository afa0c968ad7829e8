"""sae-lens's own layout: ``cfg.json`` beside ``sae_weights.safetensors``, and its objects.

Files of sae-lens before 6 differ in three ways, all handled: other key names, topk written as an
activation function of a standard SAE, and a boolean for the normalization.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import got
from ..dictionaries.exclusion import Excluded, either, not_on, untrained
from ..dictionaries.sae import NORMS, SAE
from ..dictionaries.weights import InMemory, Mapped, OnDisk, View, Weights
from ..errors import DictionaryError, SiteError
from ..model.sites import Site
from .declaration import Facts, Origin, Source, assemble, l0_in, read_json, refuse
from .keys import Known
from .whole import ARCHITECTURES, Whole

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
AVERAGE = "expected_average_only_in"
"""A norm that is one factor for all tokens, which sae-lens folds into the weights."""
_OLD = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
    "hook_point_out": "hook_name_out",
    "out_hook_point": "hook_name_out",
}
_ASIDE = (
    *("hook_name", "hook_name_out", "hook_head_index", "hook_head_index_out", "model_name"),
    *("model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens", "seqpos_slice"),
    "l0",
)
"""What sae-lens 6 keeps under ``metadata``, of all that is there, to be used."""

_KNOWN = Known(
    used={
        *("architecture", "d_in", "d_sae", "d_out", "apply_b_dec_to_input", "k", "metadata"),
        *("normalize_activations", "activation_fn", "activation_fn_kwargs", "is_transcoder"),
        *("rescale_acts_by_decoder_norm", "finetuning_scaling_factor", "model_name"),
        *_OLD, *_ASIDE,
    },
    harmless=(
        *("hook_layer", "hook_point_layer", "hook_layer_out", "out_hook_point_layer"),
        *("hook_eval", "hook_point_eval", "hf_hook_name*", "neuronpedia_id", "expansion_factor"),
        *("model_class_name", "model_kwargs", "from_pretrained_path", "is_dataset_tokenized"),
        *("streaming", "*cached_activations*", "feature_sampling_*", "n_restart_cycles"),
        *("autocast", "autocast_*", "compile_*", "*_compilation_mode", "llm_device", "n_eval_seqs"),
        *("act_store_device", "resume*", "output_path", "finetuning_method", "finetuning_tokens"),
        *("sequence_separator_token", "disable_concat_sequences", "use_chat_formatting"),
        *("activations_mixing_fraction", "normalize_sae_decoder", "noise_scale"),
        *("decoder_heuristic_init*", "decoder_orthogonal_init", "use_sparse_activations"),
        *("jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale"),
        *("jumprelu_ste_to_input", "topk_threshold_lr", "matryoshka_widths"),
        *("use_matryoshka_aux_loss",),
    ),
    # An SAE of hook_z reads the heads side by side, unless it names one: reshaping is of no
    # consequence here.
    fixed={
        "reshape_activations": ("none", "hook_z"),
        "is_sparse_connection": (False,),
        "tied_weights": (False,),
        "use_error_term": (False,),
    },
)  # fmt: skip
_MODEL = Known(
    used={"center_writing_weights"},
    harmless=(
        *("fold_*", "center_unembed", "refactor_*", "torch_dtype", "n_devices", "n_ctx", "token"),
        *("move_to_device", "trust_remote_code", "revision", "cache_dir", "local_files_only"),
        *("default_*", "hf_*", "tokenizer*", "attn_implementation", "device_map", "low_cpu_*"),
        *("load_in_*", "use_auth_token", "checkpoint_*", "first_n_layers", "n_params"),
    ),
)
"""Arguments by which TransformerLens loaded the model that an SAE was trained on."""

_WHOLE = {
    "matching_pursuit": ("residual_threshold", "max_iterations", "stop_on_duplicate_support"),
    "temporal": (
        *("n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk"),
        *("tied_weights", "activation_normalization_factor"),
    ),
}
"""Settings of the SAEs that sae-lens itself encodes."""


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
    factors = _FACTORS & file.names()
    if scale == 1.0 and gain is None and not factors:
        return file
    views = {name: View(name) for name in file.names() - factors}
    views["W_enc"] = View("W_enc", scale=scale)
    views["b_dec"] = View("b_dec", scale=1 / scale)
    views["W_dec"] = View("W_dec", scale=1 / scale if gain is None else gain / scale)
    return Mapped(file, views, aside=factors)


def from_object(
    sae: Any, *, site: Site | str | None = None, write_site: Site | str | None = None
) -> SAE | Whole:
    """A dictionary from a sae-lens object; its tensors are shared, its state is never used."""
    if not all(hasattr(sae, part) for part in ("get_name", "cfg", "state_dict")):
        raise DictionaryError(
            f"load_sae: `folder` is {got(sae)}, wanted a folder's path, or an SAE or transcoder of"
            ' sae-lens. Try: load_sae("folder")'
        )
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
    flat = _flat(config, label)
    architecture, k = _architecture(flat, label)
    hook, hook_out = _hook(flat, "", label), _hook(flat, "_out", label)
    transcoder = "transcoder" in architecture
    pretrained = flat.get("model_from_pretrained_kwargs") or {}
    l0 = flat.get("l0") if k is None else k
    return Facts(
        layout="sae_lens",
        hook=hook,
        hook_out=hook_out if transcoder else None,
        transcoder=transcoder,
        architecture=architecture,
        norm=_norm_of_tokens(flat, architecture, label),
        subtract_bias=not transcoder and _flag(flat, "apply_b_dec_to_input", True, label),
        centered=_flag(pretrained, "center_writing_weights", False, label),
        k=k,
        rescale=_flag(flat, "rescale_acts_by_decoder_norm", False, label),
        excluded=_excluded(flat, label),
        sizes={name: flat[name] for name in ("d_in", "d_sae", "d_out") if name in flat},
        width=flat.get("d_sae"),
        l0=float(l0) if isinstance(l0, int | float) else l0_in(path),
        model=flat.get("model_name"),
        prepend_bos=flat.get("prepend_bos"),
    )


def _hook(flat: dict[str, Any], end: str, label: object) -> str | None:
    """The name of a hook, with the one head that is read of it, if it is one."""
    hook, head = flat.get(f"hook_name{end}"), flat.get(f"hook_head_index{end}")
    if head is None:
        return hook
    of_head = re.sub(r"^blocks\.(\d+)\.", rf"blocks.\1:{head}.", str(hook))
    try:
        Site.parse(of_head)
    except SiteError as error:
        got = f"which reads head {head} of {hook}"
        cause = "a hook whose value is not made of heads, or an index that is none"
        call = "an SAE of hook_q, hook_k, hook_v or hook_z"
        raise refuse(label, got, "a head of a hook that has heads", cause, call) from error
    return of_head


def _flat(config: dict[str, Any], label: object) -> dict[str, Any]:
    """The configuration under today's names, without what tells of training and origin."""
    metadata = config.get("metadata") or {}
    known = _WHOLE.get(config.get("architecture", ""), ())
    _KNOWN.require({key: v for key, v in config.items() if key not in known}, label)
    flat = config | {key: metadata[key] for key in _ASIDE if metadata.get(key) is not None}
    for old, new in _OLD.items():
        if flat.get(old) is not None and flat.get(new) is None:
            flat[new] = flat[old]
    _MODEL.require(flat.get("model_from_pretrained_kwargs") or {}, label)
    return flat


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
    """Architecture and k. Old files call a topk SAE standard, with topk as its activation, and a
    transcoder standard, with another hook to write at.
    """
    name = flat.get("architecture") or "standard"
    if name in _BY_BATCH:
        got, wanted = f"saved in training, as a {name!r} SAE", "the same SAE saved for inference"
        cause = "a training checkpoint, whose latents depend on which tokens share a batch"
        call = "sae.save_inference_model(folder) in sae-lens, which makes a jumprelu of it"
        raise refuse(label, got, wanted, cause, call)
    activation, k = flat.get("activation_fn") or "relu", flat.get("k")
    inner = flat.get("activation_fn_kwargs") or {}
    if activation == "topk" and name in ("standard", "topk"):
        name, k = "topk", inner.get("k", k)
    elif activation != "relu":
        got = f"whose activation function is {activation}, of a {name} SAE"
        cause = "sae-lens 6 dropped the others and would read this one as relu, with other latents"
        raise refuse(label, got, "relu or topk", cause, "an SAE with another activation function")
    _require_k(flat, name, inner, label)
    hook_out = flat.get("hook_name_out")
    elsewhere = hook_out is not None and hook_out != flat.get("hook_name")
    if (flat.get("is_transcoder") or elsewhere) and "transcoder" not in name:
        if name not in _TRANSCODERS:
            got, wanted = f"a transcoder of architecture {name!r}", ", ".join(_TRANSCODERS)
            cause = "an SAE with an output hook, whose latents no version of sae-lens computes"
            raise refuse(label, got, wanted, cause, "a transcoder of another architecture")
        name = _TRANSCODERS[name]
    return name, k


_BY_BATCH = ("batchtopk", "matryoshka_batchtopk")
"""Architectures that sae-lens has in training alone."""

_TRANSCODERS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
"""Architecture of a flat configuration → its transcoder's."""


def _require_k(flat: dict[str, Any], name: str, inner: dict[str, Any], label: object) -> None:
    """Refuse a k that contradicts another, or an architecture that has none."""
    k, declared = flat.get("k"), inner.get("k")
    topk = name in ("topk", "abstopk")
    wanted, cause = "one k", "a configuration put together from two"
    if set(inner) - {"k"}:
        got, wanted = f"with activation_fn_kwargs {inner!r}", "k alone"
        cause = "an activation function with settings of its own"
    elif topk and None not in (k, declared) and k != declared:
        got = f"with k = {k} and {declared}"
    elif not topk and name in ("standard", "gated") and (k is not None or declared is not None):
        got, wanted = f"with k = {k or declared} and architecture {name!r}", "a k of a topk SAE"
        cause = "a topk SAE whose architecture is not declared; without it its latents differ"
    elif not topk and flat.get("rescale_acts_by_decoder_norm"):
        got = f"with rescale_acts_by_decoder_norm and architecture {name!r}"
        wanted, cause = "the setting of a topk SAE", "a training checkpoint, whose norms lie beside"
    else:
        return
    call = '"architecture": "topk" in its configuration, if that is what it is; or'
    raise refuse(label, got, wanted, cause, f"{call} sae.save_inference_model(folder) in sae-lens")


def _flag(config: Mapping[str, Any], key: str, default: bool, label: object) -> bool:
    """A key that is true or false. A word for it would be true whatever it says."""
    value = config.get(key, default)
    if isinstance(value, bool):
        return value
    if value is None and not default:  # as sae-lens reads it; of one that is true by default,
        return False  # null may mean either
    got = f"whose configuration has {key} = {value!r:.60}"
    raise refuse(label, got, "true or false", "a file edited by hand", f'"{key}": true, or false')


def _norm_of_tokens(flat: dict[str, Any], architecture: str, label: object) -> str:
    """The norm of each token's value; a factor for all is folded in, or sae-lens's own."""
    norm, whole = _norm(flat), architecture in ARCHITECTURES
    if norm == AVERAGE and not whole:
        return "none"
    if norm == "constant_scalar_rescale" and architecture == "temporal":
        return "none"
    if norm in NORMS:
        return norm
    cause = "a training checkpoint, whose input scale lies beside it" if norm == AVERAGE else ""
    cause = cause or "a factor or matrix that belongs in the weights, and was not folded in"
    call = "sae.save_inference_model(folder) in sae-lens, which folds it in"
    got = f"whose normalize_activations is {norm!r}, of a {architecture} SAE"
    raise refuse(label, got, f"one of {', '.join(NORMS)}", cause, call)


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
    there = sorted(_FACTORS & file.names())
    if len(there) > 1:
        call = "the factor that was trained under one of the names"
        cause = "a file put together from two"
        raise refuse(source.folder, f"with {' and '.join(there)}", "one of the two", cause, call)
    name = there[0] if there else ""
    factor = file.read(name) if name else torch.ones((), dtype=torch.float32)
    declared = bool(config.get("finetuning_scaling_factor"))
    one = torch.allclose(factor, torch.ones_like(factor))
    if declared == bool(name) or (one and name):
        return None if one else factor
    says = "true" if declared else "false"
    got = f"whose {name or 'file'} has a factor, while its {CONFIG} says {_FINE} = {says}"
    if declared:
        got = f"which has no factor, while its {CONFIG} says {_FINE} = true"
    cause = "a fine-tuned SAE saved with the configuration it started from"
    call = f'"{_FINE}": true in {CONFIG}, if its directions carry the factor, else false'
    raise refuse(source.folder, got, "either of the two", cause, call)


_FINE = "finetuning_scaling_factor"
_FACTORS = frozenset({"scaling_factor", _FINE})
"""Tensors of one factor a latent, beside the SAE's own."""
