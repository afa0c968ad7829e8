"""The contract's core on a real chat model (``tests/real.py``), against plain hooks on it.

What a tiny model cannot show: position 0 is an attention sink, BOS, EOS and pad stand inside every
prompt, and the answers are sentences. ``make real`` runs these tests alone.
"""

from __future__ import annotations

import copy
from functools import partial

import nnsight
import pytest
import torch
import transformers
from torch import nn

import saefeat as sf
from helpers import watch
from real import (
    BLANK,
    CHATS,
    END,
    LAYERS,
    MISSING,
    START,
    SYSTEM,
    TEXTS,
    D,
    continued,
    dictionary,
    hooks,
    load,
    logits,
    residual,
    weights,
)
from saefeat.text.padding import left_padded
from saefeat.text.prompts import encode_prompts

if weights() is None:
    pytest.skip(MISSING, allow_module_level=True)  # one line, where every test would have its own
pytestmark = pytest.mark.slow
LAYER = 16
SITE = f"resid_post.{LAYER}"
ATOL = 2e-3  # of logits up to 30, from float32 sums in another order


@pytest.fixture(scope="module")
def real():
    return load()


@pytest.fixture(scope="module")
def values(real):
    """{layer: [n, d]}: the residual stream of the texts, first tokens left out."""
    found = {8: [], LAYER: []}
    for text in TEXTS:
        for layer, x in residual(real.bare, real.ids(text), list(found)).items():
            found[layer].append(x[1:])
    return {layer: torch.cat(rows) for layer, rows in found.items()}


@pytest.fixture(scope="module")
def saes(values):
    return {layer: dictionary(x, layer) for layer, x in values.items()}


@pytest.fixture(scope="module")
def prompts(real):
    """The chats' ids by the tokenizer's own template; the last is cut behind its content."""
    ids = [real.ids(chat) for chat in CHATS[:3]]
    closed = real.ids(CHATS[3], opened=False)
    assert closed[-2:] == [END, BLANK]
    return [*ids, closed[:-2]]


def unit(seed=0):
    v = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def by_hand(sae, x):
    """[t, latents]: a TopK SAE's activations, from its tensors."""
    w = {name: sae._weights.read(name) for name in ("W_enc", "b_dec")}
    before = (x - w["b_dec"]) @ w["W_enc"]
    top = before.topk(sae.k, dim=-1)
    return torch.zeros_like(before).scatter(-1, top.indices, top.values.relu())


def moved(sae, latents, change, where):
    """A hook: ``change(f)`` of these latents at the columns ``where(t, prompt)``."""

    def hook(x, prompt=None):
        f = by_hand(sae, x[0])[:, latents]
        step = (change(f) - f) @ sae._weights.read("W_dec")[latents]
        chosen = torch.zeros(x.shape[1], dtype=torch.bool)
        chosen[where(x.shape[1], prompt or x.shape[1])] = True
        return x + chosen[None, :, None] * step

    return hook


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=ATOL, rtol=1e-4)


def by_row(hook, x):
    """A hook for one row, on several."""
    return torch.cat([hook(row[None]) for row in x])


def everywhere(t, prompt):
    return slice(None)


