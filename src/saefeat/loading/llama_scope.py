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

HYPER, FINAL = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
LOG_THRESHOLD = "log_jumprelu_threshold"
NORMS = "dataset_average_activation_norm"


def found(folder: Path) -> bool:
    """Whether the folder has this layout: one of the two layouts."""
    return (folder / HYPER).is_file() or _distilled(folder)


def facts(source: Source) -> Facts:
    """What the configuration declares.

    Raises:
        DictionaryError: for another activation or normalization than the published ones.
    """
    config = _config(source.folder)
    act, norm = config.get("act_fn", "jumprelu"), config.get("norm_activation", "dataset-wise")
    if act != "jumprelu" or norm not in ("dataset-wise", "inference", "none"):
        raise refuse(
            source.folder,
            f"with act_fn {act!r} and norm_activation {norm!r}",
            "jumprelu, and dataset-wise, inference or none",
            "a checkpoint from before its authors converted it for inference",
            "the published checkpoint",
        )
    hook, hook_out = config["hook_point_in"], config.get("hook_point_out")
    transcoder = hook_out not in (None, hook)
    width = config.get("d_sae") or int(config["d_model"] * config.get("expansion_factor", 0))
    return Facts(
        layout="llama_scope",
        hook=hook,
        hook_out=hook_out if transcoder else None,
        architecture="jumprelu_transcoder" if transcoder else "jumprelu",
        subtract_bias=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        width=width or width_in(source.path),
        l0=config.get("top_k"),
    )


def weights(source: Source) -> Weights:
    """The tensors, transposed and rescaled, read when selected.

    Raises:
        DictionaryError: for a file that is not whole, or whose normalization is unknown.
    """
    config = _config(source.folder)
    distilled = _distilled(source.folder)
    file = OnDisk(source.folder / (WEIGHTS if distilled else FINAL))
    before, after = _factors(source, config, file)
    views = {
        "W_enc": View("encoder.weight", transposed=True, scale=before),
        "b_enc": View("encoder.bias"),
        "W_dec": View("decoder.weight", transposed=True, scale=1 / after),
        "b_dec": View("decoder.bias", scale=1 / after),
    }
    threshold = file.read(LOG_THRESHOLD).exp() if distilled else _threshold(config, before)
    d_sae = file.shape("encoder.weight")[0]
    return Mapped(file, views, {"threshold": threshold.expand(d_sae).contiguous()})


def _distilled(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / (HYPER if (folder / HYPER).is_file() else CONFIG))


def _threshold(config: dict[str, Any], factor: float) -> torch.Tensor:
    return torch.tensor(config["jump_relu_threshold"] * factor)


def _factors(source: Source, config: dict[str, Any], file: OnDisk) -> tuple[float, float]:
    """√d over the average norm, of the activations read and of those written."""
    if config.get("norm_activation", "dataset-wise") != "dataset-wise":
        return 1.0, 1.0
    d_out, d_in = file.shape("decoder.weight")[0], config["d_model"]
    norms = config.get(NORMS) or {}
    ends = ("in", config["hook_point_in"]), ("out", config.get("hook_point_out"))
    known = [norms.get(short) or _stored(file, f"{NORMS}.{hook}") for short, hook in ends]
    if known[0]:
        out = known[1] or known[0]
        return math.sqrt(d_in) / known[0], math.sqrt(d_out) / out
    if source.scale is not None:
        return source.scale, source.scale
    raise refuse(
        source.folder,
        f"which has no {NORMS}",
        "the average norm of the activations it was trained on",
        "a checkpoint saved without it",
        "load_saes on the sae-lens release, which lists the factor",
    )


def _stored(file: OnDisk, name: str) -> float | None:
    return float(file.read(name)) if name in file.names() else None
