"""The oracle's own table of sites: where each lies in the modules of each family."""

from __future__ import annotations

from typing import NamedTuple

D, HEADS, MLP = 32, 4, 64
LAYERS = 3
NORMED = ("gemma2", "gemma3_text", "olmo2")  # a norm stands behind attention and MLP
WITH_LAYERNORM = ("gpt2", "gpt_neox")


class Place(NamedTuple):
    """A module and its end; ``norm`` if the value is normalized without weight, ``skip`` the block
    whose input is added."""

    path: str
    end: str
    norm: str | None = None
    skip: str | None = None


ORDER = (
    *("resid_pre", "z", "attn_out", "resid_mid", "mlp_norm", "mlp_in", "mlp_post", "mlp_out"),
    "resid_post",
)
"""Within a block; gpt_neox too computes attention first."""

EXTRA = {
    "gpt2": {
        "attn.c_attn.output": (0.5, 96),
        "ln_1.output": (0.2, 32),
        "mlp.c_fc.output": (5.5, 128),
    },
    "gpt_neox": {
        "attention.query_key_value.output": (0.5, 96),
        "mlp.dense_h_to_4h.output": (5.5, 64),
        "input_layernorm.output": (0.2, 32),
    },
    "phi3": {"self_attn.qkv_proj.output": (0.5, 64), "input_layernorm.output": (0.2, 32)},
    "olmo2": {"self_attn.v_proj.output": (0.5, 16), "mlp.gate_proj.output": (5.5, 64)},
    None: {
        "self_attn.v_proj.output": (0.5, 16),
        "input_layernorm.output": (0.2, 32),
        "mlp.gate_proj.output": (5.5, 64),
    },
}
"""Modules without a name in the table: path in the block → (where in ``ORDER``, width)."""


def blocks(family: str) -> str:
    return {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(family, "model.layers")


def sites(family: str) -> tuple[str, ...]:
    """Every site of a family in the order in which a pass reaches them."""
    missing = {"gpt_neox": ("resid_mid",), "olmo2": ("mlp_norm",)}.get(family, ())
    names = []
    for layer in range(LAYERS):
        names += [f"{kind}.{layer}" for kind in ORDER if kind not in missing]
        extra = EXTRA.get(family, EXTRA[None])
        names += [f"{blocks(family)}.{layer}.{path}" for path in extra]
    return tuple(sorted(names, key=lambda site: rank(family, site)))


def rank(family: str, site: str) -> tuple[int, float]:
    """Sorts sites as a forward pass reaches them."""
    kind, _, layer = site.partition(".")
    if kind in ORDER:
        return int(layer), float(ORDER.index(kind))
    layer, path = site.removeprefix(blocks(family) + ".").split(".", 1)
    return int(layer), EXTRA.get(family, EXTRA[None])[path][0]


def width(family: str, site: str) -> int:
    kind = site.partition(".")[0]
    if kind == "mlp_post":
        return 4 * D if family == "gpt2" else MLP
    if kind in ORDER:
        return D
    path = site.removeprefix(blocks(family) + ".").split(".", 1)[1]
    return EXTRA.get(family, EXTRA[None])[path][1]


def place(family: str, site: str) -> Place:
    kind, _, layer = site.partition(".")
    if kind not in ORDER:
        path, _, end = site.rpartition(".")
        return Place(path, end)
    block = f"{blocks(family)}.{layer}"
    attention = {"gpt2": "attn", "gpt_neox": "attention"}.get(family, "self_attn")
    project = {"gpt2": "c_proj", "gpt_neox": "dense"}.get(family, "o_proj")
    down = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h"}.get(family, "down_proj")
    out, mlp = attention, "mlp"
    if family in NORMED:
        out, mlp = "post_attention_layernorm", "post_feedforward_layernorm"
    before = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}
    before |= {"gemma3_text": "pre_feedforward_layernorm"}
    kind_of_norm = "layer" if family in WITH_LAYERNORM else "rms"
    return {
        "resid_pre": Place(block, "input"),
        "z": Place(f"{block}.{attention}.{project}", "input"),
        "attn_out": Place(f"{block}.{out}", "output"),
        "resid_mid": Place(f"{block}.{out}", "output", skip=block),
        "mlp_norm": Place(
            f"{block}.{before.get(family, 'post_attention_layernorm')}", "input", kind_of_norm
        ),
        "mlp_in": Place(f"{block}.mlp", "input"),
        "mlp_post": Place(f"{block}.mlp.{down}", "input"),
        "mlp_out": Place(f"{block}.{mlp}", "output"),
        "resid_post": Place(block, "output"),
    }[kind]


def epsilon(config: object) -> float:
    """Of the norms of a model."""
    names = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
    return next(getattr(config, name) for name in names if hasattr(config, name))