RULES = {
    "all": (None, everywhere),
    "not first": (~sf.Tokens.first(1), lambda t, p: slice(1, None)),
    "first": (sf.Tokens.first(1), lambda t, p: slice(0, 1)),
    "last": (sf.Tokens.last(1), lambda t, p: slice(p - 1, p)),
    "last two": (sf.Tokens.last(2), lambda t, p: slice(p - 2, p)),
    "prompt": (sf.Tokens.prompt(), lambda t, p: slice(0, p)),
    "generated": (sf.Tokens.generated(), lambda t, p: slice(p, None)),
    "second generated": (sf.Tokens.generated(1, 2), lambda t, p: slice(p + 1, p + 2)),
    "positions": (sf.Tokens.positions(5, 9), lambda t, p: slice(5, 9)),
}
CHOSEN = [3, 17, 40, 99]
CHANGES = {
    "ablate": (sf.Ablate, {}, lambda f: 0 * f),
    "set": (sf.Clamp, {"value": 60.0}, lambda f: 0 * f + 60),
    "add": (sf.Clamp, {"add": 25.0}, lambda f: f + 25),
    "scale": (sf.Clamp, {"scale": -2.0}, lambda f: -2 * f),
    "bound": (sf.Clamp, {"low": 10.0, "high": 30.0}, lambda f: f.clamp(10, 30)),
    "active": (
        sf.Clamp,
        {"value": 60.0, "active_only": True},
        lambda f: torch.where(f != 0, 60.0, f),
    ),
}


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize("change", CHANGES)
def test_edits_of_a_padded_batch_are_those_of_plain_hooks_on_single_prompts(
    real, saes, prompts, change
):
    verb, arguments, function = CHANGES[change]
    sae, pair = saes[LAYER], [1, 3]
    for rule, where in (RULES["all"], RULES["not first"], RULES["last two"]):
        step = verb(sae.latents(CHOSEN), **arguments, where=rule)
        out = sf.run(real.nn, [CHATS[n] for n in pair], step, allow_unfired=True)
        for n, found in zip(pair, out.logits, strict=True):
            hook = moved(sae, CHOSEN, function, where)
            close(found, logits(real.bare, prompts[n], {LAYER: hook})[-1])


def test_a_joint_edit_reads_once_and_a_chain_reads_what_was_left(real, saes, prompts):
    """The second ablates what the first raises, among the eight latents that a token may have."""
    sae, ids = saes[LAYER], prompts[0]
    raised = moved(sae, [3], lambda f: f + 300, everywhere)
    gone = moved(sae, CHOSEN[1:], lambda f: 0 * f, everywhere)
    wanted = {
        "joint": logits(real.bare, ids, {LAYER: lambda x: raised(x) + gone(x) - x})[-1],
        "chain": logits(real.bare, ids, {LAYER: lambda x: gone(raised(x))})[-1],
        "two layers": logits(
            real.bare, ids, {8: moved(saes[8], [5], lambda f: f + 40, everywhere), LAYER: gone}
        )[-1],
    }
    up, out = sf.Clamp(sae.latents([3]), add=300.0), sf.Ablate(sae.latents(CHOSEN[1:]))
    steps = {
        "joint": up & out,
        "chain": up | out,
        "two layers": out | sf.Clamp(saes[8].latents([5]), add=40.0),
    }
    assert not torch.allclose(wanted["joint"], wanted["chain"], atol=0.1)
    for name, run in sf.sweep(real.nn, [CHATS[0], CHATS[1]], steps).items():
        close(run.logits[0], wanted[name])


def test_a_patch_to_ones_own_readings_changes_nothing_and_to_anothers_what_it_should(
    real, saes, prompts
):
    sae, chats = saes[LAYER], CHATS[:3]
    early = sf.Clamp(saes[8].latents([5, 9]), add=80.0)
    latents = sae.latents(CHOSEN)
    own = sf.run(real.nn, chats, sf.Probe(latents))
    other = sf.run(real.nn, chats, early | sf.Probe(latents))
    pinned = sf.run(real.nn, chats, sf.Clamp(latents, sf.values.Patch(own.readings[0])))
    close(pinned.logits, own.logits)
    taken = sf.run(real.nn, chats, sf.Clamp(latents, sf.values.Patch(other.readings[0])))
    push = moved(saes[8], [5, 9], lambda f: f + 80, everywhere)
    for ids, found in zip(prompts, taken.logits, strict=False):
        with_push: list[torch.Tensor] = []

        def look(x, kept=with_push):
            kept.append(by_hand(sae, x[0])[:, CHOSEN])
            return x

        logits(real.bare, ids, {8: push, LAYER: look})
        hook = moved(sae, CHOSEN, lambda f, to=with_push: to[0], everywhere)
        close(found, logits(real.bare, ids, {LAYER: hook})[-1])


# ---------------------------------------------------------------- readings and receipts


