"""The dictionary_learning library: ``config.json`` beside ``ae.pt``.

``ae.pt`` is a pickle, which runs what it holds when it is read, so this library does not read
it; it says how to turn it into ``ae.safetensors``, which it reads. Activations follow sae-lens:
the library itself multiplies those of gated and JumpReLU SAEs by the decoder's norms and divides
by them on decoding, which changes the unit of a latent and nothing else.
"""

from __future__ import annotations

from pathlib import Path

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
    """Whether these are its files; a pickle too, which is then refused with the remedy."""
    config = folder / CONFIG
    return config.is_file() and any((folder / name).is_file() for name in (WEIGHTS, PICKLE))


def facts(source: Source) -> Facts:
    """What the trainer's configuration declares."""
    path = source.folder / CONFIG
    trainer = read_json(path).get("trainer")
    if not isinstance(trainer, dict):
        wanted, cause = "dictionary_learning's configuration", "another library's config.json"
        call = "the folder as the library wrote it"
        raise refuse(path, "which has no trainer entry", wanted, cause, call)
    name = trainer.get("dict_class", "AutoEncoder")
    if name not in CLASSES:
        got, wanted = f"whose dict_class is {name}", "one of " + ", ".join(CLASSES)
        cause = "a dictionary that is no SAE of one site, or a newer class"
        call = "convert it to sae-lens's native layout"
        raise refuse(source.folder, got, wanted, cause, call)
    architecture, subtract = CLASSES[name]
    # Residual SAEs only: what an MLP or attention submodule's output is depends on the model.
    residual = "layer" in trainer and "resid" in (trainer.get("submodule_name") or "resid_post")
    k = trainer.get("k")
    return Facts(
        layout="dictionary_learning",
        hook=f"blocks.{trainer['layer']}.hook_resid_post" if residual else None,
        architecture=architecture,
        subtract_bias=subtract,
        k=k if architecture == "topk" else None,
        width=trainer.get("dict_size"),
        l0=None if k is None else float(k),
    )


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
    if facts(source).architecture != "jumprelu" or "threshold" not in file.names():
        return Mapped(file, views)
    if file.shape("threshold"):
        return Mapped(file, views | {"threshold": View("threshold")})
    # One threshold for all latents.
    d_sae = Mapped(file, views).shape("W_enc")[1]
    return Mapped(file, views, {"threshold": file.read("threshold").expand(d_sae).contiguous()})
