"""Every condition a researcher's machine has: exact against plain hooks, or refused by name.

Devices, dtypes, caches, decoding strategies, compiled code, checkpointing, offloading, odd inputs.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import nnsight
import pytest
import torch
from torch import nn

import saefeat as sf
from helpers import (
    RAGGED,
    D,
    batch_of,
    blocks_of,
    build,
    forward,
    hook_count,
    make_sae,
    raw_hooks,
    tokenizer,
    unit,
    wrapped,
)

NEW = 5
V = sf.Direction(unit(5), site="resid_post.1")
PUSH = sf.Clamp(V, 40.0)
ONE = ["w1 w2 w3 w4 w2 w3 w4 w5 w6"]
LENGTHS = [sf.Tokens.prompt(), sf.Tokens.last(1), sf.Tokens.first(1), sf.Tokens.generated()]


def by_hand(x):
    """The same as PUSH, for hooks that know nothing of saefeat."""
    v = unit(5).to(torch.promote_types(x.dtype, torch.float32))
    f = x.to(v.dtype) @ v
    return (x.to(v.dtype) + (40.0 - f)[..., None] * v).to(x.dtype)


def generate(way, model, batch, step, new=NEW, **options):
    """(tokens, log) of generate with the step applied in one of three ways."""
    options = {"do_sample": False, "max_new_tokens": new, **options}
    torch.manual_seed(7)
    if way == "hooked":
        with sf.hooked(model, step) as log:
            tokens = model.generate(**batch, **options)
        return tokens, log
    traced = sf.edit(wrapped(model), step) if way == "edit" else wrapped(model)
    log = None
    with traced.generate(**options) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save({} if way == "edit" else step(traced))
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return tokens, log


def oracle(model, batch, new=NEW, **options):
    torch.manual_seed(7)
    options = {"do_sample": False, "max_new_tokens": new, **options}
    with raw_hooks(model, {1: by_hand}):
        tokens = model.generate(**batch, **options)
    torch.manual_seed(7)
    return tokens, model.generate(**batch, **options)


# ---------------------------------------------------------------- decoding, exact

STRATEGIES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams, no cache": {"num_beams": 3, "use_cache": False},
    "sampled, three of each": {"do_sample": True, "num_return_sequences": 3},
    "in chunks": {"prefill_chunk_size": 2},
    "penalty": {"repetition_penalty": 1.7},
}


@pytest.mark.parametrize("way", ["hooked", "edit", "inline"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_decoding_strategy_sees_the_edit_at_every_token(strategy, way):
    model, batch = build("llama"), batch_of()
    wanted, bare = oracle(model, batch, **STRATEGIES[strategy])
    found, log = generate(way, model, batch, PUSH, **STRATEGIES[strategy])
    assert torch.equal(found, wanted) and not torch.equal(found, bare)
    if way != "edit" and strategy != "no cache" and "beams" not in strategy:
        rows = 3 if "three" in strategy else 1
        assert PUSH.receipt(log).rows[0].tokens == rows * (13 + 3 * (NEW - 1))


@pytest.mark.parametrize("way", ["hooked", "inline"])
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "in chunks"])
def test_the_prompts_length_is_known_in_every_decoding_strategy(strategy, way):
    """Beams without a cache were taken for new prompts, pass by pass."""
    options = STRATEGIES[strategy]
    passes = NEW if "no cache" in strategy else 1  # each pass shows the prompt once more
    rows = 3 * options.get("num_beams", options.get("num_return_sequences", 1))
    for rule, tokens in ((sf.Tokens.last(1), rows), (sf.Tokens.prompt(), 13 * rows // 3)):
        step = sf.Clamp(V, add=0.1, where=rule)
        _, log = generate(way, build("llama"), batch_of(), step, **options)
        assert step.receipt(log).rows[0].tokens == tokens * passes


@pytest.mark.parametrize("cell", ["sliding", "eager", "sdpa", "mistral"])
def test_attention_implementations_and_sliding_windows(cell):
    """Gemma-2's window is 4 tokens here, so the cache has let go of the first ones."""
    family = {"sliding": "gemma3_text", "mistral": "mistral"}.get(cell, "llama")
    model, batch = build(family), batch_of(ONE)
    if cell in ("eager", "sdpa"):
        model.set_attn_implementation(cell)
    wanted, bare = oracle(model, batch, new=8)
    for way in ("hooked", "edit"):
        assert torch.equal(generate(way, model, batch, PUSH, new=8)[0], wanted)
    last = sf.Clamp(V, add=0.1, where=sf.Tokens.last(2))
    assert last.receipt(generate("inline", model, batch, last, new=8)[1]).rows[0].tokens == 2
    assert not torch.equal(wanted, bare)


