"""Gemma Scope (``params.npz``) and Gemma Scope 2 (``params.safetensors``).

Neither says where it reads: the repository and the folder do, so that a folder copied away from
its repository needs ``site=``. Both are JumpReLU and never subtract b_dec from their input.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from ..dictionaries.weights import Mapped, Npz, OnDisk, View, Weights
from .declaration import Facts, Source, l0_in, refuse, width_in

NPZ, SAFETENSORS = "params.npz", "params.safetensors"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
SKIP = "affine_skip_connection"  # [d_in, d_out] in the file
_FIRST = {
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}
# hook_mlp_in, as sae-lens has it, is the stream before the norm; the files' own config.json says
# pre_feedforward_layernorm.output, the MLP's input.
_SECOND = {
    "resid_post": ("hook_resid_post", None),
    "attn_out": ("attn.hook_z", None),
    "mlp_out": ("hook_mlp_out", None),
    "transcoder": ("mlp.hook_in", "hook_mlp_out"),
}


def found(folder: Path) -> bool:
    """Whether these are its files."""
    return (folder / NPZ).is_file() or (folder / SAFETENSORS).is_file()


def hooks(path: str) -> tuple[str | None, str | None]:
    """Read and write hook of ``<repository>/<folder>``; None where it does not say.

    Examples:
        >>> from saefeat.loading.gemma_scope import hooks
        >>> hooks("google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")
        ('blocks.12.hook_resid_post', None)
    """
    layer = re.search(r"layer_(\d+)", path)
    if layer is None:
        return ("hook_embed" if "embedding" in path else None), None
    second = re.search(r"(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_\d", path)
    first = re.search(r"gemma-scope-\w+-(?:pt|it)-(res|mlp|att|transcoders)(?![\w-])", path)
    if second is not None:
        read, write = _SECOND[second[1]]
    elif first is not None:
        read, write = _FIRST[first[1]]
    else:
        return None, None
    block = f"blocks.{layer[1]}."
    return block + read, block + write if write else None


def facts(source: Source) -> Facts:
    """What the path declares."""
    hook, hook_out = hooks(source.path)
    return Facts(
        layout="gemma_scope",
        hook=hook,
        hook_out=hook_out,
        architecture="jumprelu_transcoder" if hook_out else "jumprelu",
        width=width_in(source.path),
        l0=l0_in(source.path),
        model=_model(source.path),
        prepend_bos=True,
    )


def _model(path: str) -> str | None:
    """gemma-scope-2b-pt → gemma-2-2b, gemma-scope-2-1b-it → gemma-3-1b-it."""
    named = re.search(r"gemma-scope-(2-)?(\d+[bm])-(pt|it)", path)
    if named is None:
        return None
    chat = "-it" if named[3] == "it" else "-pt" if named[1] else ""
    return f"gemma-{3 if named[1] else 2}-{named[2]}{chat}"


def weights(source: Source) -> Weights:
    """The tensors, read when selected."""
    npz = source.folder / NPZ
    file = Npz(npz) if npz.is_file() else OnDisk(source.folder / SAFETENSORS)
    named = {name.lower(): name for name in file.names()}
    scaling = named.get("scaling_factor")
    if scaling and not torch.allclose(file.read(scaling), torch.ones(1, dtype=torch.float32)):
        wanted, cause = "a Gemma Scope file, which has none", "another library's file of this name"
        call = "the layout it was written in"
        raise refuse(source.folder, "whose scaling_factor is not 1", wanted, cause, call)
    views = {name: View(named.get(name.lower(), name)) for name in TENSORS}
    if SKIP in named:
        views["W_skip"] = View(SKIP, transposed=True)
    if "embedding" in source.path:  # trained on embeddings times √d
        root = math.sqrt(file.shape(views["W_enc"].name)[0])
        views["W_enc"] = View(views["W_enc"].name, scale=1 / root)
        views["W_dec"] = View(views["W_dec"].name, scale=root)
    return Mapped(file, views, aside=(scaling,) if scaling else ())
