"""Which sequence a forward pass belongs to, and that nothing of ours outlives a block."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import types
from functools import partial

import nnsight
import pytest
import torch
import transformers

import saefeat as sf
from helpers import RAGGED, VOCAB, D, batch_of, build, forward, hook_count, make_sae, unit, wrapped
from saefeat.kernel import beams

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
SITE = "resid_post.1"
V = partial(sf.Direction, unit(5), site=SITE)


def positions(rule: sf.Tokens | None = None) -> sf.Probe:
    return sf.Probe(V(), where=rule)


def counted(log, step) -> int:
    return int(step.readings(log)[0].mask.sum())


def tokens_acted(model, rule, calls) -> list[int]:
    """How many tokens an edit acted on in each of the calls, made in one block."""
    step, found = sf.Clamp(V(), add=0.0, where=rule), []
    with torch.no_grad(), sf.hooked(model, step) as log:
        for call in calls:
            before = step.receipt(log).rows[0].tokens
            call()
            found.append(step.receipt(log).rows[0].tokens - before)
    return found


RULES = {
    "last": (sf.Tokens.last(1), lambda prompt, new: 1),
    "first": (sf.Tokens.first(1), lambda prompt, new: 1),
    "prompt": (sf.Tokens.prompt(), lambda prompt, new: prompt),
    "generated": (sf.Tokens.generated(), lambda prompt, new: new - 1),
}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_generate_on_the_last_output_is_another_prompt(rule, cached):
    """Counted in columns, it went on with the first call's prompt."""
    model, (tokens, wanted) = build("llama"), RULES[rule]

    def go(ids):
        return model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=cached)

    out = go(IDS)
    calls = [lambda: go(IDS), lambda: go(out), lambda: go(out[:, :-1]), lambda: go(IDS)]
    found = tokens_acted(model, tokens, calls)
    if not cached:  # every pass shows the whole text
        total = {"last": 3, "first": 3, "generated": 3}
        expect = [2 * total.get(rule, 3 * n) for n in (4, 7, 6, 4)]
    else:
        expect = [2 * wanted(n, 3) for n in (4, 7, 6, 4)]
    assert found == expect


def test_a_generate_that_was_bound_before_the_block():
    """It is told from its passes; without a cache a longer prompt looks like the next pass."""
    model = build("llama")
    go = partial(model.generate, max_new_tokens=3, do_sample=False)
    out = go(IDS)
    calls = [lambda: go(IDS), lambda: go(out)]
    assert tokens_acted(model, sf.Tokens.prompt(), calls) == [8, 14]
    assert tokens_acted(model, sf.Tokens.generated(), calls) == [4, 4]
    with pytest.raises(sf.SaefeatError, match="length, which is not known"):
        tokens_acted(model, sf.Tokens.prompt(), [lambda: go(IDS, use_cache=False)])
    assert tokens_acted(model, sf.Tokens.ids(5), [lambda: go(IDS, use_cache=False)]) == [3]


def test_a_prompt_and_the_same_one_token_longer_without_a_cache():
    model = build("llama")
    longer = torch.cat([IDS, IDS[:, :1]], 1)
    calls = [lambda: model(IDS, use_cache=False), lambda: model(longer, use_cache=False)]
    assert tokens_acted(model, sf.Tokens.prompt(), calls) == [8, 10]
    assert tokens_acted(model, sf.Tokens.generated(), calls) == [0, 0]


@pytest.mark.parametrize("rule, wanted", [("prompt", 16), ("generated", 8), ("last", 4)])
def test_two_loops_over_two_caches_in_turns(rule, wanted):
    model = build("llama")
    step = sf.Clamp(V(), add=0.0, where=RULES[rule][0])
    other = IDS + 20
    with torch.no_grad(), sf.hooked(model, step) as log:
        a, b = (model(x, use_cache=True) for x in (IDS, other))
        for _ in range(2):
            a = model(a.logits[:, -1:].argmax(-1), past_key_values=a.past_key_values)
            b = model(b.logits[:, -1:].argmax(-1), past_key_values=b.past_key_values)
    assert step.receipt(log).rows[0].tokens == wanted