def test_an_edited_copy_generates_twice_alike():
    model = build("llama")
    edited = sf.edit(wrapped(model), PUSH)
    results = []
    for batch in (batch_of(), batch_of(ONE), batch_of()):
        with edited.generate(batch, max_new_tokens=3, do_sample=False) as tracer:
            results.append(nnsight.save(tracer.result))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], oracle(model, batch_of(), new=3)[0])


# ---------------------------------------------------------------- turns and embeddings


def second_turn(model, where_from):
    """What generate gets for a second turn: all tokens, and the cache of those before."""
    first = model.generate(
        **batch_of(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    new = torch.tensor([[10, 11], [12, 13], [14, 15]])
    mask = torch.cat([batch_of()["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    return {
        "input_ids": torch.cat([first.sequences, new], 1),
        "attention_mask": mask,
        "past_key_values": first.past_key_values,
    }


@pytest.mark.parametrize("way", ["hooked", "inline"])
def test_a_turn_on_a_cache_made_before(way):
    """The prompt is what came before the first token generated here; `hooked` lost count of it."""
    counts = {}
    for rule in (None, *LENGTHS):
        model = build("llama")
        batch = second_turn(model, way)
        cache = batch.pop("past_key_values")
        step = sf.Clamp(V, add=30.0, where=rule)
        _, log = generate(way, model, batch, step, new=4, past_key_values=cache)
        counts[repr(rule)] = step.receipt(log).rows[0].tokens
    # three columns are shown: the last token generated before, and the two new ones
    assert list(counts.values()) == [9 + 9, 9, 3, 0, 9]


def test_two_turns_in_one_hooked_block():
    """generate is given the whole text, and what it is given is its prompt, whoever wrote it."""
    model, batch = build("llama"), batch_of()
    wanted = {None: 13 + 6 + 9 + 3, sf.Tokens.prompt(): 13 + 9, sf.Tokens.generated(): 6 + 3}
    for rule, tokens in wanted.items():
        step = sf.Clamp(V, add=1.0, where=rule)

        def go(step=step):
            with sf.hooked(model, step) as log:
                turn = second_turn(model, "hooked")
                model.generate(**turn, max_new_tokens=2, do_sample=False)
            return step.receipt(log).rows[0].tokens

        assert go() == tokens
    assert batch["input_ids"].shape == (3, 6)


@pytest.mark.parametrize("rule", LENGTHS, ids=repr)
@pytest.mark.parametrize("way", ["hooked", "inline", "edit"])
def test_a_prompt_fed_in_chunks_has_no_known_length(rule, way):
    """The first chunk was taken for the prompt, and the rest of it for generated tokens."""
    step = sf.Clamp(V, add=1.0, where=rule)
    with pytest.raises(Exception, match="prefill_chunk_size"):
        generate(way, build("llama"), batch_of(), step, prefill_chunk_size=2)


@pytest.mark.parametrize("way", ["hooked", "inline"])
def test_embeddings_instead_of_ids(way):
    model = build("llama")
    batch = batch_of()
    given = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach(),
        "attention_mask": batch["attention_mask"],
    }
    ids = generate(way, model, batch, PUSH)[0][:, 6:]

    def run(step):
        if way == "hooked":
            return generate(way, model, given, step)
        nn = wrapped(model)
        with nn.generate(max_new_tokens=NEW, do_sample=False) as tracer:
            with tracer.invoke(**given):
                log = nnsight.save(step(nn))
            with tracer.invoke():
                tokens = nnsight.save(tracer.result)
        return tokens, log

    assert torch.equal(run(PUSH)[0], ids)
    for rule, count in ((sf.Tokens.last(1), 3), (sf.Tokens.prompt(), 13)):
        step = sf.Clamp(V, add=0.1, where=rule)
        assert step.receipt(run(step)[1]).rows[0].tokens == count
    with pytest.raises(Exception, match="called with embeddings"):
        run(sf.Clamp(V, add=0.1, where=sf.Tokens.ids(7)))


def test_roles_need_the_text_before_the_cache():
    """A turn marker that lies in the cache cannot be seen."""
    model = build("llama")
    between = sf.Clamp(V, add=1.0, where=sf.Tokens(("between", (7,), (8,))))
    turn = second_turn(model, "hooked")
    with sf.hooked(model, between), pytest.raises(ValueError, match="for part of it"):
        model.generate(**turn, max_new_tokens=2, do_sample=False)


def test_position_ids_of_ones_own():
    """They move the rotary angles, not the rules; an offset is no packing."""
    model, batch = build("llama"), batch_of()
    places = torch.arange(6).repeat(3, 1) + 5
    first = sf.Clamp(V, 40.0, where=sf.Tokens.first(1)) | sf.Probe(V)
    with torch.no_grad(), sf.hooked(model, first) as log:
        model(**batch, position_ids=places)
    (reading,) = first.readings(log)
    starts = [(row, 6 - length) for row, length in enumerate((3, 6, 4))]
    at = torch.stack([reading.values[row, column, 0] for row, column in starts])
    torch.testing.assert_close(at, torch.full((3,), 40.0), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- refused

PACKED = {
    "positions": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 3)},
    "positions with a mask": {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 3),
        "attention_mask": torch.ones(3, 6, dtype=torch.long),
    },
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("way", ["hooked", "inline"])
def test_packed_rows_are_refused(packed, way):
    model = build("llama")
    given = {"input_ids": batch_of()["input_ids"], **PACKED[packed]}
    with pytest.raises(Exception, match="packed sequences"):
        if way == "hooked":
            with torch.no_grad(), sf.hooked(model, PUSH):
                model(**given)
        else:
            nn = wrapped(model)
            with torch.no_grad(), nn.trace(given):
                PUSH(nn)


def test_a_mask_with_four_dimensions_is_refused():
    model = build("llama")
    mask = torch.zeros(3, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)
    with (
        torch.no_grad(),
        sf.hooked(model, PUSH),
        pytest.raises(ValueError, match=r"not \[batch, sequence\]"),
    ):
        model(input_ids=batch_of()["input_ids"], attention_mask=mask)


REFUSED = {
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "prompt lookup"),
    "assistant": ({"assistant_model": None}, "assist"),
    "static cache": ({"cache_implementation": "static"}, "static cache"),
}


@pytest.mark.filterwarnings("ignore:.*custom logits processor")
@pytest.mark.parametrize("way", ["hooked", "inline", "edit"])
@pytest.mark.parametrize("what", REFUSED)
def test_decoding_that_takes_tokens_back_is_refused(what, way):
    """Inline, the edit fired on the first pass alone; the prompt was counted with its guesses."""
    options, match = REFUSED[what]
    model = build("llama")
    if "assistant_model" in options:
        options = {"assistant_model": copy.deepcopy(model)}
    with pytest.raises(Exception, match=match):
        generate(way, model, batch_of(ONE), PUSH, new=8, **options)
    assert hook_count(model) == hook_count(build("llama"))


def test_a_cropped_cache_is_refused():
    from saefeat.kernel.state import Memory, window

    ids, memory = torch.tensor([[5, 6, 7, 8]]), Memory()
    window(ids, None, (1, 4), 0, memory, None)
    with pytest.raises(ValueError, match="taken back"):
        window(ids[:, -1:], None, (1, 1), 3, memory, None)
    step = sf.Clamp(V, add=1.0, where=sf.Tokens.prompt())
    model = build("llama")
    with torch.no_grad(), sf.hooked(model, step):
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-2)
        with pytest.raises(ValueError, match="taken back"):
            model(ids[:, 2:], past_key_values=cache)