def test_readings_of_prompts_and_of_what_is_generated(real, saes, prompts):
    """Every value of every latent, at its position, also behind another row's end."""
    sae, new = saes[LAYER], 10
    out = sf.run(real.nn, CHATS[:3], sf.Probe(sae), max_new_tokens=new)
    assert out.completions[0][-1] == END and len(out.completions[0]) < new
    reading = out.readings[0]
    for n, ids in enumerate(prompts[:3]):
        text = [*ids, *out.completions[n][:-1]]
        wanted = by_hand(sae, residual(real.bare, text, [LAYER])[LAYER])
        start = int(reading.starts[n])
        assert torch.equal(reading.mask[n].any(-1).nonzero()[:, 0], start + torch.arange(len(text)))
        found = reading.values[n, start : start + len(text)]
        # at the sink a latent is as large as 20,000, and rounding as much larger
        torch.testing.assert_close(found[:1], wanted[:1], atol=0.5, rtol=1e-3)
        torch.testing.assert_close(found[1:], wanted[1:], atol=0.02, rtol=1e-3)
    assert reading.first_share > 0.5 and "at prompts' first tokens" in repr(reading)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_call_of_ones_own_padded_on_either_side(real, saes, prompts, side):
    """The pad is <|im_end|>, which every prompt holds as well."""
    sae, rows = saes[LAYER], prompts[:3]
    batch = real.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
    probe = sf.Probe(sae.latents(CHOSEN))
    step = sf.Ablate(sae.latents(CHOSEN), where=sf.Tokens.last(2))
    with torch.no_grad(), sf.hooked(real.bare, probe | step) as log:
        found = real.bare(**batch).logits
    (reading,), row = (probe | step).readings(log), (probe | step).receipt(log).rows[0]
    assert row.tokens == 2 * len(rows)
    for n, ids in enumerate(rows):
        start = int(reading.starts[n])
        assert start == (0 if side == "right" else batch["input_ids"].shape[1] - len(ids))
        hook = moved(sae, CHOSEN, lambda f: 0 * f, RULES["last two"][1])
        close(found[n, start + len(ids) - 1], logits(real.bare, ids, {LAYER: hook})[-1])
        wanted = by_hand(sae, residual(real.bare, ids, [LAYER])[LAYER])[:, CHOSEN]
        values = reading.values[n, start : start + len(ids)]
        torch.testing.assert_close(values[1:], wanted[1:], atol=0.02, rtol=1e-3)


def test_receipts_name_every_change_and_the_first_token(real, saes, prompts):
    sae = saes[LAYER]
    run = partial(sf.run, real.nn, CHATS[:3])
    row = run(sf.Ablate(sae.latents(CHOSEN))).receipt.rows[0]
    events, wanted = row.events, {}
    for n, ids in enumerate(prompts[:3]):
        f = by_hand(sae, residual(real.bare, ids, [LAYER])[LAYER])
        for position, latent in f[:, CHOSEN].nonzero().tolist():
            wanted[n, position, CHOSEN[latent]] = float(f[position, CHOSEN[latent]])
            token = events.token[(events.prompt == n) & (events.position == position)]
            assert set(token.tolist()) == {ids[position]}
    keys = torch.stack([events.prompt, events.position, events.latent], 1).tolist()
    found = dict(zip(map(tuple, keys), events.before.tolist(), strict=True))
    assert found == pytest.approx(wanted, rel=1e-3, abs=0.02)
    assert row.tokens == sum(map(len, prompts[:3])) and row.changed == len(wanted)
    assert bool((events.after == 0).all())
    # the latent that takes most at the sink
    f = by_hand(sae, residual(real.bare, prompts[0], [LAYER])[LAYER])
    heavy = sae.latents([int(f[0].argmax())])
    flagged = run(sf.Ablate(heavy) | sf.Ablate(heavy, where=~sf.Tokens.first(1)))
    row, without = flagged.receipt.rows
    assert row.largest > 1000 > 10 * without.largest and row.first_share > 0.5
    assert without.first_share == 0 and "first tokens" not in repr(without)


# ---------------------------------------------------------------- generation

STRONG = (sf.Clamp, {"value": 60.0}, CHANGES["set"][2])


