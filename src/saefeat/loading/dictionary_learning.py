"""The dictionary_learning library: ``config.json`` beside ``ae.pt``.

``ae.pt`` is a pickle, which runs what it holds when it is read, so this library does not read
it; it says how to turn it into ``ae.safetensors``, which it reads. Activations follow sae-lens:
the library itself multiplies those of gated and JumpReLU SAEs by the decoder's norms and divides
by them on decoding, which changes the unit of a latent and nothing else.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..dictionaries.weights import Mapped, OnDisk, View, Weights
from .declaration import Facts, Source, read_json, refuse
from .keys import Known

CONFIG, WEIGHTS, PICKLE = "config.json", "ae.safetensors", "ae.pt"
CLASSES = {
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
}
"""dict_class → architecture, and whether b_dec is subtracted from the input."""

_NAMES = {
    "W_enc": (("W_enc", False), ("encoder.weight", True)),
    "W_dec": (("W_dec", False), ("decoder.weight", True)),
    "b_enc": (("b_enc", False), ("encoder.bias", False)),
    "b_dec": (("b_dec", False), ("bias", False), ("decoder_bias", False), ("decoder.bias", False)),
    "b_mag": (("mag_bias", False),),
    "b_gate": (("gate_bias", False),),
    "r_mag": (("r_mag", False),),
}
"""sae-lens name → names in the file, the first that is there, and whether it is transposed."""


_CONFIG = Known(used=("trainer", "buffer"))
_TRAINER = Known(
    used=("dict_class", "layer", "submodule_name", "k", "dict_size", "activation_dim", "lm_name"),
    harmless=(
        *("trainer_class", "decay_start", "threshold_beta", "threshold_start_step"),
        *("group_fractions", "group_weights", "group_sizes", "p_start", "p_end"),
        *("sparsity_function", "sparsity_queue_length", "n_sparsity_updates", "norm_factor"),
        *("use_wandb", "save_dir"),
    ),
)
# Biases are scaled back by norm_factor before they are saved, so it is of the training alone.
_BUFFER = Known(used=("io",), harmless=("d_submodule", "n_ctxs", "ctx_len", "*_device"))


def found(folder: Path) -> bool:
    """Whether these are its files; a pickle too, which is then refused with the remedy."""
    config = folder / CONFIG
    return config.is_file() and any((folder / name).is_file() for name in (WEIGHTS, PICKLE))


def facts(source: Source) -> Facts:
    """What the trainer's configuration declares."""
    path = source.folder / CONFIG
    config = read_json(path)
    trainer, buffer = config.get("trainer"), config.get("buffer") or {}
    if not isinstance(trainer, dict):
        wanted, cause = "dictionary_learning's configuration", "another library's config.json"
        call = "the folder as the library wrote it"
        raise refuse(path, "which has no trainer entry", wanted, cause, call)
    for known, part in ((_CONFIG, config), (_TRAINER, trainer), (_BUFFER, buffer)):
        known.require(part, path)
    name = trainer.get("dict_class")
    if name not in CLASSES:
        got, wanted = f"whose dict_class is {name}", "one of " + ", ".join(CLASSES)
        cause = "a dictionary that is no SAE of one site, or a newer class"
        call = "convert it to sae-lens's native layout"
        raise refuse(source.folder, got, wanted, cause, call)
    architecture, subtract = CLASSES[name]
    k = trainer.get("k")
    sizes = {"d_in": trainer.get("activation_dim"), "d_sae": trainer.get("dict_size")}
    return Facts(
        layout="dictionary_learning",
        hook=_hook(trainer, buffer),
        transcoder=buffer.get("io") == "in_and_out",
        architecture=architecture,
        subtract_bias=subtract,
        k=k if architecture == "topk" else None,
        sizes={name: size for name, size in sizes.items() if size is not None},
        width=trainer.get("dict_size"),
        l0=None if k is None else float(k),
        model=trainer.get("lm_name"),
    )


def _hook(trainer: dict[str, Any], buffer: dict[str, Any]) -> str | None:
    """Where the SAE reads, if its submodule is the residual stream, by a name that says so.

    What the output of an MLP or an attention submodule is depends on the model.
    """
    named = re.fullmatch(
        r"resid_(pre|post)(?:_layer)?(?:_(\d+))?", trainer.get("submodule_name") or ""
    )
    layer = trainer.get("layer")
    if named is None or type(layer) is not int or buffer.get("io", "out") != "out":
        return None
    agrees = named[2] is None or int(named[2]) == layer
    return f"blocks.{layer}.hook_resid_{named[1]}" if agrees else None


def weights(source: Source) -> Weights:
    """The tensors, renamed and transposed, read when selected; a pickle is refused."""
    path = source.folder / WEIGHTS
    if not path.is_file():
        cause = "reading a pickle runs the code in it; if you trust the file, convert it once"
        call = (
            "from safetensors.torch import save_file; "
            f"state = torch.load({PICKLE!r}, weights_only=True, map_location='cpu'); "
            f"save_file({{n: t.clone().contiguous() for n, t in state.items()}}, {WEIGHTS!r})"
        )
        wanted = f"{WEIGHTS} beside its {CONFIG}"
        raise refuse(source.folder / PICKLE, "which is a pickle", wanted, cause, call)
    file = OnDisk(path)
    views = {}
    for name, candidates in _NAMES.items():
        there = [View(found, turned) for found, turned in candidates if found in file.names()]
        if there:
            views[name] = there[0]
    declared = facts(source)
    _require_trained(file, declared, source)
    if declared.architecture != "jumprelu" or not _is_single(file):
        views |= {"threshold": View("threshold")} if declared.architecture == "jumprelu" else {}
        return Mapped(file, views, aside=_ASIDE)
    # One threshold for all latents.
    d_sae = Mapped(file, views, aside=file.names()).shape("W_enc")[1]
    one = file.read("threshold").expand(d_sae).contiguous()
    return Mapped(file, views, {"threshold": one}, aside=_ASIDE)


_ASIDE = ("k", "group_sizes", "threshold")
"""Tensors that say how an SAE was trained; a JumpReLU SAE's threshold is read all the same."""


def _is_single(file: OnDisk) -> bool:
    return "threshold" in file.names() and not file.shape("threshold")


def _require_trained(file: OnDisk, declared: Facts, source: Source) -> None:
    """Refuse a k that the configuration contradicts, and a threshold that was never set."""
    if "k" in file.names() and declared.l0 is not None:
        with safe_open(file.path, framework="pt") as opened:  # a whole number
            k = int(opened.get_tensor("k"))
        if k != declared.l0:
            got = f"whose {WEIGHTS} has k = {k}, and whose {CONFIG} has {declared.l0:g}"
            cause = "a checkpoint from when k was still annealed, or files of two SAEs"
            raise refuse(source.folder, got, "one k", cause, "the final files of the training")
    if declared.architecture == "jumprelu" and _is_single(file):
        threshold = float(file.read("threshold"))
        if not threshold >= 0 or math.isinf(threshold):
            got = f"whose threshold is {threshold:g}, which stands for one that was never set"
            cause = "a training of fewer steps than threshold_start_step"
            call = "the final files of a longer training"
            raise refuse(source.folder, got, "a threshold from 0", cause, call)