def test_readings_of_sequences_in_turns_are_refused():
    model = build("llama")
    with (
        torch.no_grad(),
        pytest.raises(sf.SaefeatError, match="run in turns"),
        sf.hooked(model, positions()),
    ):
        a, _ = (model(x, use_cache=True) for x in (IDS, IDS + 20))
        model(IDS[:, :1], past_key_values=a.past_key_values)
    with (
        torch.no_grad(),
        pytest.raises(sf.SaefeatError, match="run in turns"),
        sf.hooked(model, positions()),
    ):
        model.generate(IDS, max_new_tokens=3, do_sample=False, guidance_scale=1.5)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("way", ["hooked", "edit", "inline"])
def test_guidance_runs_two_sequences(way, cached):
    """The half without the prompt was taken for its continuation."""
    model, batch = build("llama"), batch_of()
    args = {"max_new_tokens": 3, "do_sample": False, "guidance_scale": 1.5, "use_cache": cached}
    step = sf.Clamp(V(), add=4.0, where=sf.Tokens.generated())
    wanted = []

    def by_hand(module, args, output):
        # the conditional half is called with the prompt first; both then show one more token
        wanted.append(output.shape)

    with model.model.layers[1].register_forward_hook(by_hand):
        bare = model.generate(**batch, **args)
    assert len(wanted) == 6
    tokens = run_way(way, model, batch, step, args)
    late = late_edit(model, batch, args, 4.0, cached)
    assert not torch.equal(late, bare)
    assert torch.equal(tokens, late)


def late_edit(model, batch, args, size, cached):
    """Every column but those of each half's first pass, by a hook that counts the halves."""
    seen = {0: 0, 1: 0}  # columns of each half's first pass
    count = [0]

    def hook(module, inputs, output):
        half, first = count[0] % 2, count[0] < 2
        count[0] += 1
        if first:
            seen[half] = output.shape[1]
            return output
        start = 0 if cached else seen[half]
        new = output.clone()
        new[:, start:] += size * unit(5)
        return new

    with model.model.layers[1].register_forward_hook(hook):
        return model.generate(**batch, **args)


def run_way(way, model, batch, step, args):
    if way == "hooked":
        with sf.hooked(model, step):
            return model.generate(**batch, **args)
    nn = wrapped(model)
    if way == "edit":
        nn = sf.edit(nn, step)
    with nn.generate(**args) as tracer:
        with tracer.invoke(batch):
            if way == "inline":
                step(nn)
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return tokens


def test_copies_of_a_prefix_cache():
    """generate is given the whole prompt, so its length is known; in a loop it is not."""
    model = build("llama")
    with torch.no_grad():
        prefix = model(IDS[:1, :2], use_cache=True).past_key_values
    go = partial(model.generate, max_new_tokens=2, do_sample=False)
    calls = [lambda: go(IDS[:1], past_key_values=copy.deepcopy(prefix)) for _ in range(2)]
    assert tokens_acted(model, sf.Tokens.last(1), calls) == [1, 1]
    assert tokens_acted(model, sf.Tokens.generated(), calls) == [1, 1]
    probe = positions()
    with torch.no_grad(), sf.hooked(model, probe) as log:
        for call in calls:
            call()
    (reading,) = probe.readings(log)
    assert reading.values.shape[1] == 3 and reading.starts.tolist() == [-2]
    with (
        torch.no_grad(),
        pytest.raises(sf.SaefeatError, match="length, which is not known"),
        sf.hooked(model, sf.Clamp(V(), add=1.0, where=sf.Tokens.prompt())),
    ):
        model(IDS[:1, 2:], past_key_values=copy.deepcopy(prefix))


