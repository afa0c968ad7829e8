"""Caches and ways of decoding: the same tokens as under plain hooks, or refused by name.

``TABLE`` is what docs/guide/running.md shows. Caches are held to a run without any, where that must
give the same: so what an edit leaves in a cache is what it would be computed anew.
"""

from __future__ import annotations

from pathlib import Path

import nnsight
import pytest
import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, QuantizedLayer, StaticCache

import saefeat as sf
from helpers import VOCAB, D, batch_of, build, hook_count, make_sae, raw_hooks, unit, wrapped

V = sf.Direction(unit(5), site="resid_post.1")
PUSH = sf.Clamp(V, 40.0)
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
NEW = 6
ONE = ["w1 w2 w3 w4 w2 w3 w4 w5 w6"]


def by_hand(x):
    """The same as PUSH, for hooks that know nothing of saefeat."""
    return x + (40.0 - x @ unit(5))[..., None] * unit(5)


def generate(way, model, batch, step, **options):
    """(tokens, log) of generate with the step applied in one of three ways."""
    torch.manual_seed(0)
    if way == "hooked":
        with sf.hooked(model, step) as log:
            return model.generate(**batch, **options), log
    nn = sf.edit(wrapped(model), step) if way == "edit" else wrapped(model)
    with nn.generate(**options) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save({} if way == "edit" else step(nn))
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return tokens, log


def one_pass(model, input_ids, **given):
    """A loop of somebody's own."""
    model(input_ids)
    return input_ids


EXACT = "exact"
TABLE = {
    "dynamic cache (the default)": ({}, EXACT),
    "`use_cache=False`": ({"use_cache": False}, EXACT),
    "sliding windows (Gemma 2 and 3, Mistral)": ("gemma2", EXACT),
    "quantized cache": ("quantized", EXACT),
    "state-space caches: Mamba, Falcon-H1, Jamba, Zamba 2 and others": ("states", EXACT),
    '`cache_implementation="static"`, `"sliding_window"`': (
        {"cache_implementation": "static"},
        r"a compiled or static cache",
    ),
    "RWKV's state": ("rwkv", r"does not say how many tokens"),
    "`do_sample=True`, `num_return_sequences=3`": (
        {"do_sample": True, "num_return_sequences": 3},
        EXACT,
    ),
    "`num_beams=4`, `num_return_sequences=2`": ({"num_beams": 4, "num_return_sequences": 2}, EXACT),
    "`num_beams=3`, `do_sample=True`": ({"num_beams": 3, "do_sample": True}, EXACT),
    "`guidance_scale=1.5`": ({"guidance_scale": 1.5}, EXACT),
    "`bad_words_ids`, `min_new_tokens`, penalties": (
        {"bad_words_ids": [[5]], "min_new_tokens": 3, "repetition_penalty": 1.3},
        EXACT,
    ),
    "`prompt_lookup_num_tokens=2`": ({"prompt_lookup_num_tokens": 2}, "prompt lookup"),
    "`assistant_model=`": ({"assistant_model": None}, "assisted generation"),
    "`custom_generate=`: contrastive search, DoLa, group and constrained beams": (
        {"custom_generate": one_pass},
        "contrastive search",
    ),
}
OPTIONS = {name: cell for name, cell in TABLE.items() if isinstance(cell[0], dict)}


