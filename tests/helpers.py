"""Shared builders: tiny random models, a word-level tokenizer, random dictionaries, raw hooks.

Everything here is independent of the mathematics under test: sites are found by hand-written
module paths, so that an error in ``saefeat.sites`` cannot hide in its own oracle.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

import torch
import transformers
from nnsight import TransformersModel
from tokenizers import Tokenizer, models, pre_tokenizers

import saefeat as sf

D, LAYERS, VOCAB, D_SAE = 32, 3, 100, 48
PAD, EOS, BOS, UNK = 0, 1, 2, 3
RAGGED = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w10 w11 w12 w13"]
"""Three prompts of 3, 6 and 4 tokens."""

_IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    **_IDS,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_GEMMA = {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4}
_NO_HEAD_DIM = {k: v for k, v in _GROUPED.items() if k != "head_dim"}
CONFIGS = {
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "tie_word_embeddings": False, **_GPT2, **_IDS}),
    "gpt_neox": ("GPTNeoX", _COMMON),
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", _GROUPED),
    "qwen2": ("Qwen2", _NO_HEAD_DIM),
    "qwen3": ("Qwen3", _GROUPED),
    "phi3": ("Phi3", _NO_HEAD_DIM),
    "gemma": ("Gemma", _GROUPED),
    "olmo2": ("Olmo2", _NO_HEAD_DIM),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3_text": ("Gemma3", _GEMMA),
}
FAMILIES = list(CONFIGS)


@cache
def _template(family: str) -> torch.nn.Module:
    name, options = CONFIGS[family]
    text = "Text" if family == "gemma3_text" else ""
    config = getattr(transformers, f"{name}{text}Config")(**options)
    kind = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(len(family))
        model = getattr(transformers, kind)(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that are not one and zero
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif "embed_tokens" in parameter_name or "wte" in parameter_name:
                parameter.data = torch.randn_like(parameter) * 0.5
            else:
                parameter.data = torch.randn_like(parameter) * 0.15
    # Never stop early, unless a test wants it; None would fall back on the model's own EOS.
    model.generation_config.eos_token_id = VOCAB
    model.generation_config.pad_token_id = PAD
    return model


MISSING = "NDIF's released server is not installed: `make test` installs it where it can be had"
# CI asks for it by the environment, so that nothing is left out there without a word.
SKIPS = importlib.util.find_spec("ndif") is None and "SAEFEAT_REQUIRE_NDIF" not in os.environ


def build(family: str = "gemma2", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A fresh tiny model with random weights, the same ones at every call."""
    return copy.deepcopy(_template(family)).to(dtype)


@cache
def tokenizer():
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


def transformers_model(model: torch.nn.Module, its_tokenizer):
    """An nnsight model around a module in memory."""
    return TransformersModel(model, tokenizer=its_tokenizer, task="text-generation")


def wrapped(model: torch.nn.Module):
    return transformers_model(model, tokenizer())


def batch_of(prompts=RAGGED) -> dict[str, torch.Tensor]:
    """Left-padded by hand."""
    rows = [tokenizer()(p)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def forward(model: torch.nn.Module, batch) -> torch.Tensor:
    """Logits [b, t, v] of the bare call, with the positions that generate and nnsight give."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**batch, position_ids=positions).logits


def blocks_of(model: torch.nn.Module):
    if hasattr(model, "transformer"):
        return model.transformer.h
    return (model.gpt_neox if hasattr(model, "gpt_neox") else model.model).layers


def plant_sinks(model: torch.nn.Module, layer: int = 0, *, ids=(), first=True, times=100.0):
    """Make tokens of a text outliers from a block on, as attention sinks are in real models.

    The first token of every prompt, whatever it is, and every token with one of ``ids`` get a
    vector of ``times`` the median norm of the residual stream behind the block. Steps that decode
    have no first token.
    """
    seen: dict[str, torch.Tensor] = {}

    def look(_, args, kwargs):
        seen["ids"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        seen["mask"] = torch.ones_like(seen["ids"]) if mask is None else mask

    block = blocks_of(model)[layer]
    inner = block.forward

    def forward(*args, **kwargs):  # a hook's value would come behind what nnsight reads
        output = inner(*args, **kwargs)
        x = output[0] if isinstance(output, tuple) else output
        tokens = seen["ids"]
        sinks = torch.isin(tokens, torch.tensor(list(ids), dtype=tokens.dtype))
        if first and seen["mask"].shape == tokens.shape:
            sinks = sinks | (seen["mask"] * seen["mask"].cumsum(1) == 1)
        size = times * x.detach().norm(dim=-1).median()
        x = x + sinks[..., None] * size * unit_like(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    model.register_forward_pre_hook(look, with_kwargs=True)
    block.forward = forward
    return model


def unit_like(x: torch.Tensor) -> torch.Tensor:
    """A fixed direction of x's width."""
    v = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(7))
    return (v / v.norm()).to(x)