@pytest.mark.parametrize("rule", ["not first", "last", "generated", "second generated", "all"])
def test_generation_in_every_way_is_that_of_plain_hooks_without_a_cache(real, saes, prompts, rule):
    tokens, where = RULES[rule]
    sae, pair, new = saes[LAYER], [0, 1], 6
    hook = {LAYER: moved(sae, CHOSEN, STRONG[2], where)}
    wanted = [continued(real.bare, prompts[n], new, hook) for n in pair]
    step = sf.Clamp(sae.latents(CHOSEN), 60.0, where=tokens)
    chats = [CHATS[n] for n in pair]
    found = {"run": sf.run(real.nn, chats, step, max_new_tokens=new).completions}
    found["sweep"] = sf.sweep(real.nn, chats, {0: step, 1: None}, max_new_tokens=new)[0].completions
    batch = left_padded([prompts[n] for n in pair], END)
    width, options = batch["input_ids"].shape[1], {"max_new_tokens": new, "do_sample": False}
    with torch.no_grad(), sf.hooked(real.bare, step):
        found["hooked"] = real.bare.generate(**batch, **options)[:, width:]
    with sf.edit(real.nn, step).generate(**options) as tracer:
        with tracer.invoke(batch):
            pass
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    found["edit"] = tokens[:, width:]
    for way, rows in found.items():
        ended = [list(row)[: len(text)] for row, text in zip(rows, wanted, strict=True)]
        assert ended == wanted, way


def test_the_end_token_in_a_prompt_is_no_end(real, saes, prompts):
    """What is filled behind an end is not edited, read or counted; ends within prompts are text."""
    step = sf.Clamp(saes[LAYER].latents(CHOSEN), add=0.0)
    probe = sf.Probe(saes[LAYER].latents(CHOSEN))
    chats, new = [CHATS[0], CHATS[1]], 12
    out = sf.run(real.nn, chats, step | probe, max_new_tokens=new)
    lengths = [len(row) for row in out.completions]
    assert out.completions[0][-1] == END and min(lengths) < max(lengths) == new
    fed = sum(map(len, prompts[:2])) + sum(lengths) - 2
    batch = left_padded(prompts[:2], END)
    with torch.no_grad(), sf.hooked(real.bare, step | probe) as log:
        real.bare.generate(**batch, max_new_tokens=new, do_sample=False)
    assert out.receipt.rows[0].tokens == fed == int(out.readings[0].mask[..., 0].sum())
    assert (step | probe).receipt(log).rows[0].tokens == fed
    assert torch.equal((step | probe).readings(log)[0].mask, out.readings[0].mask)


def test_two_turns_on_one_cache(real, saes, prompts):
    """The second turn's prompt holds the first answer and its end; it is read from the cache on."""
    sae, ids = saes[LAYER], prompts[0]
    asked = [BLANK, START, *real.ids("user\nAnd of Spain?"), END, BLANK, START]
    asked += real.ids("assistant\n")
    for rule in ("last", "generated"):
        tokens, where = RULES[rule]
        step = sf.Clamp(sae.latents(CHOSEN), 60.0, where=tokens)
        cache = transformers.DynamicCache()
        go = partial(real.bare.generate, do_sample=False, past_key_values=cache)
        with torch.no_grad():
            answer = go(torch.tensor([ids]), max_new_tokens=10)
            assert answer[0, -1] == END
            text = [*answer[0].tolist(), *asked]
            with sf.hooked(real.bare, step) as log:
                found = go(torch.tensor([text]), max_new_tokens=5)[0, len(text) :]
        hook = {LAYER: moved(sae, CHOSEN, STRONG[2], where)}
        assert found.tolist() == continued(real.bare, text, 5, hook)
        assert step.receipt(log).rows[0].tokens == (1 if rule == "last" else len(found) - 1)


