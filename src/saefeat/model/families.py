"""Families: the blocks of each model type, and the table that says where sites lie in them.

A new family is a line here, and a table in ``tables`` if it is built as no other is: the page
"How to add a family" of the guide shows how its table is found and checked.
"""

from __future__ import annotations

from . import tables as t

FAMILIES: dict[str, tuple[str, t.Table]] = {
    "gpt2": ("transformer.h", t.GPT2),
    "gpt_neo": ("transformer.h", t.GPT_NEO),
    "gptj": ("transformer.h", t.GPTJ),
    "gpt_bigcode": ("transformer.h", t.GPT2),
    "gpt_neox": ("gpt_neox.layers", t.NEOX),
    "opt": ("model.decoder.layers", t.OPT),
    "bloom": ("transformer.h", t.BLOOM),
    "mpt": ("transformer.blocks", t.MPT),
    "falcon": ("transformer.h", t.FALCON),
    "phi": ("model.layers", t.PHI),
    "stablelm": ("model.layers", t.LAYERNORM),
    "starcoder2": ("model.layers", t.STARCODER2),
    "nemotron": ("model.layers", t.LAYERNORM),
    "olmo": ("model.layers", t.LAYERNORM),
    "cohere": ("model.layers", t.COHERE),
    "cohere2": ("model.layers", t.COHERE),
    "llama": ("model.layers", t.LLAMA),
    "mistral": ("model.layers", t.LLAMA),
    "ministral": ("model.layers", t.LLAMA),
    "ministral3": ("model.layers", t.LLAMA),
    "qwen2": ("model.layers", t.LLAMA),
    "qwen3": ("model.layers", t.LLAMA),
    "smollm3": ("model.layers", t.LLAMA),
    "ernie4_5": ("model.layers", t.LLAMA),
    "hunyuan_v1_dense": ("model.layers", t.LLAMA),
    "phi3": ("model.layers", t.PHI3),
    "glm": ("model.layers", t.LLAMA),
    "glm4": ("model.layers", t.GLM4),
    "granite": ("model.layers", t.GRANITE),
    "gemma": ("model.layers", t.LLAMA),
    "olmo2": ("model.layers", t.OLMO2),
    "olmo3": ("model.layers", t.OLMO2),
    "exaone4": ("model.layers", t.OLMO2),
    "gemma2": ("model.layers", t.GEMMA2),
    "gemma3_text": ("model.layers", t.GEMMA2),
    "gemma3": ("model.language_model.layers", t.GEMMA2),
    "gemma3n_text": ("model.layers", t.GEMMA3N),
    "mixtral": ("model.layers", t.MOE),
    "qwen2_moe": ("model.layers", t.MOE),
    "qwen3_moe": ("model.layers", t.MOE),
    "olmoe": ("model.layers", t.MOE),
    "glm4_moe": ("model.layers", t.MOE),
    "deepseek_v2": ("model.layers", t.DEEPSEEK),
    "deepseek_v3": ("model.layers", t.DEEPSEEK),
    "hunyuan_v1_moe": ("model.layers", t.HUNYUAN_MOE),
    "granitemoe": ("model.layers", t.GRANITEMOE),
    "gpt_oss": ("model.layers", t.GPT_OSS),
    "llama4_text": ("model.layers", t.LLAMA4),
    "qwen3_next": ("model.layers", t.QWEN3_NEXT),
    "lfm2": ("model.layers", t.LFM2),
    "jamba": ("model.layers", t.JAMBA),
    "falcon_h1": ("model.layers", t.FALCON_H1),
    "recurrent_gemma": ("model.layers", t.RECURRENT_GEMMA),
    "zamba2": ("model.layers", t.MAMBA),
    "mamba": ("backbone.layers", t.MAMBA),
    "mamba2": ("backbone.layers", t.MAMBA),
}
"""Model type → (path of the blocks, site kind → place within a block)."""

VARIANTS: dict[str, tuple[tuple[dict[str, object], t.Table], ...]] = {
    "gpt_bigcode": (({"multi_query": False}, t.BIGCODE_HEADS),),
    "gpt_neox": (({"use_parallel_residual": False}, t.NEOX_IN_TURN),),
    "opt": (({"do_layer_norm_before": False}, t.OPT_POST),),
    "bloom": (({"apply_residual_connection_post_layernorm": True}, t.BLOOM_POST),),
    "falcon": (
        ({"parallel_attn": False}, t.FALCON_IN_TURN),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2}, t.FALCON_TWO_NORMS),
    ),
    "stablelm": (({"use_parallel_residual": True}, t.STABLELM_PARALLEL),),
}
"""Model type → (settings of its configuration, the table of models that have all of these)."""

NESTED = {
    "llava": "model.language_model.layers",
    "llava_next": "model.language_model.layers",
    "llava_onevision": "model.language_model.layers",
    "paligemma": "model.language_model.layers",
    "internvl": "model.language_model.layers",
    "aya_vision": "model.language_model.layers",
    "idefics3": "model.text_model.layers",
    "smolvlm": "model.text_model.layers",
    "llama4": "language_model.model.layers",
    "mistral3": "model.language_model.layers",
    "qwen2_vl": "model.language_model.layers",
    "qwen2_5_vl": "model.language_model.layers",
    "qwen3_vl": "model.language_model.layers",
}
"""Multimodal model type → path of the blocks, which are those of its text model's own type."""

TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Type of a text model that stands in these alone → the type whose blocks it has."""


def table_of(kind: str, config: object) -> t.Table:
    """The table of a text model of this type and configuration."""
    for settings, table in VARIANTS.get(kind, ()):
        if all(getattr(config, name, None) == value for name, value in settings.items()):
            return table
    return FAMILIES[kind][1]