# ---------------------------------------------------------------- train mode and checkpointing


def gradient(model, step=None, edit=None):
    """d(sum of squares of the last logits) / d(embedding), edited by a step or by plain hooks."""
    weight = model.get_input_embeddings().weight
    by_hooks = raw_hooks(model, edit) if edit else nullcontext()
    with by_hooks, sf.hooked(model, step) if step else nullcontext():
        loss = model(**batch_of(), use_cache=False).logits[:, -1].square().sum()
        (found,) = torch.autograd.grad(loss, weight)
    return found


def test_gradients_flow_through_an_edit():
    wanted = gradient(build("llama"), edit={1: by_hand})
    torch.testing.assert_close(gradient(build("llama"), PUSH), wanted, atol=1e-4, rtol=1e-4)
    assert (gradient(build("llama")) - wanted).abs().max() > 1.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """In train mode blocks run again in the backward pass: without the edit, 80 percent wrong."""
    model = build("llama")
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    enable = getattr(model, new if hasattr(model, new) else old)  # renamed in transformers 5.23
    enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradient(model, PUSH), gradient(build("llama"), PUSH))
    attribute = sf.Attribute(make_sae(), sf.logit_diff(5, 6), method=sf.IG(steps=2))
    torch.testing.assert_close(
        attribute(wrapped(model), RAGGED).score,
        attribute(wrapped(build("llama")), RAGGED).score,
    )
    model.train()
    nn_model = wrapped(model)
    for act in (
        lambda: gradient(model, PUSH),
        lambda: sf.run(nn_model, RAGGED, PUSH),
        lambda: sf.edit(nn_model, PUSH),
        lambda: attribute(nn_model, RAGGED),
    ):
        with pytest.raises(sf.errors.ModelError, match="gradient checkpointing at 'model'"):
            act()
    getattr(model, enable.__name__.replace("enable", "disable"))()
    torch.testing.assert_close(gradient(model, PUSH), gradient(build("llama"), PUSH))


