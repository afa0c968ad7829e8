"""A tiny random model of every family: two layers (more where layers differ), width 32, float32."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers

from helpers import PAD, VOCAB, D

_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_ALL = {"vocab_size": VOCAB, "tie_word_embeddings": False, **_IDS}
_BASE = {
    **_ALL,
    "hidden_size": D,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_GEMMA = {**_HEADS, "query_pre_attn_scalar": 8, "sliding_window": 4}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_MOE |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
_MLA |= {"v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1}
_N = {**_ALL, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64}
_STATE = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_groups": 1}
_MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4}

ZOO: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2", _N),
    "gpt_neo": ("GPTNeo", {
        **_ALL, "hidden_size": D, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]], "window_size": 4,
    }),
    "gptj": ("GPTJ", {**_N, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCode", _N),
    "gpt_bigcode multi_query=False": ("GPTBigCode", {**_N, "multi_query": False}),
    "gpt_neox": ("GPTNeoX", _BASE),
    "gpt_neox in turn": ("GPTNeoX", {**_BASE, "use_parallel_residual": False}),
    "opt": ("OPT", {**_BASE, "ffn_dim": 64, "word_embed_proj_dim": D}),
    "opt post-norm": ("OPT", {
        **_BASE, "ffn_dim": 64, "word_embed_proj_dim": D, "do_layer_norm_before": False,
    }),
    "bloom": ("Bloom", {**_ALL, "hidden_size": D, "n_layer": 2, "n_head": 4}),
    "bloom post-norm": ("Bloom", {
        **_ALL, "hidden_size": D, "n_layer": 2, "n_head": 4,
        "apply_residual_connection_post_layernorm": True,
    }),
    "mpt": ("Mpt", {**_ALL, "d_model": D, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "falcon": ("Falcon", _BASE),
    "falcon two norms": ("Falcon", {
        **_BASE, "new_decoder_architecture": True, "num_kv_heads": 2,
    }),
    "falcon in turn": ("Falcon", {
        **_BASE, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True,
    }),
    "phi": ("Phi", _BASE),
    "stablelm": ("StableLm", _GROUPED),
    "stablelm parallel": ("StableLm", {**_GROUPED, "use_parallel_residual": True}),
    "starcoder2": ("Starcoder2", _GROUPED),
    "nemotron": ("Nemotron", _HEADS),
    "olmo": ("Olmo", _GROUPED),
    "cohere": ("Cohere", _GROUPED),
    "cohere2": ("Cohere2", {**_HEADS, "sliding_window": 4}),
    "llama": ("Llama", _HEADS),
    "mistral": ("Mistral", _HEADS),
    "ministral": ("Ministral", {**_HEADS, "sliding_window": 4}),
    "ministral3": ("Ministral3", _HEADS),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", _HEADS),
    "smollm3": ("SmolLM3", _GROUPED),
    "ernie4_5": ("Ernie4_5", _HEADS),
    "hunyuan_v1_dense": ("HunYuanDenseV1", _HEADS),
    "phi3": ("Phi3", _GROUPED),
    "glm": ("Glm", _HEADS),
    "glm4": ("Glm4", _HEADS),
    "granite": ("Granite", {
        **_GROUPED, "residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 3.0,
    }),
    "gemma": ("Gemma", _HEADS),
    "olmo2": ("Olmo2", _GROUPED),
    "olmo3": ("Olmo3", {**_GROUPED, "sliding_window": 4}),
    "exaone4": ("Exaone4", {**_HEADS, "sliding_window": 4}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3_text": ("Gemma3Text", _GEMMA),
    "gemma3n_text": ("Gemma3nText", {
        **_HEADS, "num_hidden_layers": 4, "sliding_window": 4, "intermediate_size": [64] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 3,
    }),
    "mixtral": ("Mixtral", {**_HEADS, **_MOE}),
    "qwen2_moe": ("Qwen2Moe", {**_GROUPED, **_MOE, "mlp_only_layers": [0]}),
    "qwen3_moe": ("Qwen3Moe", {**_HEADS, **_MOE, "mlp_only_layers": [0]}),
    "olmoe": ("Olmoe", {**_GROUPED, **_MOE}),
    "glm4_moe": ("Glm4Moe", {**_HEADS, **_MOE, **_GROUPS, "first_k_dense_replace": 1}),
    "deepseek_v2": ("DeepseekV2", {**_BASE, **_MOE, **_GROUPS, **_MLA}),
    "deepseek_v2 without q_lora": ("DeepseekV2", {
        **_BASE, **_MOE, **_GROUPS, **_MLA, "q_lora_rank": None,
    }),
    "deepseek_v3": ("DeepseekV3", {**_BASE, **_MOE, **_GROUPS, **_MLA}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {**_HEADS, **_MOE, "moe_topk": 2}),
    "granitemoe": ("GraniteMoe", {**_GROUPED, **_MOE, "residual_multiplier": 0.3}),
    "gpt_oss": ("GptOss", {**_HEADS, **_MOE, "sliding_window": 4}),
    "llama4_text": ("Llama4Text", {
        **_HEADS, **_MOE, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2,
    }),
    "qwen3_next": ("Qwen3Next", {
        **_HEADS, **_MOE, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "mlp_only_layers": [0],
    }),
    "lfm2": ("Lfm2", {
        **_GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8,
    }),
    "jamba": ("Jamba", {
        **_GROUPED, **_MOE, **_STATE, "use_mamba_kernels": False, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    }),
    "falcon_h1": ("FalconH1", {
        **_GROUPED, **_STATE, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_chunk_size": 4, "attention_out_multiplier": 0.5, "ssm_out_multiplier": 0.7,
    }),
    "recurrent_gemma": ("RecurrentGemma", {
        **_HEADS, "lru_width": D, "block_types": ["recurrent", "attention"],
        "attention_window_size": 8,
    }),
    "zamba2": ("Zamba2", {
        **_BASE, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 1,
        "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 4, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4, "use_mamba_kernels": False,
    }),
    "mamba": ("Mamba", {
        **_ALL, "hidden_size": D, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4,
    }),
    "mamba2": ("Mamba2", {**_ALL, **_MAMBA2, "hidden_size": D, "num_hidden_layers": 2}),
}  # fmt: skip
"""Name → (the classes' prefix, options). A name is the model type, and what of it is tried."""


@cache
def _template(name: str) -> torch.nn.Module:
    prefix, options = ZOO[name]
    config = getattr(transformers, f"{prefix}Config")(**options)
    head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    kind = prefix.removesuffix("Text") if prefix != "Llama4Text" else "Llama4"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}{head}")(config).eval()
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that are not one and zero
                parameter.data += 0.2 * torch.randn_like(parameter)
            elif "A_log" not in path:
                spread = 0.5 if "embed" in path or "wte" in path else 0.15
                parameter.data = spread * torch.randn_like(parameter)
    # Never stop early.
    model.generation_config.eos_token_id = VOCAB
    model.generation_config.pad_token_id = PAD
    return model


def model_of(name: str) -> torch.nn.Module:
    """A fresh tiny model with random weights, the same ones at every call."""
    return copy.deepcopy(_template(name))
