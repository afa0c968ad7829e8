"""Llama Scope, in the two layouts of its authors' library.

The first (8x and 32x): ``hyperparams.json`` and ``checkpoints/final.safetensors``. The second
(R1-Distill): ``config.json`` and ``sae_weights.safetensors``. Both hold torch's linear layers,
trained on activations whose average norm was brought to √d: the factors fold into W_enc, W_dec
and b_dec. In the first layout the one JumpReLU threshold is multiplied by the factor as well, as
sae-lens does since its pull request 483 by the authors ("abnormally large L0").
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..dictionaries.weights import Mapped, OnDisk, View, Weights
from .declaration import Facts, Source, read_json, refuse, width_in
from .keys import Known

HYPER, FINAL = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
LOG_THRESHOLD = "log_jumprelu_threshold"
NORMS = "dataset_average_activation_norm"


_KNOWN = Known(
    used=(
        *("act_fn", "norm_activation", "hook_point_in", "hook_point_out", "d_sae", "d_model"),
        *("expansion_factor", "apply_decoder_bias_to_pre_encoder", "top_k", NORMS),
        "jump_relu_threshold",
    ),
    harmless=(
        # Decoder rows of published files have length 1, so that their norms change nothing.
        *("sparsity_include_decoder_norm", "decoder_exactly_fixed_norm"),
        *("force_unit_decoder_norm", "use_batch_norm_mse", "tp_size", "ddp_size"),
        *("sae_pretrained_name_or_path", "strict_loading", "use_triton_kernel"),
        *("sparsity_threshold_for_triton_spmm_kernel", "jumprelu_threshold_window"),
        *("promote_act_fn_dtype", "bias_init_method"),
    ),
    fixed={"use_glu_encoder": (False,), "use_decoder_bias": (True,), "sae_type": ("sae",)},
)


def found(folder: Path) -> bool:
    """Whether these are its files, of either layout."""
    return (folder / HYPER).is_file() or _distilled(folder)


def _distilled(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / (HYPER if (folder / HYPER).is_file() else CONFIG))


def facts(source: Source) -> Facts:
    """What the configuration declares."""
    config = _config(source.folder)
    _KNOWN.require(config, source.folder)
    act, norm = config.get("act_fn", "jumprelu"), config.get("norm_activation", "dataset-wise")
    if act != "jumprelu" or norm not in ("dataset-wise", "inference", "none"):
        got = f"with act_fn {act!r} and norm_activation {norm!r}"
        wanted = "jumprelu, and dataset-wise, inference or none"
        cause = "a checkpoint from before its authors converted it for inference"
        raise refuse(source.folder, got, wanted, cause, "the published checkpoint")
    hook, hook_out = config["hook_point_in"], config.get("hook_point_out")
    transcoder = hook_out not in (None, hook)
    width = config.get("d_sae") or int(config["d_model"] * config.get("expansion_factor", 0))
    sizes = {"d_in": config["d_model"], "d_sae": width or None}
    return Facts(
        layout="llama_scope",
        hook=hook,
        hook_out=hook_out if transcoder else None,
        architecture="jumprelu_transcoder" if transcoder else "jumprelu",
        subtract_bias=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        sizes={name: size for name, size in sizes.items() if size},
        width=width or width_in(source.path),
        l0=config.get("top_k"),
    )


def weights(source: Source) -> Weights:
    """The tensors, transposed and rescaled, read when selected."""
    config, distilled = _config(source.folder), _distilled(source.folder)
    file = OnDisk(source.folder / (WEIGHTS if distilled else FINAL))
    before, after = _factors(source, config, file)
    views = {
        "W_enc": View("encoder.weight", transposed=True, scale=before),
        "b_enc": View("encoder.bias"),
        "W_dec": View("decoder.weight", transposed=True, scale=1 / after),
        "b_dec": View("decoder.bias", scale=1 / after),
    }
    if distilled:
        threshold = file.read(LOG_THRESHOLD).exp()
    else:
        threshold = torch.tensor(config["jump_relu_threshold"] * before)
    d_sae = file.shape("encoder.weight")[0]
    aside = [name for name in file.names() if name == LOG_THRESHOLD or name.startswith(NORMS)]
    return Mapped(file, views, {"threshold": threshold.expand(d_sae).contiguous()}, aside=aside)


def _factors(source: Source, config: dict[str, Any], file: OnDisk) -> tuple[float, float]:
    """√d over the average norm, of the activations read and of those written."""
    if config.get("norm_activation", "dataset-wise") != "dataset-wise":
        return 1.0, 1.0
    d_out, d_in = file.shape("decoder.weight")[0], config["d_model"]
    norms = dict(config.get(NORMS) or {})
    for short, hook in (("in", config["hook_point_in"]), ("out", config.get("hook_point_out"))):
        stored = f"{NORMS}.{hook}"  # the second layout has them among the tensors
        if not norms.get(short):
            norms[short] = float(file.read(stored)) if stored in file.names() else None
    if norms["in"]:
        return math.sqrt(d_in) / norms["in"], math.sqrt(d_out) / (norms["out"] or norms["in"])
    if source.scale is not None:
        return source.scale, source.scale
    wanted = "the average norm of the activations it was trained on"
    cause = "a checkpoint saved without it"
    call = "load_saes on the sae-lens release, which lists the factor"
    raise refuse(source.folder, f"which has no {NORMS}", wanted, cause, call)
