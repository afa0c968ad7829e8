"""Tiny random models, a word-level tokenizer and random dictionary weights for the freeze.

Nothing here knows saefeat. Every number comes from a seed set right before it is drawn, so that
another order of cases, or another way in which transformers initializes, changes nothing.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

D, LAYERS, VOCAB, D_MLP, D_SAE = 32, 3, 100, 64, 48
PAD, EOS, BOS, UNK = 0, 1, 2, 3
RAGGED = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w10 w11 w12 w13"]
"""Three prompts of 3, 6 and 4 tokens."""
OTHERS = ["w20 w21 w3", "w4 w25 w6 w7 w8 w29", "w10 w31 w12 w13"]
"""For each of them another one as long."""

_IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": D_MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    **_IDS,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "n_inner": D_MLP}
_GEMMA = {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "tie_word_embeddings": False, **_GPT2, **_IDS},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _COMMON),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
}
"""Family → configuration class, model class, options."""


def generator(seed: int) -> torch.Generator:
    """A source of random numbers of its own."""
    return torch.Generator().manual_seed(seed)


@cache
def _template(family: str) -> nn.Module:
    configuration, kind, options = FAMILIES[family]
    config = getattr(transformers, configuration)(**options)
    with torch.random.fork_rng():
        model = getattr(transformers, kind)(config).eval()
    source = generator(list(FAMILIES).index(family))
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=source)
        if parameter.ndim == 1:  # a norm's weight or a bias
            ones = "bias" not in name and family not in ("gemma2", "gemma3")
            parameter.data = 0.3 * drawn + float(ones)
        else:
            parameter.data = drawn * (0.5 if "embed" in name or "wte" in name else 0.15)
    # Never stop early, unless a case wants it; None would fall back on the model's own EOS.
    model.generation_config.eos_token_id = VOCAB
    model.generation_config.pad_token_id = PAD
    return model


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh tiny model with random weights, the same ones at every call."""
    return copy.deepcopy(_template(family)).to(dtype)


@cache
def tokenizer() -> Any:
    """Word-level: <pad> <eos> <bos> <unk> w0 ... w95; adds no special token by itself."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 4))]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def batch_of(prompts: list[str]) -> dict[str, Tensor]:
    """Prompts as a batch, left-padded by hand."""
    rows = [tokenizer()(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, rows))
    ids = [[PAD] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def vector(seed: int, width: int = D) -> Tensor:
    """A random unit vector."""
    found = torch.randn(width, generator=generator(seed))
    return found / found.norm()


def weights(architecture: str, seed: int, width: int = D) -> dict[str, Tensor]:
    """A dictionary's random tensors, by sae-lens's names."""
    source = generator(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64).float() / 4

    found = {"W_enc": rand(width, D_SAE), "W_dec": rand(D_SAE, width), "b_dec": rand(width)}
    if architecture == "gated":
        found |= {name: rand(D_SAE) for name in ("b_gate", "b_mag", "r_mag")}
    else:
        found["b_enc"] = rand(D_SAE)
    if "jumprelu" in architecture:
        found["threshold"] = rand(D_SAE).abs() * 2
    if "skip" in architecture:
        found["W_skip"] = rand(width, width)
    return found
