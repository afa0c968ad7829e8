"""Families: where each kind of site lies in the blocks of a model type.

The table was checked on tensors. A place is a path within the block and the module's end; the third
entry, if there is one, says how the site's value is made of what is found there.
"""

from __future__ import annotations

SKIP = "plus the block's input"
NORMS = ("rms", "layer")
JOINT = "queries, keys, values side by side"
HEADWISE = "for each key: its queries, it, its value"
_LLAMA = {
    "resid_pre": ("", "input"),
    "q": ("self_attn.q_proj", "output"),
    "k": ("self_attn.k_proj", "output"),
    "v": ("self_attn.v_proj", "output"),
    "z": ("self_attn.o_proj", "input"),
    "attn_out": ("self_attn", "output"),
    "resid_mid": ("self_attn", "output", SKIP),
    "mlp_norm": ("post_attention_layernorm", "input", "rms"),
    "mlp_in": ("mlp", "input"),
    "mlp_post": ("mlp.down_proj", "input"),
    "mlp_out": ("mlp", "output"),
    "resid_post": ("", "output"),
}
_SANDWICH = {  # norms behind attention and MLP: what is added to the stream is their output
    **_LLAMA,
    "attn_out": ("post_attention_layernorm", "output"),
    "resid_mid": ("post_attention_layernorm", "output", SKIP),
    "mlp_out": ("post_feedforward_layernorm", "output"),
}
_GEMMA2 = {**_SANDWICH, "mlp_norm": ("pre_feedforward_layernorm", "input", "rms")}
_OLMO2 = {kind: place for kind, place in _SANDWICH.items() if kind != "mlp_norm"}  # no norm before
_GPT2 = {
    "resid_pre": ("", "input"),
    "q": ("attn.c_attn", "output", JOINT),
    "k": ("attn.c_attn", "output", JOINT),
    "v": ("attn.c_attn", "output", JOINT),
    "z": ("attn.c_proj", "input"),
    "attn_out": ("attn", "output"),
    "resid_mid": ("attn", "output", SKIP),
    "mlp_norm": ("ln_2", "input", "layer"),
    "mlp_in": ("mlp", "input"),
    "mlp_post": ("mlp.c_proj", "input"),
    "mlp_out": ("mlp", "output"),
    "resid_post": ("", "output"),
}
_NEOX = {  # attention and MLP in parallel: there is no resid_mid
    "resid_pre": ("", "input"),
    "q": ("attention.query_key_value", "output", HEADWISE),
    "k": ("attention.query_key_value", "output", HEADWISE),
    "v": ("attention.query_key_value", "output", HEADWISE),
    "z": ("attention.dense", "input"),
    "attn_out": ("attention", "output"),
    "mlp_norm": ("post_attention_layernorm", "input", "layer"),
    "mlp_in": ("mlp", "input"),
    "mlp_post": ("mlp.dense_4h_to_h", "input"),
    "mlp_out": ("mlp", "output"),
    "resid_post": ("", "output"),
}
_PHI3 = _LLAMA | {kind: ("self_attn.qkv_proj", "output", JOINT) for kind in ("q", "k", "v")}
FAMILIES: dict[str, tuple[str, dict[str, tuple]]] = {
    "gpt2": ("transformer.h", _GPT2),
    "gpt_neox": ("gpt_neox.layers", _NEOX),
    "llama": ("model.layers", _LLAMA),
    "mistral": ("model.layers", _LLAMA),
    "qwen2": ("model.layers", _LLAMA),
    "qwen3": ("model.layers", _LLAMA),
    "phi3": ("model.layers", _PHI3),
    "gemma": ("model.layers", _LLAMA),
    "olmo2": ("model.layers", _OLMO2),
    "gemma2": ("model.layers", _GEMMA2),
    "gemma3_text": ("model.layers", _GEMMA2),
    "gemma3": ("model.language_model.layers", _GEMMA2),
}
"""Model type → (path of the blocks, site kind → place within a block)."""

NESTED = {
    "llava": "model.language_model.layers",
    "mistral3": "model.language_model.layers",
    "qwen2_vl": "model.language_model.layers",
    "qwen2_5_vl": "model.language_model.layers",
}
"""Multimodal model type → path of the blocks, which are those of its text model's own type."""

TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}