def test_stops_samples_and_beams(real, saes):
    sae, chat = saes[LAYER], CHATS[0]
    step = sf.Clamp(sae.latents(CHOSEN), add=8.0, where=~sf.Tokens.first(1))
    run = partial(sf.run, real.nn, [chat, CHATS[1]], step, max_new_tokens=8)
    plain = run()
    stop = plain.completions[0][2]
    stopped = run(decode=sf.generation.Greedy(stop=(stop,)))
    assert stopped.completions[0] == plain.completions[0][:3]
    sample = sf.generation.Sample(1.0, seed=3)
    state = torch.get_rng_state()
    one, two = run(decode=sample), run(decode=sample)
    assert one.completions == two.completions != plain.completions
    assert torch.equal(torch.get_rng_state(), state)
    found = run(decode=sf.generation.Beams(3))
    ids = torch.tensor([real.ids(chat)])
    hook = moved(sae, CHOSEN, lambda f: f + 8, RULES["not first"][1])
    with torch.no_grad(), hooks(real.bare, {LAYER: partial(by_row, hook)}):
        wanted = real.bare.generate(
            ids, max_new_tokens=8, do_sample=False, num_beams=3, use_cache=False
        )[0, ids.shape[1] :].tolist()
    assert list(found.completions[0]) == wanted[: len(found.completions[0])]
    assert set(wanted[len(found.completions[0]) :]) <= {END}


@pytest.mark.parametrize("hold", [False, True])
def test_conditions_hold_from_the_token_that_meets_them(real, saes, prompts, hold):
    """A latent that the question's last words show: from there on, and in what is generated."""
    sae, ids, new = saes[LAYER], prompts[0], 5
    f = by_hand(sae, residual(real.bare, ids, [LAYER])[LAYER])
    late = (f > 0) & (f[:20] == 0).all(0)  # not within the system's turn
    latent = int(late.sum(0).clamp(max=3).argmax())
    bound = float(f[:, latent].max()) / 2

    def met(x):
        shown = by_hand(sae, x)[:, latent] > bound
        return shown.cummax(0).values if hold else shown

    def hook(x, prompt):
        return x + met(x[0])[None, :, None] * 150.0 * unit()

    wanted = continued(real.bare, ids, new, {LAYER: hook})
    when = sf.When(sae.latents([latent]), above=bound, hold=hold)
    step = sf.Clamp(sf.Direction(unit(), site=SITE), add=150.0, when=when)
    found = sf.run(real.nn, [CHATS[0], CHATS[1]], step, max_new_tokens=new)
    assert list(found.completions[0]) == wanted
    with torch.no_grad(), sf.hooked(real.bare, step):
        tokens = real.bare.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)
    assert tokens[0, len(ids) :].tolist() == wanted


# ---------------------------------------------------------------- chats and ids


def turns_of(real, chat):
    """[(role, its content's ids, its place)]: by the template's own words, turn after turn."""
    found, place = [], 0
    if chat[0]["role"] != "system":
        chat = [{"role": "system", "content": SYSTEM}, *chat]
    for turn in chat:
        opening, content = real.ids(f"<|im_start|>{turn['role']}\n"), real.ids(turn["content"])
        found.append((turn["role"], content, place + len(opening)))
        place += len(opening) + len(content) + 2  # <|im_end|> and the line's end
    return found


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_roles_are_their_turns_and_the_default_system_text_is_one(real, prompts, role):
    rule = sf.Tokens.role(role)
    probe = sf.Probe(sf.Direction(unit(), site="resid_post.0"), where=rule)
    out = sf.run(real.nn, CHATS, probe, max_new_tokens=3, allow_unfired=True)
    (reading,) = out.readings
    for n, chat in enumerate(CHATS):
        wanted = set()
        for own, content, place in turns_of(real, chat):
            assert prompts[n][place : place + len(content)] == content
            wanted |= set(range(place, place + len(content))) if own == role else set()
        if role == "assistant":
            fed = len(out.completions[n]) - 1
            wanted |= set(range(len(prompts[n]), len(prompts[n]) + fed))
        found = reading.mask[n, :, 0].nonzero()[:, 0] - int(reading.starts[n])
        assert set(found.tolist()) == wanted


def test_chats_are_the_template_s_own_ids(real, prompts):
    out = sf.run(real.nn, CHATS, max_new_tokens=4)
    assert [list(ids) for ids in out.prompts] == prompts
    continued_by_template = real.tokenizer.apply_chat_template(
        CHATS[3], tokenize=True, return_dict=False, continue_final_message=True
    )
    assert list(out.prompts[3]) == continued_by_template
    assert list(out.completions[3]) == continued(real.bare, prompts[3], 4)
    texts = [real.tokenizer.decode(ids) for ids in prompts]
    wanted = left_padded(prompts, END)
    for form in (texts, prompts, real.tokenizer(texts, return_tensors="pt", padding=True)):
        found = encode_prompts(real.tokenizer, form)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    closed = real.ids(CHATS[0], opened=False)
    found = encode_prompts(real.tokenizer, real.tokenizer.decode(closed))
    assert found["input_ids"].tolist() == [closed]