def test_a_cropped_cache_is_refused_and_an_emptied_one_begins_anew():
    model = build("llama")
    step = sf.Clamp(V(), add=0.0, where=sf.Tokens.prompt())
    with (
        torch.no_grad(),
        pytest.raises(sf.SaefeatError, match="have been taken back"),
        sf.hooked(model, step),
    ):
        cache = model(IDS, use_cache=True).past_key_values
        cache.crop(-2)
        model(IDS[:, 2:], past_key_values=cache)
    with torch.no_grad(), sf.hooked(model, step) as log:
        cache = model(IDS, use_cache=True).past_key_values
        cache.reset()
        model(IDS[:, :3], past_key_values=cache)
    assert step.receipt(log).rows[0].tokens == 8 + 6


def test_a_second_turn_by_generate_has_the_whole_text_for_its_prompt():
    model = build("llama")
    kept = []

    def turn():
        out = model.generate(
            IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, use_cache=True
        )
        kept.append(out)

    def again():
        text = torch.cat([kept[-1].sequences, IDS[:, :2]], 1)
        cache = kept[-1].past_key_values
        model.generate(text, past_key_values=cache, max_new_tokens=3, do_sample=False)

    # 9 columns, 6 of them in the cache: the pass shows the other 3, all of the prompt
    assert tokens_acted(model, sf.Tokens.prompt(), [turn, again]) == [8, 6]
    assert tokens_acted(model, sf.Tokens.generated(), [turn, again]) == [4, 4]


def mamba() -> torch.nn.Module:
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=3, state_size=4, conv_kernel=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.MambaForCausalLM(config).eval()
    model.generation_config.eos_token_id = VOCAB
    return model


@pytest.mark.parametrize("rule, wanted", [("prompt", 8), ("generated", 6), ("last", 2)])
def test_a_cache_under_another_name(rule, wanted):
    """Mamba's is called cache_params: every token was the prompt's."""
    model = mamba()
    v = sf.Direction(unit(5), site="backbone.layers.1.output")
    step = sf.Clamp(v, add=0.0, where=RULES[rule][0])
    with sf.hooked(model, step) as log:
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert step.receipt(log).rows[0].tokens == wanted
    edited = sf.edit(wrapped(model), sf.Clamp(v, add=9.0, where=RULES[rule][0]))
    with edited.generate(max_new_tokens=4, do_sample=False) as tracer:
        with tracer.invoke({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}):
            pass
        with tracer.invoke():
            traced = nnsight.save(tracer.result)
    with sf.hooked(model, sf.Clamp(v, add=9.0, where=RULES[rule][0])):
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), traced)


def test_a_state_without_a_length_is_refused():
    """RWKV's is called state: every decoded token was a prompt of its own, and its first token."""
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=D, attention_hidden_size=D, num_hidden_layers=3
    )
    model = transformers.RwkvForCausalLM(config).eval()
    step = sf.Clamp(sf.Direction(unit(5), site="rwkv.blocks.1.output"), add=0.0)
    with sf.hooked(model, step) as log:
        model(IDS)
    assert step.receipt(log).rows[0].tokens == IDS.numel()
    with pytest.raises(sf.SaefeatError, match="does not say how many"), sf.hooked(model, step):
        model.generate(IDS, max_new_tokens=3, do_sample=False)


# ---------------------------------------------------------------- stops and filling


def ragged_stop(model, batch, new=6):
    """A token with which the first row ends early and the others do not."""
    plain = model.generate(**batch, max_new_tokens=new, do_sample=False)[:, -new:]
    others = set(plain[1:].flatten().tolist())
    return next(int(t) for t in plain[0, 1:-2] if int(t) not in others and t != 0)


