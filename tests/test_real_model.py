"""The contract's core on a real chat model (``tests/real.py``), against plain hooks on it.

What a tiny model cannot show: position 0 is an attention sink, BOS, EOS and pad stand inside every
prompt, and the answers are sentences. ``make real`` runs these tests alone.
"""

from __future__ import annotations

from functools import partial

import nnsight
import pytest
import torch
import transformers

import saefeat as sf
from real import (
    BLANK,
    CHATS,
    END,
    START,
    TEXTS,
    D,
    continued,
    dictionary,
    hooks,
    load,
    logits,
    residual,
)  # fmt: skip
from saefeat.text.padding import left_padded

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
