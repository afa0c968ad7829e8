"""Tables: site kind → where it lies in a block, one table for all families that are built alike.

An entry is the module's path within the block, its end, and how the site's value is made of what
is found there. A path may name several modules, ``self_attn|linear_attn``: a layer has one of
them, or none, and then has no such site. What was checked of each: the value is added to the
stream as it stands here, which a module's name never tells.
"""

from __future__ import annotations

SKIP = "plus the block's input"
NORMS = ("rms", "layer")
JOINT = "queries, keys, values side by side"
HEADWISE = "for each key: its queries, it, its value"
GATED = "for each head: its queries, its gate"
OWN = "a copy: the block adds to it in place"
STREAM = "the active stream of several"
TIMES = "times "  # and the name of a number in the configuration
Table = dict[str, tuple]


def _named(
    attention: str, mlp: str, norms: tuple[str, str], out: str, down: str, kind: str = "rms"
) -> Table:
    """A block of attention, then MLP, each behind a norm, under these names."""
    return {
        "resid_pre": ("", "input"),
        "attn_norm": (norms[0], "input", kind),
        "q": (f"{attention}.q_proj", "output"),
        "k": (f"{attention}.k_proj", "output"),
        "v": (f"{attention}.v_proj", "output"),
        "z": (f"{attention}.{out}", "input"),
        "attn_out": (attention, "output"),
        "resid_mid": (attention, "output", SKIP),
        "mlp_norm": (norms[1], "input", kind),
        "mlp_in": (mlp, "input"),
        "mlp_post": (f"{mlp}.{down}", "input"),
        "mlp_out": (mlp, "output"),
        "resid_post": ("", "output"),
    }


def without(table: Table, *kinds: str) -> Table:
    """A table that lacks some kinds."""
    return {kind: place for kind, place in table.items() if kind not in kinds}


def _fused(table: Table, module: str, how: str) -> Table:
    """A table whose queries, keys and values come from one projection."""
    return table | {kind: (module, "output", how) for kind in ("q", "k", "v")}


_HF = ("input_layernorm", "post_attention_layernorm")
_PARALLEL = ("resid_mid", "mlp_norm")  # attention and MLP read the same normalized stream

# ---------------------------------------------------------------- attention, then an MLP

LLAMA = _named("self_attn", "mlp", _HF, "o_proj", "down_proj")
LAYERNORM = _named("self_attn", "mlp", _HF, "o_proj", "down_proj", "layer")
PHI3 = _fused(LLAMA, "self_attn.qkv_proj", JOINT)
STARCODER2 = LAYERNORM | {"mlp_post": ("mlp.c_proj", "input")}
GRANITE = LLAMA | {
    "attn_out": ("self_attn", "output", TIMES + "residual_multiplier"),
    "resid_mid": ("self_attn", "output", SKIP, TIMES + "residual_multiplier"),
    "mlp_out": ("mlp", "output", TIMES + "residual_multiplier"),
}
SANDWICH = LLAMA | {  # norms behind attention and MLP: what is added to the stream is their output
    "attn_out": ("post_attention_layernorm", "output"),
    "resid_mid": ("post_attention_layernorm", "output", SKIP),
    "mlp_out": ("post_feedforward_layernorm", "output"),
}
GEMMA2 = SANDWICH | {"mlp_norm": ("pre_feedforward_layernorm", "input", "rms")}
OLMO2 = without(SANDWICH, "attn_norm", "mlp_norm")  # no norms before
GLM4 = LLAMA | {
    "attn_out": ("post_self_attn_layernorm", "output"),
    "resid_mid": ("post_self_attn_layernorm", "output", SKIP),
    "mlp_out": ("post_mlp_layernorm", "output"),
}
GPT2 = _fused(
    _named("attn", "mlp", ("ln_1", "ln_2"), "c_proj", "c_proj", "layer"), "attn.c_attn", JOINT
)
BIGCODE_HEADS = _fused(GPT2, "attn.c_attn", HEADWISE)
GPT_NEO = GPT2 | {
    "q": ("attn.attention.q_proj", "output"),
    "k": ("attn.attention.k_proj", "output"),
    "v": ("attn.attention.v_proj", "output"),
    "z": ("attn.attention.out_proj", "input"),
}
OPT = LAYERNORM | {
    "attn_norm": ("self_attn_layer_norm", "input", "layer"),
    "z": ("self_attn.out_proj", "input"),
    "mlp_norm": ("final_layer_norm", "input", "layer"),
    "mlp_in": ("fc1", "input"),
    "mlp_post": ("fc2", "input"),
    "mlp_out": ("fc2", "output"),
}
_ADDED = ("attn_out", "resid_mid", "mlp_out")  # where norms stand on the stream, nothing adds up
OPT_POST = without(OPT, "attn_norm", "mlp_norm", *_ADDED)
NEOX_IN_TURN = _fused(
    _named("attention", "mlp", _HF, "dense", "dense_4h_to_h", "layer"),
    "attention.query_key_value",
    HEADWISE,
)
BLOOM = _fused(NEOX_IN_TURN, "self_attention.query_key_value", HEADWISE) | {
    "z": ("self_attention.dense", "input"),  # attention and MLP return the stream they added to
    "attn_out": ("self_attention.dense", "output"),
    "resid_mid": ("self_attention", "output"),
    "mlp_out": ("mlp.dense_4h_to_h", "output"),
}
BLOOM_POST = without(BLOOM, *_ADDED)
MPT = _fused(
    _named("attn", "ffn", ("norm_1", "norm_2"), "out_proj", "down_proj", "layer"),
    "attn.Wqkv",
    JOINT,
) | {"mlp_out": ("ffn.down_proj", "output")}  # the MLP returns the stream