# ---------------------------------------------------------------- compiled code


def compiled(how):
    """A model compiled before anything was hooked; nothing is compiled until it runs."""
    model = build("llama")
    if how == "compile(model)":
        return torch.compile(model, backend="eager")
    if how == "model.compile()":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "block":
        model.model.layers[1].compile(backend="eager")
    elif how == "wrapped block":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    else:
        model.model.layers[2].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "how", ["compile(model)", "model.compile()", "forward", "block", "wrapped block"]
)
@pytest.mark.parametrize("way", ["hooked", "edit", "attribute"])
def test_a_site_in_compiled_code_is_refused(how, way):
    """A compiled model that had run once generated without the edit, and without a word."""
    if how == "forward" and way != "hooked":
        pytest.skip("nnsight wraps the compiled forward and stays outside of it: exact")
    model = compiled(how)
    with pytest.raises(sf.errors.ModelError, match=r"torch\.compile"):
        if way == "hooked":
            with sf.hooked(model, PUSH):
                pass
        elif way == "edit":
            sf.edit(wrapped(model), PUSH)
        else:
            sf.Attribute(make_sae(), sf.logit_diff(5, 6))(wrapped(model), RAGGED)


@pytest.mark.slow
def test_compiled_blocks_without_a_site_are_as_good_as_any():
    model, batch = compiled("another block"), batch_of()
    with torch.no_grad():
        forward(model, batch)  # compiled now
        with sf.hooked(model, PUSH):
            found = forward(model, batch)
        plain = build("llama")
        with raw_hooks(plain, {1: by_hand}):
            wanted = forward(plain, batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- hooks that are not reached


def test_a_site_that_a_pass_leaves_out_is_an_error():
    """A missing hook only logs, elsewhere. Here the model leaves early, before its second block."""
    model, batch = build("llama"), batch_of()
    model.config.num_hidden_layers = 1
    with torch.no_grad(), sf.hooked(model, sf.Ablate(sf.Direction(unit(), site="resid_post.0"))):
        forward(model, batch)
    with pytest.raises(
        sf.errors.ModelError, match=r"did not pass through model\.layers\.1\.output"
    ):
        with_edit(model, batch, PUSH)
    assert hook_count(model) == hook_count(build("llama"))


def with_edit(model, batch, step):
    with torch.no_grad(), sf.hooked(model, step):
        return forward(model, batch)


def test_a_hooked_block_without_a_forward_pass_is_an_error():
    """Another copy of the model was called, or results came from a cache."""
    model, other = build("llama"), build("llama")
    never = pytest.raises(sf.errors.FiringError, match="never called inside the block")
    with never, torch.no_grad(), sf.hooked(model, PUSH):
        forward(other, batch_of())
    assert hook_count(model) == hook_count(other)


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dictionary", ["float32", "bfloat16", "float64"])
def test_half_precision_models_with_dictionaries_of_any_dtype(dtype, dictionary):
    """Latents in float32 at least, and one rounding at the end."""
    model, batch = build("llama", dtype), batch_of()
    tensors = {
        name: value.to(getattr(torch, dictionary))
        for name, value in {
            "W_enc": torch.randn(D, 48) / 4,
            "b_enc": torch.randn(48) / 4,
            "W_dec": torch.randn(48, D) / 4,
            "b_dec": torch.randn(D) / 4,
        }.items()
    }
    sae = sf.SAE.from_tensors(tensors, site="resid_post.1")
    index = [3, 40, 17]
    full = {name: value.float() for name, value in tensors.items()}

    def edit(x):
        f = torch.relu(x.float() @ full["W_enc"] + full["b_enc"])[..., index]
        assert (f > 0).any()
        return (x.float() - f @ full["W_dec"][index]).to(dtype)

    with torch.no_grad(), raw_hooks(model, {1: edit}):
        wanted = forward(model, batch)
    with torch.no_grad(), sf.hooked(model, sf.Ablate(sae.latents(index))):
        found = forward(model, batch)
    with torch.no_grad():
        bare = forward(model, batch)
    real = batch["attention_mask"].bool()
    assert found.dtype == dtype and not torch.equal(found[real], bare[real])
    apart = (found - wanted)[real].float().abs().max()
    assert apart <= 4 * torch.finfo(dtype).eps * bare[real].float().abs().max()
    edited = sf.run(wrapped(model), batch, sf.Ablate(sae.latents(index)))
    assert edited.provenance.dtype == str(dtype).removeprefix("torch.")
    assert edited.receipt.rows[0].changed > 0


class Int8(nn.Module):
    """A linear layer whose weight is kept in eight bits, as quantized models have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight * self.scale).to(x.dtype).T


def quantized(model):
    for block in blocks_of(model):
        for part in list(block.modules()):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Int8(child))
    return model


def test_quantized_layers():
    """Sites, widths, edits and gradients of a model whose weights are int8."""
    model, batch = quantized(build("llama")), batch_of()
    with torch.no_grad(), raw_hooks(model, {1: by_hand}):
        wanted = forward(model, batch)
    inner = sf.Probe(sf.Neurons("mlp_post.1", 64)) | sf.Probe(sf.Neurons("z.1", D))
    with torch.no_grad(), sf.hooked(model, PUSH | inner) as log:
        found = forward(model, batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=1e-4)
    assert [reading.values.shape[-1] for reading in (PUSH | inner).readings(log)] == [64, D]
    out = sf.run(wrapped(model), RAGGED, PUSH, max_new_tokens=2)
    assert out.provenance.dtype == "float32"
    scores = sf.Attribute(make_sae(), sf.logit_diff(5, 6))(wrapped(model), RAGGED)
    assert torch.isfinite(scores.score).all() and scores.score.abs().max() > 0


# ---------------------------------------------------------------- devices


def dispatched(how, folder):
    """The model under accelerate's hooks, all of it or a part offloaded."""
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    if how == "cpu offload":
        return accelerate.cpu_offload(model, "cpu")
    if how == "disk offload":
        return accelerate.disk_offload(model, folder, "cpu")
    if how == "device_map":
        return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


INNER = sf.Clamp(V, 40.0) | sf.Probe(sf.Neurons("mlp_in.1", D)) | sf.Probe(sf.Neurons("z.2", D))


@pytest.mark.parametrize("how", ["device_map", "partly on disk", "cpu offload", "disk offload"])
def test_hooks_beside_accelerates(how, tmp_path):
    """accelerate replaces forward by one that brings the weights; hooks stay outside of it."""
    batch = batch_of()
    plain = build("llama")
    with torch.no_grad(), raw_hooks(plain, {1: by_hand}):
        wanted = forward(plain, batch)
    model = dispatched(how, str(tmp_path))
    with torch.no_grad(), sf.hooked(model, INNER) as log:
        found = forward(model, batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)
    with torch.no_grad(), sf.hooked(plain, INNER) as other:
        forward(plain, batch)
    for a, b in zip(INNER.readings(log), INNER.readings(other), strict=True):
        assert torch.equal(a.values, b.values)
    if "offload" in how:  # nnsight moves the whole model to one device as it wraps it
        with pytest.raises(NotImplementedError, match="meta tensor"):
            wrapped(model)
        return
    nn_model = wrapped(model)
    out = sf.run(nn_model, batch, INNER, max_new_tokens=3)
    assert out.completions == sf.run(wrapped(plain), batch, INNER, max_new_tokens=3).completions
    assert out.provenance.device == "cpu"
    attribute = sf.Attribute(make_sae(), sf.logit_diff(5, 6), method=sf.IG(steps=2))
    torch.testing.assert_close(
        attribute(nn_model, RAGGED).score, attribute(wrapped(plain), RAGGED).score
    )


@pytest.mark.slow
def test_a_model_split_over_devices():
    """In a process of its own: pretended devices are for good (see split_over_devices.py)."""
    pytest.importorskip("torch.utils.backend_registration")
    script = Path(__file__).with_name("split_over_devices.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["all", "on", "their", "devices"]


def test_the_tokenizer_is_no_part_of_the_edit():
    """padding_side changed after wrapping: run pads on the left all the same."""
    text = tokenizer()
    model = build("llama")
    nn_model = wrapped(model)
    wanted = sf.run(nn_model, RAGGED, PUSH, max_new_tokens=2)
    try:
        text.padding_side = "right"
        found = sf.run(nn_model, RAGGED, PUSH, max_new_tokens=2)
    finally:
        text.padding_side = "left"
    assert found.completions == wanted.completions and torch.equal(found.logits, wanted.logits)