def test_special_tokens_are_bos_end_and_pad_wherever_they_stand(real, prompts):
    rule = sf.Tokens.special()
    probe = sf.Probe(sf.Direction(unit(), site="resid_post.0"), where=rule)
    out = sf.run(real.nn, CHATS, probe, max_new_tokens=10)
    (reading,) = out.readings
    for n, ids in enumerate(prompts):
        text = [*ids, *out.completions[n][:-1]]
        found = reading.mask[n, :, 0].nonzero()[:, 0] - int(reading.starts[n])
        assert found.tolist() == [k for k, token in enumerate(text) if token in (0, START, END)]


def test_ids_that_hold_the_pad_are_text_unless_they_look_padded(real, prompts):
    ids = [END, *prompts[0][:8]]
    for form in (ids, [ids], torch.tensor([ids]), [ids, ids], [ids, prompts[1]]):
        assert list(sf.run(real.nn, form).prompts[0]) == ids
    once_more = sf.run(real.nn, CHATS[0], max_new_tokens=10)
    whole = [*once_more.prompts[0], *once_more.completions[0]]
    assert whole[-1] == END and list(sf.run(real.nn, [whole]).prompts[0]) == whole
    padded = [END, *ids]
    for form in ([padded], torch.tensor([padded]), [ids, [*prompts[1][: len(ids)]]]):
        with pytest.raises(sf.errors.PromptError, match="without an attention mask"):
            sf.run(real.nn, form)
    rows = torch.tensor([ids, prompts[1][: len(ids)]])
    said = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    assert list(sf.run(real.nn, said).prompts[0]) == ids


def test_a_metric_suggests_one_token_and_reads_the_logits(real, prompts):
    with pytest.raises(sf.errors.PromptError, match=r"2 tokens.*Try: logit_diff\('I', \.\.\.\)"):
        sf.metrics.measure(real.nn, CHATS[0], sf.logit_diff("I'm", "Sorry"))
    (the,), (paris,) = real.ids("The"), real.ids("Paris")
    answer = "The capital of France is Paris.<|im_end|>"
    found = sf.metrics.measure(real.nn, CHATS, sf.logit_diff("The", "Paris"))
    likely = sf.metrics.measure(real.nn, CHATS, sf.metrics.log_prob(answer))
    for n, ids in enumerate(prompts):
        follows = real.ids(answer)
        shown = logits(real.bare, [*ids, *follows])
        last = shown[len(ids) - 1]
        close(found[n], last[the] - last[paris])
        places = torch.arange(len(ids) - 1, len(ids) + len(follows) - 1)
        wanted = shown.log_softmax(-1)[places, follows].sum()
        torch.testing.assert_close(likely[n], wanted, atol=1e-2, rtol=1e-4)
    assert real.tokenizer.decode(continued(real.bare, prompts[0], 10)) == answer


# ---------------------------------------------------------------- the first token


def test_the_first_position_is_an_outlier_and_its_token_elsewhere_is_none(real, prompts):
    ids = prompts[2]
    later = [k for k, token in enumerate(ids) if token == START][1:]
    values = residual(real.bare, ids, range(LAYERS))
    for layer in range(11, 28):
        norms = values[layer].norm(dim=-1)
        assert 24_500 < norms[0] < 25_500 and norms[1:].max() < 900
        assert norms[later].max() < 2 * norms[1:].median()
        assert sf.results.outliers(values[layer]).nonzero().tolist() == [[0]]
    assert values[LAYER].norm(dim=-1)[1:].min() > 140 and values[LAYER].norm(dim=-1)[1:].max() < 260
    # whatever the first token is: plain text has no BOS
    assert residual(real.bare, real.ids(TEXTS[0]), [LAYER])[LAYER][0].norm() > 20_000
    reading = sf.run(real.nn, CHATS, sf.Probe(sf.Neurons(SITE, D))).readings[0]
    for n, ids in enumerate(prompts):
        shown = reading.values[n, int(reading.starts[n]) :]
        assert len(shown) == len(ids)
        assert sf.results.outliers(shown).nonzero().tolist() == [[0]]