@pytest.mark.parametrize("pad", [0, None])
@pytest.mark.parametrize("way", ["hooked", "edit", "inline", "loop", "config"])
def test_filling_behind_a_stop_that_only_generate_is_told(way, pad):
    """Filling was edited, read and counted unless the model's own configuration had the stop."""
    model, batch = build("llama"), batch_of()
    model.generation_config.pad_token_id = pad
    stop = ragged_stop(model, batch)
    args = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": stop}
    if pad is None:
        args["pad_token_id"] = stop
    step = sf.Clamp(V(), add=0.0, where=sf.Tokens.generated())
    new = model.generate(**batch, **args)[:, 6:]
    wanted = sum([*row.tolist(), stop].index(stop) for row in new[:, :-1])
    if way == "hooked":
        with sf.hooked(model, step) as log:
            model.generate(**batch, **args)
    elif way == "config":
        given = transformers.GenerationConfig(
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=args.get("pad_token_id", 0),
        )
        with sf.hooked(model, step) as log:
            model.generate(**batch, generation_config=given)
    else:
        log = traced_log(way, wrapped(model), batch, step, args)
    found = step.receipt(log) if way != "loop" else log
    assert (found.rows[0].tokens if way != "loop" else found) == wanted < 3 * 5


def traced_log(way, nn, batch, step, args):
    if way == "edit":
        probe = sf.Probe(V(), where=sf.Tokens.generated())
        log = traced_log("inline", nn, batch, step | probe, args)
        return log
    if way == "inline":
        with nn.generate(**args) as tracer:  # noqa: SIM117  (nnsight reads one block a line)
            with tracer.invoke(batch):
                log = nnsight.save(step(nn))
        return log
    with nn.generate(**args) as tracer:  # noqa: SIM117
        with tracer.invoke(batch):
            logs = nnsight.save([])
            for number in tracer.iter[: args["max_new_tokens"]]:
                logs.append(step(nn, step=number))
    return sum(step.receipt(log).rows[0].tokens for log in logs)


@pytest.mark.parametrize("way", ["hooked", "inline"])
def test_padding_behind_an_end_of_the_callers_own_is_filling(way):
    """A stop string, or another criterion, ends a row at a token that is no stop token."""
    model, batch = build("llama"), batch_of()
    stop = ragged_stop(model, batch)
    args = {"max_new_tokens": 6, "do_sample": False}
    args["stopping_criteria"] = transformers.StoppingCriteriaList(
        [lambda ids, _: ids[:, -1] == stop]
    )
    new = model.generate(**batch, **args)[:, 6:]
    assert (new[0, -2:] == 0).all()
    step = sf.Clamp(V(), add=0.0, where=sf.Tokens.generated())
    if way == "inline":
        log = traced_log("inline", wrapped(model), batch, step, args)
    else:
        with sf.hooked(model, step) as log:
            model.generate(**batch, **args)
    assert step.receipt(log).rows[0].tokens == int((new[:, :-1] != 0).sum())


# ---------------------------------------------------------------- readings by position


def test_a_model_patched_to_its_own_values_stays_as_it_is():
    """Positions were counted from the last column, which is padding where rows end on the right."""
    model = build("llama")
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12], [13, 14, 15, 16, 0]])
    mask = (ids != 0).long()
    neurons = sf.Neurons(SITE, D)
    look = sf.Probe(neurons)
    with torch.no_grad(), sf.hooked(model, look) as log:
        clean = model(input_ids=ids, attention_mask=mask).logits
    (reading,) = look.readings(log)
    assert reading.starts.tolist() == [0, 0, 0]
    pin = sf.Clamp(neurons, sf.values.Patch(reading))
    with torch.no_grad(), sf.hooked(model, pin):
        pinned = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(pinned[mask.bool()], clean[mask.bool()], atol=1e-5, rtol=1e-5)
    left = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
    }
    with torch.no_grad(), sf.hooked(model, look) as log:
        forward(model, left)
    assert look.readings(log)[0].starts.tolist() == [2]


# ---------------------------------------------------------------- a live pass of the whole model