@pytest.mark.filterwarnings("ignore:.*custom logits processor")
@pytest.mark.parametrize(
    "way", ["hooked", *(pytest.param(way, marks=pytest.mark.slow) for way in ("edit", "inline"))]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_table_says_of_generate(name, way):
    options, verdict = OPTIONS[name]
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    if "assistant_model" in options:
        options["assistant_model"] = build("llama")
    single = "assistant_model" in options or "prompt_lookup_num_tokens" in options
    model, batch = build("llama"), batch_of(ONE) if single else batch_of()
    if verdict != EXACT:
        with pytest.raises(sf.SaefeatError, match=verdict):
            generate(way, model, batch, PUSH, **options)
        assert hook_count(model) == 0 and "generate" not in vars(model)
        return
    torch.manual_seed(0)
    with raw_hooks(model, {1: by_hand}):
        wanted = model.generate(**batch, **options)
    torch.manual_seed(0)
    bare = model.generate(**batch, **options)
    found, _ = generate(way, model, batch, PUSH, **options)
    assert torch.equal(found, wanted) and not torch.equal(bare, wanted)


def test_code_from_the_hub_is_refused_before_it_is_loaded():
    for given in ({"trust_remote_code": True}, {"custom_generate": "someone/their-loop"}):
        model = build("llama")
        options = {"max_new_tokens": 3, "penalty_alpha": 0.6, "top_k": 4, **given}
        with pytest.raises(sf.SaefeatError, match=r"generate is given .*contrastive search"):
            generate("hooked", model, batch_of(), PUSH, **options)
        assert hook_count(model) == 0


def test_a_loop_of_ones_own_in_run_cannot_be_given():
    """run has no way to pass such arguments; a model whose configuration asks is transformers'."""
    model = build("llama")
    model.generation_config.penalty_alpha, model.generation_config.top_k = 0.6, 4
    with pytest.raises(ValueError, match="trust_remote_code"):
        sf.run(wrapped(model), ["w1 w2"], PUSH, max_new_tokens=3)


# ---------------------------------------------------------------- caches that are passed in


class Rounding(QuantizedLayer):
    """A backend of a few lines: bytes and a scale for each row of keys."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, held):
        return held[0].float() * held[1]


def rounding_cache(layers: int = 3, residual: int = 4) -> Cache:
    return Cache(layers=[Rounding(residual_length=residual) for _ in range(layers)])


@pytest.mark.parametrize("way", ["hooked", pytest.param("edit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [rounding_cache, DynamicCache])
def test_a_cache_of_ones_own(kind, way):
    """A quantized cache rounds, so it is held to plain hooks with such a cache."""
    model, batch = build("llama"), batch_of()
    options = {"max_new_tokens": 8, "do_sample": False}
    with raw_hooks(model, {1: by_hand}):
        wanted = model.generate(**batch, **options, past_key_values=kind())
    found, _ = generate(way, model, batch, PUSH, **options, past_key_values=kind())
    assert torch.equal(found, wanted)
    assert not torch.equal(model.generate(**batch, **options, past_key_values=kind()), wanted)
    for rule, tokens in ((sf.Tokens.prompt(), 13), (sf.Tokens.generated(), 3 * 7)):
        step = sf.Clamp(V, add=0.0, where=rule)
        _, log = generate("hooked", model, batch, step, **options, past_key_values=kind())
        assert step.receipt(log).rows[0].tokens == tokens


def test_a_held_condition_needs_keys_to_tell_rows_apart():
    """A quantized cache lets its exact keys go: what rows are now cannot be told, and is not."""
    model, batch = build("llama"), batch_of()
    when = sf.When(make_sae(layer=0).latents([1]), above=1.2, hold=True)
    held = sf.Clamp(sf.Direction(torch.ones(D), site="resid_post.2"), add=3.0, when=when)
    with pytest.raises(sf.SaefeatError, match=r"rows"), sf.hooked(model, held):
        model.generate(**batch, max_new_tokens=8, do_sample=False, past_key_values=rounding_cache())


def test_a_static_cache_in_a_loop_of_ones_own():
    """Called with the tokenizer's mask it says how many tokens it holds, and its passes fit."""
    model = build("llama")

    def go():
        cache, ids, made = StaticCache(config=model.config, max_cache_len=16), IDS, []
        for n in range(4):
            mask = torch.ones(2, 4 + n, dtype=torch.long)
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
            ids = logits[:, -1:].argmax(-1)
            made.append(ids)
        return torch.cat(made, 1)

    with raw_hooks(model, {1: by_hand}):
        wanted = go()
        plain = model.generate(IDS, max_new_tokens=4, do_sample=False)[:, 4:]
    assert torch.equal(wanted, plain)
    with sf.hooked(model, PUSH) as log:
        assert torch.equal(go(), wanted)
    assert PUSH.receipt(log).rows[0].tokens == 8 + 2 * 3
    assert not torch.equal(go(), wanted)


@pytest.mark.parametrize("family", [pytest.param("gemma2", marks=pytest.mark.slow), "mistral"])
def test_windows_slide_past_what_was_edited(family):
    model, batch = build(family), batch_of(ONE)
    options = {"max_new_tokens": 8, "do_sample": False}
    with raw_hooks(model, {1: by_hand}):
        wanted = model.generate(**batch, **options, use_cache=False)
    for way in ("hooked", "edit", "inline"):
        assert torch.equal(generate(way, model, batch, PUSH, **options)[0], wanted)


# ---------------------------------------------------------------- states in place of keys

_SIZES = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 3, "pad_token_id": 0}
_MIXED = {**_SIZES, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_SSM = {"mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
STATES = {
    "Mamba": {**_SIZES, "state_size": 4, "conv_kernel": 2},
    "Mamba2": {
        **_SIZES, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4,
    },
    "FalconMamba": {**_SIZES, "state_size": 4, "conv_kernel": 2},
    "FalconH1": {**_MIXED, **_SSM, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "Jamba": {
        **_MIXED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
        "use_mamba_kernels": False, "mamba_d_state": 4,
    },
    "Zamba2": {
        **_MIXED, "mamba_d_state": 4, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
    },
    "Bamba": {
        **_MIXED, **_SSM, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8,
    },
    "RecurrentGemma": {**_MIXED, "lru_width": D, "attention_window_size": 4},
    "Lfm2": {**_MIXED, "full_attn_idxs": [1], "block_auto_adjust_ff_dim": False},
    "Qwen3Next": {
        **_MIXED, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "Rwkv": {"vocab_size": VOCAB, "hidden_size": D, "attention_hidden_size": D,
             "num_hidden_layers": 3},
}  # fmt: skip


def state_model(name: str):
    """A tiny random model of a family, and the path of its second block."""
    config = getattr(transformers, f"{name}Config")(**STATES[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for key, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.data = torch.randn_like(weight) * (0.5 if "embed" in key else 0.15)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = VOCAB, 0
    roots = {"Mamba": "backbone.layers", "Mamba2": "backbone.layers", "Rwkv": "rwkv.blocks"}
    roots["FalconMamba"] = "backbone.layers"
    return model, f"{roots.get(name, 'model.layers')}.1"


@pytest.mark.filterwarnings("ignore:.*has a submodule named 'output'")
@pytest.mark.parametrize(
    "name",
    ["Mamba", "FalconH1"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in STATES if n not in ("Mamba", "FalconH1")],
)
def test_states_in_place_of_keys(name):
    """Cached and uncached, all ways of running, rows padded on the left; rules by length."""
    model, path = state_model(name)
    direction = sf.Direction(unit(5), site=f"{path}.output")
    push, batch = sf.Clamp(direction, 40.0), batch_of()

    def hook(module, args, output):
        if isinstance(output, tuple):
            return (by_hand(output[0]), *output[1:])
        return by_hand(output)

    options = {"max_new_tokens": 4, "do_sample": False}
    with model.get_submodule(path).register_forward_hook(hook):
        wanted = model.generate(**batch, **options, use_cache=False)
    assert not torch.equal(model.generate(**batch, **options, use_cache=False), wanted)
    for way in ("hooked", "edit", "inline"):
        assert torch.equal(generate(way, model, batch, push, use_cache=False, **options)[0], wanted)
        if name == "Rwkv":
            with pytest.raises(sf.SaefeatError, match="does not say how many tokens"):
                generate(way, model, batch, push, **options)
        else:
            assert torch.equal(generate(way, model, batch, push, **options)[0], wanted)
    rules = {} if name == "Rwkv" else {"prompt": 13, "generated": 9}
    for rule, tokens in rules.items():
        step = sf.Clamp(direction, add=0.0, where=getattr(sf.Tokens, rule)())
        _, log = generate("hooked", model, batch, step, **options)
        assert step.receipt(log).rows[0].tokens == tokens


# ---------------------------------------------------------------- the guide


def lines() -> list[str]:
    said = {EXACT: "exact", None: ""}
    found = ["| decoding or cache | with an edit |", "|---|---|"]
    return found + [f"| {name} | {said.get(v, 'refused')} |" for name, (_, v) in TABLE.items()]


def test_the_guide_shows_the_table():
    page = Path(__file__).parents[1] / "docs" / "guide" / "running.md"
    assert "\n".join(lines()) in page.read_text(encoding="utf-8"), "\n".join(lines())