# ---------------------------------------------------------------- attention beside an MLP

NEOX = without(NEOX_IN_TURN, "resid_mid")
STABLELM_PARALLEL = without(LAYERNORM, *_PARALLEL)
COHERE = STABLELM_PARALLEL
PHI = COHERE | {"z": ("self_attn.dense", "input"), "mlp_post": ("mlp.fc2", "input")}
GPTJ = without(GPT_NEO, *_PARALLEL) | {
    "q": ("attn.q_proj", "output"),
    "k": ("attn.k_proj", "output"),
    "v": ("attn.v_proj", "output"),
    "z": ("attn.out_proj", "input"),
    "mlp_post": ("mlp.fc_out", "input"),
}
FALCON_IN_TURN = NEOX_IN_TURN | {
    **_fused({}, "self_attention.query_key_value", HEADWISE),
    "z": ("self_attention.dense", "input"),
    "attn_out": ("self_attention", "output"),
    "resid_mid": ("self_attention", "output", SKIP),
}
FALCON = without(FALCON_IN_TURN, *_PARALLEL) | {"mlp_out": ("mlp", "output", OWN)}
FALCON_TWO_NORMS = FALCON | {
    "attn_norm": ("ln_attn", "input", "layer"),
    "mlp_norm": ("ln_mlp", "input", "layer"),
}

# ---------------------------------------------------------------- mixtures of experts

MOE = LLAMA | {"router": ("mlp.gate", "output")}  # mlp_post in the dense layers alone
GPT_OSS = LLAMA | {"router": ("mlp.router", "output")}
GRANITEMOE = without(GRANITE, "mlp_post") | {
    "mlp_in": ("block_sparse_moe", "input"),
    "mlp_out": ("block_sparse_moe", "output", TIMES + "residual_multiplier"),
    "router": ("block_sparse_moe.router", "output"),
}
HUNYUAN_MOE = MOE | {"router": ("mlp.gate.wg", "output")}
DEEPSEEK = without(MOE, "k", "v") | {  # keys and values are one compressed value
    "q": ("self_attn.q_b_proj|self_attn.q_proj", "output")
}
LLAMA4 = LLAMA | {
    "mlp_in": ("feed_forward", "input"),
    "mlp_post": ("feed_forward.down_proj", "input"),
    "mlp_out": ("feed_forward", "output"),
}

# ---------------------------------------------------------------- layers that differ, states

QWEN3_NEXT = MOE | {
    "q": ("self_attn.q_proj", "output", GATED),
    "resid_mid": ("self_attn|linear_attn", "output", SKIP),
}
LFM2 = LLAMA | {
    "attn_norm": ("operator_norm", "input", "rms"),
    "z": ("self_attn.out_proj", "input"),
    "resid_mid": ("self_attn|conv", "output", SKIP),
    "mlp_norm": ("ffn_norm", "input", "rms"),
    "mlp_in": ("feed_forward", "input"),
    "mlp_post": ("feed_forward.w2", "input"),
    "mlp_out": ("feed_forward", "output"),
}
JAMBA = LLAMA4 | {
    "resid_mid": ("self_attn|mamba", "output", SKIP),
    "mlp_norm": ("pre_ff_layernorm", "input", "rms"),
    "router": ("feed_forward.router", "output"),
}
FALCON_H1 = without(LLAMA4, "resid_mid") | {  # attention and a state-space mixer side by side
    "attn_out": ("self_attn", "output", TIMES + "attention_out_multiplier"),
    "mlp_norm": ("pre_ff_layernorm", "input", "rms"),
}
RECURRENT_GEMMA = _named(
    "temporal_block", "mlp_block", ("temporal_pre_norm", "channel_pre_norm"), "o_proj", "down_proj"
) | {"attn_out": ("temporal_block.o_proj", "output")}
MAMBA = {kind: LLAMA[kind] for kind in ("resid_pre", "resid_post")}
GEMMA3N = without(GEMMA2, "resid_mid") | {
    "resid_pre": ("", "input", STREAM),
    "resid_post": ("", "output", STREAM),
}