def test_a_part_of_the_model_called_alone_is_refused():
    """It was edited with the mask of the pass before: 3.65 off."""
    model = build("llama")
    with torch.no_grad(), sf.hooked(model, sf.Clamp(V(), add=1.0)):
        model(IDS)
        with pytest.raises(sf.errors.ModelError, match="called in part"):
            model.model(IDS + 1)
        with pytest.raises(sf.errors.ModelError, match="called in part"):
            model.model(IDS, use_cache=False)
        model(IDS)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_of_a_wrapper_are_refused(kind):
    """Prefix tuning: first(1) selected none of 3. Prompt tuning: the virtual tokens counted."""
    model = build("llama")

    class PeftModel(torch.nn.Module):
        active_peft_config = types.SimpleNamespace(is_prompt_learning=True)

        def __init__(self, inside):
            super().__init__()
            self.base_model = inside

        def forward(self, ids):
            virtual = torch.zeros(len(ids), 4, model.config.hidden_size)
            if kind == "prompt":
                text = model.get_input_embeddings()(ids)
                return self.base_model(inputs_embeds=torch.cat([virtual, text], 1))
            return self.base_model(input_ids=ids, past_key_values=prefix)

    step = sf.Clamp(V(), add=1.0, where=sf.Tokens.first(1))
    outer, prefix = PeftModel(model), model(IDS).past_key_values
    earlier = model(IDS).past_key_values
    with torch.no_grad(), sf.hooked(model, step) as log:
        with pytest.raises(sf.errors.ModelError, match="PeftModel that puts virtual tokens"):
            outer(IDS)
        model(IDS)
        assert step.receipt(log).rows[0].tokens == len(IDS)
        model(IDS, past_key_values=earlier)  # a cache of real tokens is none of a wrapper's
        outer.active_peft_config.is_prompt_learning = False  # LoRA, say
        model(inputs_embeds=model.get_input_embeddings()(IDS))


def test_a_pass_that_failed_leaves_no_open_pass():
    model = build("llama")
    step = sf.Clamp(V(), add=1.0)
    with torch.no_grad(), sf.hooked(model, step):
        wanted = model(IDS).logits
        with pytest.raises(IndexError):
            model(IDS + 1000)
        with pytest.raises(sf.errors.ModelError, match="called in part"):
            model.model(IDS)
        assert torch.equal(model(IDS).logits, wanted)


def test_two_threads_at_once_are_refused():
    model, errors, inside, go = build("llama"), [], threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(20)

    def other():
        try:
            with torch.no_grad():
                model(IDS)
        except Exception as error:
            errors.append(error)

    first = model.model.layers[0]
    with sf.hooked(model, sf.Clamp(V(), add=1.0)), first.register_forward_pre_hook(wait):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(20)
        with torch.no_grad(), pytest.raises(sf.errors.ModelError, match="two threads"):
            model(IDS)
        go.set()
        thread.join()
    assert not errors


# ---------------------------------------------------------------- copies and pickles


@pytest.fixture
def held():
    sae = make_sae(layer=0)
    when = sf.When(sae.latents([1, 4]), above=0.6, hold=True)
    return sf.Clamp(sf.Direction(torch.ones(D), site="resid_post.2"), add=3.0, when=when)


def test_a_copy_made_in_a_block_is_the_bare_model(held):
    model = build("llama")
    bare = forward(model, batch_of())
    tokens = model.generate(**batch_of(), max_new_tokens=3, do_sample=False)
    buffer = io.BytesIO()
    with torch.no_grad(), sf.hooked(model, held):
        before, edited = copy.deepcopy(model), forward(model, batch_of())
        part = copy.deepcopy(model.model)
        model.generate(**batch_of(), max_new_tokens=3, do_sample=False)
        after = copy.deepcopy(model)
        pickle.dump(model, buffer)
        inside = forward(after, batch_of())
    assert not torch.equal(edited, bare) and torch.equal(inside, bare)
    buffer.seek(0)
    for made in (before, after, pickle.load(buffer), model):
        assert torch.equal(forward(made, batch_of()), bare)
        assert torch.equal(made.generate(**batch_of(), max_new_tokens=3, do_sample=False), tokens)
    for made in (before, after, part, model):
        assert hook_count(made) == 0 and "generate" not in vars(made)