def plain_sae(encoder, decoder, bias, architecture="standard", k=None):
    tensors = {"W_enc": encoder, "b_enc": torch.zeros(encoder.shape[1]), "W_dec": decoder}
    return sf.SAE.from_tensors(
        tensors | {"b_dec": bias}, site=SITE, architecture=architecture, k=k, subtract_bias=True
    )


def test_verify_is_not_fooled_by_the_sink(real, values, saes):
    x, generator = values[LAYER], torch.Generator().manual_seed(1)
    sink = residual(real.bare, real.ids(TEXTS[0]), [LAYER])[LAYER][0]
    sink = sink / sink.norm()
    random = nn.functional.normalize(torch.randn(128, D, generator=generator), dim=1)
    turned = x @ torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    of_8 = {name: saes[8]._weights.read(name) for name in ("W_enc", "W_dec", "b_dec")}
    wrong = {
        "the sink's direction": plain_sae(sink[:, None], sink[None], x.mean(0)),
        "random": plain_sae(random.T.contiguous(), random, x.mean(0)),
        "random topk": plain_sae(random.T.contiguous(), random, x.mean(0), "topk", 8),
        "another model's": dictionary(turned, LAYER),
        "another layer's": plain_sae(*of_8.values(), "topk", 8),
    }
    for name, sae in wrong.items():
        found = sf.verify(real.nn, sae, TEXTS[::3], strict=False)
        assert found.verdict == "WRONG", name
        if name == "the sink's direction":
            assert found.checks[0].whole_fvu < 0.01 and found.checks[0].fvu > 0.9
    found = sf.verify(real.nn, saes[LAYER], TEXTS, strict=False)
    (check,) = found.checks
    assert found.right and check.fvu < 0.4 and check.whole_fvu > 1
    assert check.outliers == len(TEXTS) and check.outlier_share > 0.99
    assert "24 of 459 tokens hold 100% of the variance" in repr(found)


def test_a_dictionary_that_excludes_the_first_position_never_touches_it(real, saes):
    sae = plain_sae(*(saes[LAYER]._weights.read(n) for n in ("W_enc", "W_dec", "b_dec")), "topk", 8)
    sae.excluded = sf.Tokens.positions(0, 1)
    rule = ~sf.Tokens.first(1)
    chats, latents = CHATS[:2], saes[LAYER].latents(CHOSEN)
    step = sf.Ablate(sae.latents(CHOSEN)) | sf.Probe(sae.latents(CHOSEN))
    out = sf.run(real.nn, chats, step)
    named = sf.run(real.nn, chats, sf.Ablate(latents, where=rule) | sf.Probe(latents, where=rule))
    assert torch.equal(out.logits, named.logits)
    assert torch.equal(out.readings[0].mask, named.readings[0].mask)
    assert out.receipt.rows[0].tokens == named.receipt.rows[0].tokens
    metric = sf.logit_diff("The", "Paris")
    found = sf.Attribute(sae, metric)(real.nn, chats)
    wanted = sf.Attribute(saes[LAYER], metric, where=rule)(real.nn, chats)
    assert torch.equal(found.score, wanted.score) and not bool((found.position == 0).any())


# ---------------------------------------------------------------- attribution


METRIC = sf.logit_diff("The", "Paris")


