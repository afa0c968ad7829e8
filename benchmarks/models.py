"""Models and dictionaries of the benchmarks: real shapes, random weights, nothing downloaded."""

from __future__ import annotations

import torch
from nnsight import TransformersModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

import saefeat as sf


def model(layers: int, width: int, vocabulary: int = 1024) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    heads = width // 64
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        query_pre_attn_scalar=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    built = Gemma2ForCausalLM(config).eval()
    built.generation_config.eos_token_id = None  # every run makes the same number of tokens
    return built


def saes(plain: Gemma2ForCausalLM, latents: int, l0: int = 100) -> sf.dictionaries.Dictionaries:
    """JumpReLU SAEs on every resid_post, with about ``l0`` latents active a token."""
    values: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: values.append(out.flatten(0, 1)))
        for block in plain.model.layers
    ]
    with torch.no_grad():
        plain(**batch(4, 32))
    for hook in hooks:
        hook.remove()
    torch.manual_seed(1)
    found = []
    for layer, x in enumerate(values):
        width = x.shape[1]
        encoder = torch.randn(width, latents) / width**0.5
        threshold = float((x @ encoder).flatten().kthvalue(len(x) * (latents - l0)).values)
        tensors = {
            "W_enc": encoder,
            "b_enc": torch.zeros(latents),
            "W_dec": encoder.T.contiguous(),
            "b_dec": torch.zeros(width),
            "threshold": torch.full((latents,), threshold),
        }
        site = f"resid_post.{layer}"
        found.append(sf.SAE.from_tensors(tensors, architecture="jumprelu", site=site))
    return sf.dictionaries.Dictionaries(found)


def batch(rows: int, tokens: int, vocabulary: int = 1024) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(3, vocabulary, (rows, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def traced(plain: Gemma2ForCausalLM) -> TransformersModel:
    """The same model for nnsight, which asks for a tokenizer though ids are all it is given."""
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), pad_token="<pad>"
    )
    return TransformersModel(plain, tokenizer=tokenizer, task="text-generation")
