"""EleutherAI's sparsify: ``cfg.json`` beside ``sae.safetensors``, TopK SAEs and transcoders.

Read as sparsify itself computes, which sae-lens 6.54 does not: b_dec is always subtracted from
an SAE's input (``normalize_decoder`` concerns training alone), and W_dec is [d_sae, d_in].
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..dictionaries.weights import Mapped, OnDisk, View, Weights
from .declaration import Facts, Source, read_json, refuse
from .keys import Known

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


_KNOWN = Known(
    used=(
        *("activation", "n_targets", "k", "signed", "transcode", "num_latents", "d_in"),
        *("expansion_factor", "skip_connection"),
    ),
    harmless=("normalize_decoder", "multi_topk", "lookup_max_order", "gram_table_hash"),
    fixed={"embed_skip": (False,), "gram_lookup": (False,), "n_sources": (0,)},
)


def found(folder: Path) -> bool:
    """Whether these are its files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def facts(source: Source) -> Facts:
    """What ``cfg.json`` declares; the site is in the folder's name, for whole blocks alone.

    A folder of an MLP or attention module needs ``site=``: its output is ``hook_mlp_out`` in
    most models, but not in Gemma-2 and Gemma-3, and the folder does not say which model it is.
    """
    config = {**read_json(source.folder / CONFIG), **source.overrides}
    _KNOWN.require(config, source.folder)
    activation = config.get("activation", "topk")
    if activation != "topk" or config.get("n_targets"):
        got = f"with activation {activation!r} and {config.get('n_targets', 0)} target layers"
        cause = "groupmax and cross-layer coders cannot be computed by this version"
        call = "a coder trained with activation topk"
        raise refuse(source.folder, got, "a topk coder of one layer", cause, call)
    k = int(config["k"])
    signed, transcode = bool(config.get("signed")), bool(config.get("transcode"))
    width = config.get("num_latents") or config["d_in"] * config.get("expansion_factor", 0)
    sizes = {"d_in": config["d_in"], "d_sae": width or None}
    block = re.fullmatch(r"(?:layers|h)[._](\d+)", source.folder.name)
    return Facts(
        layout="sparsify",
        hook=f"blocks.{block[1]}.hook_resid_post" if block and not transcode else None,
        transcoder=transcode,
        architecture="abstopk" if signed else "topk",
        subtract_bias=not transcode,
        k=k,
        sizes={name: size for name, size in sizes.items() if size},
        width=width,
        l0=float(k),
    )


def weights(source: Source) -> Weights:
    """The tensors, renamed and transposed, read when selected."""
    file = OnDisk(source.folder / WEIGHTS)
    views, constants = {}, {}
    for name, plain in (("W_enc", "encoder.weight"), ("W_dec", "decoder.weight")):
        views[name] = View(name) if name in file.names() else View(plain, transposed=True)
    d_in, d_sae = Mapped(file, views, aside=file.names()).shape("W_enc")
    for name, plain, size in (("b_enc", "encoder.bias", d_sae), ("b_dec", "decoder.bias", d_in)):
        there = [n for n in (name, plain) if n in file.names()]
        if there:
            views[name] = View(there[0])
        else:
            constants[name] = torch.zeros(size, dtype=torch.float32)
    declared = bool(read_json(source.folder / CONFIG).get("skip_connection"))
    if declared != ("W_skip" in file.names()):
        got = f"whose {CONFIG} says skip_connection = {str(declared).lower()}, and whose tensors"
        got += " have no W_skip" if declared else " have W_skip"
        cause = "a configuration and a file of two coders"
        raise refuse(source.folder, got, "the two to agree", cause, "fetch both files again")
    if declared:
        views["W_skip"] = View("W_skip")
    return Mapped(file, views, constants)