def test_gradients_are_finite_differences_in_float64(real, saes, prompts):
    """One latent at one token moved by a hook. Llama's norms round to float32 in any case, which
    leaves 1e-6 of a logit: so the step is a thousandth of the latent, and no less."""
    sae, ids = saes[LAYER], prompts[0]
    found = sf.Attribute(sae, METRIC)(real.nn, CHATS[0])
    order = found.score.abs().argsort(descending=True)
    one_each = [int(order[0]), int(order[5]), *order[(found.position[order] > 0)][:4].tolist()]
    (the,), (paris,) = real.ids("The"), real.ids("Paris")
    exact = copy.deepcopy(real.bare).double()
    rows = sae._weights.read("W_dec").double()
    for n in one_each:
        place, latent, f = (
            int(found.position[n]),
            int(found.latent[n]),
            float(found.activation[n]),
        )
        moves = []
        for way in (1e-3, -1e-3):

            def hook(x, place=place, latent=latent, move=way * f):
                x = x.clone()
                x[0, place] += move * rows[latent]
                return x

            last = logits(exact, ids, {LAYER: hook})[-1]
            moves.append(float(last[the] - last[paris]))
        wanted = -(moves[0] - moves[1]) / 2e-3  # to zero, which is f less
        assert float(found.score[n]) == pytest.approx(wanted, rel=5e-3, abs=2e-3)


def test_exact_effects_are_those_of_hooks(real, saes, prompts):
    sae, latents = saes[LAYER], CHOSEN
    chosen = sae.latents(latents)
    found = sf.Attribute(chosen, METRIC, method=sf.attribution.Exact(), where=RULES["not first"][0])
    scores = found(real.nn, CHATS[:2])
    (the,), (paris,) = real.ids("The"), real.ids("Paris")
    for n, ids in enumerate(prompts[:2]):
        clean = logits(real.bare, ids)[-1]
        for latent in latents:
            hook = moved(sae, [latent], lambda f: 0 * f, RULES["not first"][1])
            last = logits(real.bare, ids, {LAYER: hook})[-1]
            wanted = float((last - clean)[the] - (last - clean)[paris])
            mine = scores.score[(scores.prompt == n) & (scores.latent == latent)]
            assert float(mine.sum()) == pytest.approx(wanted, abs=2e-3)


def test_estimates_rank_exact_ablations(real, saes):
    """With the first position left out: seen were a rank correlation of .92, all signs, and a gap
    of 3 %; without that, the first position holds more than half of one prompt's scores."""
    chats, where = CHATS[:2], ~sf.Tokens.first(1)
    attribute = sf.Attribute(saes[LAYER], METRIC, where=where)
    scores = attribute(real.nn, chats)
    found = sf.audit(attribute, real.nn, chats, scores, k=12, budget=16)
    assert found.top.rank > 0.7 and found.top.sign >= 0.75
    path = sf.Attribute(saes[LAYER], METRIC, where=where, method=sf.IG(8, "midpoint"))
    along = path(real.nn, chats)
    assert bool((along.gap.abs() < 0.15 * (along.baseline - along.clean).abs()).all())
    whole = sf.Attribute(saes[LAYER], METRIC)(real.nn, chats)
    share, place = whole.heaviest
    assert place.tolist() == [0, 0] and bool((share > 0.3).all())
    assert "where=~Tokens.first(1)" in repr(whole) and "Tokens.first" in repr(scores)


# ---------------------------------------------------------------- files


def test_an_intervention_from_its_file_and_a_run_from_its_checkpoint(real, saes, tmp_path):
    step = sf.Clamp(saes[LAYER].latents(CHOSEN), 60.0, where=sf.Tokens.role("user"))
    step = step | sf.Probe(saes[8].latents([5]))
    path = sf.save(step, tmp_path / "step.safetensors", max_bytes=1 << 22)
    again = sf.load(path, model=real.nn)
    run = partial(sf.run, real.nn, CHATS, max_new_tokens=3, batch_size=2)
    one, two = run(step), run(again)
    assert one.completions == two.completions and torch.equal(one.logits, two.logits)
    assert torch.equal(one.readings[0].values, two.readings[0].values)
    assert one.provenance.quantization == "quantized by gguf"
    kept = run(step, checkpoint=tmp_path / "kept")
    passes = []
    handle = watch(real.bare.lm_head, lambda *_: passes.append(1))
    resumed = run(step, checkpoint=tmp_path / "kept")
    handle.remove()
    assert not passes and resumed.completions == kept.completions == one.completions
    assert torch.equal(resumed.logits, kept.logits)
    with pytest.raises(sf.errors.CheckpointError, match="of another job"):
        sf.run(real.nn, CHATS[::-1], step, max_new_tokens=3, batch_size=2,
               checkpoint=tmp_path / "kept")  # fmt: skip
