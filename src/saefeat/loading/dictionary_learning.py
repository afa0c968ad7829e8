"""The dictionary_learning library: ``config.json`` beside ``ae.pt``.

``ae.pt`` is a pickle, which runs what it holds when it is read, so this library does not read
it; it says how to turn it into ``ae.safetensors``, which it reads. Activations follow sae-lens:
the library itself multiplies those of gated and JumpReLU SAEs by the decoder's norms and divides
by them on decoding, which changes the unit of a latent and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..dictionaries.weights import Mapped, OnDisk, View, Weights
from .declaration import Facts, Source, read_json, refuse

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


def found(folder: Path) -> bool:
    """Whether the folder has this layout: config.json beside ae.pt or ae.safetensors."""
    config = folder / CONFIG
    return config.is_file() and any((folder / name).is_file() for name in (WEIGHTS, PICKLE))


def facts(source: Source) -> Facts:
    """What the trainer's configuration declares.

    Raises:
        DictionaryError: for a class that is not an SAE of one site.
    """
    trainer = _trainer(source.folder)
    name = trainer.get("dict_class", "AutoEncoder")
    if name not in CLASSES:
        raise refuse(
            source.folder,
            f"whose dict_class is {name}",
            "one of " + ", ".join(CLASSES),
            "a dictionary that is no SAE of one site, or a newer class",
            "convert it to sae-lens's native layout",
        )
    architecture, subtract = CLASSES[name]
    k = trainer.get("k")
    return Facts(
        layout="dictionary_learning",
        hook=_hook(trainer),
        architecture=architecture,
        subtract_bias=subtract,
        k=k if architecture == "topk" else None,
        width=trainer.get("dict_size"),
        l0=None if k is None else float(k),
    )


def weights(source: Source) -> Weights:
    """The tensors, renamed and transposed, read when selected.

    Raises:
        DictionaryError: for a pickle, or a file that is not whole.
    """
    if not (source.folder / WEIGHTS).is_file():
        raise pickled(source.folder / PICKLE)
    file = OnDisk(source.folder / WEIGHTS)
    architecture = facts(source).architecture
    views = {}
    for name, candidates in _NAMES.items():
        there = [View(found, turned) for found, turned in candidates if found in file.names()]
        if there:
            views[name] = there[0]
    if architecture != "jumprelu" or "threshold" not in file.names():
        return Mapped(file, views)
    if file.shape("threshold"):
        return Mapped(file, views | {"threshold": View("threshold")})
    mapped = Mapped(file, views)
    one = file.read("threshold").expand(mapped.shape("W_enc")[1]).contiguous()
    return Mapped(file, views, {"threshold": one})


def pickled(path: Path) -> Exception:
    """The refusal of a pickle, with the three lines that convert it."""
    target = path.with_suffix(".safetensors").name
    return refuse(
        path,
        "which is a pickle",
        f"{target} beside its {CONFIG}",
        "reading a pickle runs the code in it; if you trust the file, convert it once",
        "from safetensors.torch import save_file; "
        f"state = torch.load({path.name!r}, weights_only=True, map_location='cpu'); "
        f"save_file({{n: t.clone().contiguous() for n, t in state.items()}}, {target!r})",
    )


def _trainer(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if isinstance(config.get("trainer"), dict):
        return config["trainer"]
    raise refuse(
        folder / CONFIG,
        "which has no trainer entry",
        "dictionary_learning's configuration",
        "another library's config.json",
        "the folder as the library wrote it",
    )


def _hook(trainer: dict[str, Any]) -> str | None:
    """Residual SAEs only: what an MLP or attention submodule's output is depends on the model."""
    submodule = trainer.get("submodule_name") or "resid_post"
    if "layer" not in trainer or "resid" not in submodule:
        return None
    return f"blocks.{trainer['layer']}.hook_resid_post"