def test_a_shallow_copy_is_not_hooked():
    """It shares the parts and the hooks' table, so its own passes are refused and never edited."""
    model = build("llama")
    step = sf.Clamp(V(), add=1.0)
    with torch.no_grad(), sf.hooked(model, step) as log:
        model(IDS)
        with pytest.raises(sf.errors.ModelError, match="called in part"):
            copy.copy(model)(IDS)
    assert log.passes == 1


@pytest.mark.parametrize("way", ["hooked", "inline"])
def test_a_cache_has_nothing_of_ours(way, held):
    """A closure on it made every copy reorder the original."""
    model, batch = build("llama"), batch_of()
    args = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    if way == "hooked":
        with sf.hooked(model, held):
            cache = model.generate(**batch, **args).past_key_values
    else:
        nn = wrapped(model)
        with nn.generate(**args) as tracer:
            with tracer.invoke(batch):
                held(nn)
            with tracer.invoke():
                out = nnsight.save(tracer.result)
        cache = out.past_key_values
    other = copy.deepcopy(cache)
    keys = cache.layers[0].keys.clone()
    other.reorder_cache(torch.tensor([2, 1, 0]))
    assert torch.equal(cache.layers[0].keys, keys)
    assert torch.equal(pickle.loads(pickle.dumps(cache)).layers[0].keys, keys)
    assert set(vars(cache)) == set(vars(transformers.DynamicCache()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_held_conditions_follow_beams(family, monkeypatch):
    """The order of beams is read off the keys: the same as without a cache, where all is anew."""
    model, batch = build(family), batch_of()
    when = sf.When(make_sae(layer=0).latents([1]), above=1.2, hold=True)
    v = sf.Direction(torch.ones(D), site="resid_post.2")
    held = sf.Clamp(v, add=3.0, where=sf.Tokens.generated(), when=when)
    args = {"max_new_tokens": 8, "do_sample": False, "num_beams": 4, "num_return_sequences": 2}
    with sf.hooked(model, held):
        cached = model.generate(**batch, **args)
        plain = model.generate(**batch, **args, use_cache=False)
        monkeypatch.setattr(beams, "reorder_memory", lambda memory, rows: None)
        stayed = model.generate(**batch, **args)
    assert torch.equal(cached, plain)
    if family != "gemma2":  # there the condition is met in all beams of a prompt, or in none
        assert not torch.equal(cached, stayed)


def test_draws_by_prompt_under_beams_are_refused():
    model = build("llama")
    v = V()
    look = sf.Probe(v)
    read = sf.run(wrapped(model), RAGGED, look).readings[0]
    drawn = sf.Clamp(v, sf.values.Resample(read, seed=0))
    for step in (drawn, look):
        with pytest.raises(sf.SaefeatError, match="searches 3 beams"), sf.hooked(model, step):
            model.generate(**batch_of(), num_beams=3, max_new_tokens=2)


@pytest.mark.parametrize("how", ["inline", "edit"])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("said", ["argument", "configuration", "model"])
def test_draws_and_readings_under_beams_are_refused_in_blocks_too(how, cache, said):
    """They would belong to rows, which change places: the same call gave other tokens."""
    nn = wrapped(build("llama"))
    v = V()
    look = sf.Probe(v)
    read = sf.run(nn, RAGGED, look).readings[0]
    drawn = sf.Clamp(v, sf.values.Resample(read, seed=0))
    args = {"max_new_tokens": 2, "use_cache": cache, "do_sample": False}
    if said == "argument":
        args["num_beams"] = 3
    elif said == "configuration":
        config = transformers.GenerationConfig(num_beams=3, pad_token_id=0)
        args["generation_config"] = config
    else:
        nn._module.generation_config.num_beams = 3
    for step in (drawn, look)[: 1 if how == "edit" else 2]:
        with pytest.raises(sf.SaefeatError, match="searches 3 beams"):
            if how == "edit":
                edited = sf.edit(nn, step)
                with edited.generate(RAGGED, **args):
                    nnsight.save(edited.lm_head.output)
            else:
                with nn.generate(RAGGED, **args):
                    nnsight.save(step(nn))