def capture_inputs_outputs(model, modules: dict[str, torch.nn.Module], batch) -> dict[str, dict]:
    """{name: {"input": tensor, "output": tensor}} of one forward pass, by plain hooks."""
    found: dict[str, dict] = {}

    def hook(name):
        def run(_, args, kwargs, output):
            x = args[0] if args else next(iter(kwargs.values()))
            out = output[0] if isinstance(output, tuple) else output
            found[name] = {"input": x.detach().clone(), "output": out.detach().clone()}

        return run

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        with torch.no_grad():
            found["logits"] = model(**batch).logits
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def raw_hooks(model, edits: dict[int, object]):
    """The hand-written oracle: ``edits[layer](x) -> x'`` on the residual stream after a block."""

    def hook(function):
        def run(_, __, output):
            if isinstance(output, tuple):
                return (function(output[0]), *output[1:])
            return function(output)

        return run

    blocks = blocks_of(model)
    handles = [blocks[i].register_forward_hook(hook(f)) for i, f in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def watch(module: torch.nn.Module, look: Callable[..., object]):
    """Call ``look`` before each of a module's passes, and give a handle to end it.

    By torch's hook on all modules: one on this module would be part of what it computes, and a
    checkpoint that was begun without it would be another job's.
    """

    def hook(called, args):
        if called is module:
            look(called, args)

    return torch.nn.modules.module.register_module_forward_pre_hook(hook)


ARCHITECTURES = ["standard", "gated", "jumprelu", "topk", "abstopk"]
TRANSCODERS = ["transcoder", "skip_transcoder", "jumprelu_transcoder"]


def tensors_for(architecture: str, seed: int = 0, d_sae: int = D_SAE, dtype=torch.float32) -> dict:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    found = {
        "W_enc": rand(D, d_sae) / 4,
        "W_dec": rand(d_sae, D) / 4,
        "b_dec": rand(D) / 4,
    }
    if architecture == "gated":
        found |= {n: rand(d_sae) / 4 for n in ("b_gate", "b_mag", "r_mag")}
    else:
        found["b_enc"] = rand(d_sae) / 4
    if "jumprelu" in architecture:
        found["threshold"] = rand(d_sae).abs() / 2
    if "skip" in architecture:
        found["W_skip"] = rand(D, D) / 4
    return found


def make_sae(
    architecture: str = "standard",
    site: str | None = None,
    seed: int = 0,
    *,
    layer: int = 1,
    d_sae: int = D_SAE,
    dtype=torch.float32,
    **options,
) -> sf.SAE:
    """A random SAE; transcoders read mlp_norm and write mlp_out of the layer."""
    from saefeat.dictionaries.weights import InMemory

    transcoder = "transcoder" in architecture
    site = site or (f"mlp_norm.{layer}" if transcoder else f"resid_post.{layer}")
    if transcoder:
        options.setdefault("write_site", site.replace("mlp_norm", "mlp_out"))
        options.setdefault("subtract_bias", False)
    if architecture in ("topk", "abstopk"):
        options.setdefault("k", 7)
    return sf.SAE(
        InMemory(tensors_for(architecture, seed, d_sae, dtype)),
        architecture=architecture,
        site=site,
        name=f"{architecture}-{seed}",
        **options,
    )


def continuation_loss(model, prompts, completions, intervention=None, **options):
    """[n]: nats a token of what follows each prompt."""
    metric = sf.metrics.log_prob(sf.metrics.PerPrompt([list(c) for c in completions]))
    total = sf.metrics.measure(model, prompts, metric, intervention, **options)
    return -total / torch.tensor([len(c) for c in completions])


def unit(seed: int = 0) -> torch.Tensor:
    v = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


class RunningSum(torch.nn.Module):
    """In place of a final norm: linear, and every earlier token reaches the last one."""

    def forward(self, x):
        return x.cumsum(1)


def readable(over_tokens: bool = False) -> torch.nn.Module:
    """A llama whose first D logits *are* the last layer's residual stream, at the last token or
    summed over tokens. So what a metric reads there, and what ablations do to it, is known.
    """
    model = build("llama", torch.float64)
    model.model.norm = RunningSum() if over_tokens else torch.nn.Identity()
    model.lm_head.weight.data = torch.eye(VOCAB, D, dtype=torch.float64)
    return model


def eventually(condition: Callable[[], object], seconds: float = 120.0) -> bool:
    """Wait for what happens elsewhere. Only what never happens takes all of the time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
