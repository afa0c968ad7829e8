"""The mwhanna transcoders: one ``layer_<n>.safetensors`` a layer in a repository's root.

Tensors are sae-lens's, except that W_enc lies as [d_sae, d_in]. They read the MLP's input and
write its output.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..dictionaries.weights import Mapped, OnDisk, View, Weights
from .declaration import Facts, Source


def found(folder: Path) -> bool:
    """Never: those of all layers lie together, so that a folder is none of them."""
    return False


def facts(source: Source) -> Facts:
    """What the file's name declares."""
    layer = re.search(r"layer_(\d+)\.safetensors$", source.path)
    block = f"blocks.{layer[1]}." if layer else None
    return Facts(
        layout="circuit-tracer",
        hook=block and block + "mlp.hook_in",
        hook_out=block and block + "hook_mlp_out",
        transcoder=True,
        architecture="transcoder",
    )


def weights(source: Source) -> Weights:
    """The tensors, read when selected."""
    file = OnDisk(source.folder / source.path.rsplit("/", 1)[-1])
    views = {name: View(name) for name in file.names()}
    return Mapped(file, views | {"W_enc": View("W_enc", transposed=True)})
