"""The contract: one list of cases, every way of running, the same result, and nothing left behind.

FIELD.md section 3 names the silent failures; the test of each is named in its docstring.
"""

from __future__ import annotations

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import (
    FAMILIES,
    RAGGED,
    TRANSCODERS,
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

NEW = 4

# ---------------------------------------------------------------- the list of cases

SITES = ["resid_pre", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post"]
CASES = [
    # family, site, architecture
    *((family, "resid_post", "standard") for family in FAMILIES),
    *(("llama", "resid_post", a) for a in ("gated", "jumprelu", "topk", "abstopk", "direction")),
    *(("gemma2", "resid_post", a) for a in ("gated", "jumprelu", "topk", "abstopk", "direction")),
    *(("gpt2", site, "direction") for site in SITES),
    *(("gemma2", site, "direction") for site in SITES),
    *(("qwen3", site, "jumprelu") for site in ("attn_out", "mlp_out", "resid_pre", "resid_mid")),
    *((family, "mlp_norm", a) for family in ("gpt2", "gemma2", "llama") for a in TRANSCODERS),
]
VERBS = {
    "ablate": lambda latents: sf.Ablate(latents),
    "set": lambda latents: sf.Clamp(latents, 3.0),
    "mixed": lambda latents: (
        sf.Clamp(apart(latents)[0], add=1.5, where=sf.Tokens.last(2) | sf.Tokens.generated())
        | sf.Clamp(apart(latents)[1], scale=-1.0, active_only=True)
    ),
}


def apart(latents: sf.Latents) -> tuple[sf.Latents, sf.Latents]:
    """The latents for two edits in a row: the same, but for transcoders, which refuse that."""
    dictionary, indices = latents.parts[0]
    if dictionary.site == dictionary.write_site:
        return latents, latents
    return dictionary.latents(indices[:3]), dictionary.latents(indices[3:])


def case_name(case) -> str:
    return "-".join(case)


def latents_for(family: str, site: str, architecture: str) -> sf.Latents:
    """Six latents of a dictionary that fits, at layer 1."""
    if architecture == "direction":
        width = {"mlp_post": 4 * D if family == "gpt2" else 64}.get(site, D)
        return sf.Direction(torch.randn(2, width), site=f"{site}.1").latents()
    return make_sae(architecture, f"{site}.1").latents([3, 40, 17, 8, 22, 30])


def trace(nn, batch, intervention=None):
    """(logits [b, t, v], log) of a trace with the intervention called inline."""
    with torch.no_grad(), nn.trace(batch):
        log = nnsight.save({} if intervention is None else intervention(nn))
        logits = nnsight.save(nn.output.logits)
    return logits, log


def generate(nn, batch, intervention=None, new=NEW, **options):
    with nn.generate(max_new_tokens=new, do_sample=False, **options) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save({} if intervention is None else intervention(nn))
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return tokens[:, batch["input_ids"].shape[1] :], log


def bare_generate(model, batch, new=NEW, **options):
    tokens = model.generate(**batch, max_new_tokens=new, do_sample=False, **options)
    return tokens[:, batch["input_ids"].shape[1] :]


def every_way(model, batch, intervention) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Way → (last logits, generated tokens)."""
    nn = wrapped(model)
    found = {}
    with torch.no_grad(), sf.hooked(model, intervention):
        found["hooked"] = (forward(model, batch)[:, -1], None)
    with sf.hooked(model, intervention):
        found["hooked"] = (found["hooked"][0], bare_generate(model, batch))
    edited = sf.edit(nn, intervention)
    with torch.no_grad(), edited.trace(batch):
        logits = nnsight.save(edited.output.logits)
    found["edit"] = (logits[:, -1], generate(edited, batch)[0])
    out = sf.run(nn, batch, intervention, max_new_tokens=NEW)
    found["run"] = (out.logits, torch.tensor(out.completions))
    found["inline"] = (
        trace(nn, batch, intervention)[0][:, -1],
        generate(nn, batch, intervention)[0],
    )
    return found


# ---------------------------------------------------------------- (a) nothing changes unless asked


NOTHING = {
    "empty": lambda latents: sf.verbs.base.Chain(()),
    "probe": lambda latents: sf.Probe(latents),
    "scale one": lambda latents: sf.Clamp(latents, scale=1.0),
    "add zero": lambda latents: sf.Clamp(latents, add=0.0),
    "no token": lambda latents: sf.Ablate(latents, where=sf.Tokens.ids(99)),
    "never generated": lambda latents: sf.Clamp(latents, 9.0, where=sf.Tokens.generated(99)),
    "wide bounds": lambda latents: sf.Clamp(latents, low=-1e9, high=1e9),
}


PLACES = [
    ("gemma2", "resid_post", "jumprelu"),
    ("gpt2", "attn_out", "standard"),
    ("llama", "mlp_norm", "transcoder"),
    ("llama", "resid_mid", "topk"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nothing", NOTHING)
def test_a_no_op_is_the_bare_model(nothing, dtype):
    """Bit for bit, in logits and tokens; an error-term splice moves x by up to .06 in bf16."""
    turn = (list(NOTHING).index(nothing) + dtype.itemsize // 2) % len(PLACES)
    family, site, architecture = PLACES[turn]
    model, batch = build(family, dtype), batch_of()
    bare = forward(model, batch)
    tokens = bare_generate(model, batch)
    intervention = NOTHING[nothing](latents_for(family, site, architecture))
    with torch.no_grad(), sf.hooked(model, intervention):
        assert torch.equal(forward(model, batch), bare)
    nn = wrapped(model)
    assert torch.equal(trace(nn, batch, intervention)[0], bare)
    edited = sf.edit(nn, intervention)
    with torch.no_grad(), edited.trace(batch):
        logits = nnsight.save(edited.output.logits)
    assert torch.equal(logits, bare)
    out = sf.run(nn, batch, intervention, max_new_tokens=NEW, allow_unfired=True)
    assert torch.equal(torch.tensor(out.completions), tokens)
    assert torch.equal(out.logits, sf.run(nn, batch, max_new_tokens=NEW).logits)
    once = sf.run(nn, batch, intervention, allow_unfired=True)
    assert torch.equal(once.logits, bare[:, -1].float())


# ---------------------------------------------------------------- (b) one result, five ways


def by_hand(latents: sf.Latents, verb: str, batch, layer=1):
    """The edit of the residual stream written out, for hooks that know nothing of saefeat.

    Encodes with the dictionary (test_kernel and test_dictionaries hold that against formulas).
    """
    ((dictionary, indices),) = latents.parts
    every = dictionary.encode
    rows = dictionary.directions()[list(indices)]
    real = batch["attention_mask"].bool()
    last2 = real.clone()
    last2[:, :-2] = False
    passes = []

    def move(x, new_of, where):
        f = every(x)[..., list(indices)]
        return torch.where(where[..., None], x + (new_of(f) - f) @ rows, x)

    def edit(x):
        first = not passes
        passes.append(x.shape[1])
        assert x.shape[1] == (real.shape[1] if first else 1)
        ones = torch.ones(len(x), 1, dtype=torch.bool)
        where = real if first else ones
        if verb == "ablate":
            return move(x, torch.zeros_like, where)
        if verb == "set":
            return move(x, lambda f: torch.full_like(f, 3.0), where)
        x = move(x, lambda f: f + 1.5, last2 if first else ones)
        return move(x, lambda f: torch.where(f == 0, f, -f), where)

    return edit, passes


TURNS = [(case, verb) for case in CASES[::9] for verb in VERBS]
TURNS += [(case, list(VERBS)[n % 3]) for n, case in enumerate(CASES) if n % 9]


@pytest.mark.parametrize(("case", "verb"), TURNS, ids=lambda v: v if v in VERBS else case_name(v))
def test_every_way_gives_one_result(case, verb):
    """And, for the residual stream, the result of hooks written by hand, on every token."""
    family, site, _ = case
    model, batch = build(family), batch_of()
    latents = latents_for(*case)
    with torch.no_grad():
        bare = forward(model, batch)[:, -1]
    ways = every_way(model, batch, VERBS[verb](latents))
    reference = ways["hooked"]
    assert ((reference[0] - bare).abs().amax(-1) > 1e-4).all(), "the edit must do something"
    if site == "resid_post":
        function, _ = by_hand(latents, verb, batch)
        with torch.no_grad(), raw_hooks(model, {1: function}):
            logits = forward(model, batch)[:, -1]
        function, passes = by_hand(latents, verb, batch)
        with raw_hooks(model, {1: function}):
            tokens = bare_generate(model, batch)
        assert passes == [6] + [1] * (NEW - 1)
        ways["by hand"] = (logits, tokens)
    for name, (logits, tokens) in ways.items():
        torch.testing.assert_close(logits, reference[0], atol=2e-5, rtol=1e-5, msg=name)
        assert torch.equal(tokens, reference[1]), name


@pytest.mark.parametrize("way", ["hooked", "edit", "run", "inline"])
def test_every_decoded_token_is_edited(way):
    """Steering that fires once instead of on every token (nnsight: 1 of 6)."""
    model, batch = build("gemma2"), batch_of()
    nn = wrapped(model)
    v = sf.Direction(unit(5), site="resid_post.1")
    sizes, seen = [], []

    def watch(_, __, output):
        sizes.append(output.shape[1])
        seen.append((output @ unit(5))[:, -1])

    model.model.layers[1].register_forward_hook(watch)  # before hooked's own: sees the bare value
    after = []
    model.model.layers[2].register_forward_pre_hook(lambda _, args: after.append(args[0][:, -1]))
    everywhere = sf.Clamp(v, 40.0)
    prompt_only = sf.Clamp(v, 40.0, where=sf.Tokens.prompt())

    def tokens_of(step):
        if way == "hooked":
            with sf.hooked(model, step):
                return bare_generate(model, batch)
        if way == "edit":
            return generate(sf.edit(nn, step), batch)[0]
        if way == "run":
            return torch.tensor(sf.run(nn, batch, step, max_new_tokens=NEW).completions)
        return generate(nn, batch, step)[0]

    tokens_of(everywhere)
    assert sizes == [6] + [1] * (NEW - 1)
    reached = torch.stack([x @ unit(5) for x in after])
    torch.testing.assert_close(reached, torch.full_like(reached, 40.0), atol=1e-3, rtol=1e-4)
    after.clear()
    tokens_of(prompt_only)
    reached = torch.stack([x @ unit(5) for x in after])
    torch.testing.assert_close(reached[0], torch.full((3,), 40.0), atol=1e-3, rtol=1e-4)
    assert (reached[1:] < 30).all(), "a prompt-only edit must leave decoded tokens alone"


def test_prompt_only_and_generated_only_are_different_edits():
    model, batch = build("llama"), batch_of()
    nn = wrapped(model)
    v = sf.Direction(unit(5), site="resid_post.1")
    rules = {
        "all": None,
        "prompt": sf.Tokens.prompt(),
        "generated": sf.Tokens.generated(),
        "second": sf.Tokens.generated(1, 2),
    }
    counts, tokens = {}, {}
    for name, rule in rules.items():
        out = sf.run(nn, batch, sf.Clamp(v, 30.0, where=rule), max_new_tokens=NEW)
        counts[name], tokens[name] = out.receipt.rows[0].tokens, out.completions
        assert out.receipt.passes == NEW
    assert counts == {"all": 13 + 9, "prompt": 13, "generated": 9, "second": 3}
    bare = sf.run(nn, batch, max_new_tokens=NEW).completions
    assert [row[0] for row in tokens["generated"]] == [row[0] for row in bare]
    assert [row[:2] for row in tokens["second"]] == [row[:2] for row in bare]
    assert tokens["all"] != tokens["prompt"] and tokens["all"] != tokens["generated"]


def test_the_first_new_token_is_made_by_the_last_prompt_token():
    """Off by one at the first new token."""
    model, batch = build("llama"), batch_of()
    nn = wrapped(model)
    v = sf.Direction(unit(5), site="resid_post.2")
    last = sf.run(nn, batch, sf.Clamp(v, 60.0, where=sf.Tokens.last(1)), max_new_tokens=2)
    everywhere = sf.run(nn, batch, sf.Clamp(v, 60.0), max_new_tokens=2)
    bare = sf.run(nn, batch, max_new_tokens=2)
    assert [r[0] for r in last.completions] == [r[0] for r in everywhere.completions]
    assert torch.allclose(last.logits, everywhere.logits, atol=1e-5)
    assert [r[0] for r in last.completions] != [r[0] for r in bare.completions]


# ---------------------------------------------------------------- (c) batched == single


SOME = [CASES[0], CASES[6], *CASES[11:26:2], *CASES[-9::4]]
ANYWHERE, BY_POSITION = "anywhere", "by position"


def steps(chosen: sf.Latents, rules: str, new: int) -> sf.verbs.base.Chain:
    first, second = apart(chosen)
    probe = sf.Probe(chosen, where=None if rules == ANYWHERE else ~sf.Tokens.first(1))
    if rules == ANYWHERE:
        edits = sf.Clamp(first, add=1.0) | sf.Clamp(second, scale=0.5)
        return edits | probe if first is second else probe | edits
    late = sf.Tokens.generated(1) if new else sf.Tokens.prompt() & ~sf.Tokens.last(2)
    early = sf.Tokens.first(2) | sf.Tokens.last(1)
    edits = sf.Clamp(first, add=1.0, where=early) | sf.Clamp(second, scale=0.5, where=late)
    return edits | probe if first is second else probe | edits


WAYS = [
    (ANYWHERE, 4),
    (BY_POSITION, 0),
    (BY_POSITION, 4),
]


@pytest.mark.parametrize(("rules", "new"), WAYS)
@pytest.mark.parametrize("case", SOME, ids=case_name)
def test_batched_prompts_equal_single_ones(case, rules, new):
    """Left pads: an index that hits a pad differs by .29."""
    nn = wrapped(build(case[0]))
    step = steps(latents_for(*case), rules, new)
    together = sf.run(nn, batch_of(), step, max_new_tokens=new)
    alone = [sf.run(nn, batch_of([p]), step, max_new_tokens=new) for p in RAGGED]
    assert together.completions == tuple(one.completions[0] for one in alone)
    torch.testing.assert_close(
        together.logits, torch.cat([one.logits for one in alone]), atol=2e-4, rtol=1e-4
    )
    for row, one in enumerate(alone):
        width = one.readings[0].values.shape[1]
        mask = together.readings[0].mask[row]
        assert not mask[:-width].any()
        assert torch.equal(mask[-width:], one.readings[0].mask[0])
        kept = mask[-width:, 0]
        torch.testing.assert_close(
            together.readings[0].values[row, -width:][kept],
            one.readings[0].values[0][kept],
            atol=2e-4,
            rtol=1e-4,
        )
    for n in range(2):
        assert together.receipt.rows[n].tokens == sum(o.receipt.rows[n].tokens for o in alone)
        assert together.receipt.rows[n].changed == sum(o.receipt.rows[n].changed for o in alone)


POSITIONS = [
    sf.Tokens.prompt(),
    sf.Tokens.generated(),
    sf.Tokens.first(1),
    sf.Tokens.last(1),
    sf.Tokens.generated(1, 2),
]


@pytest.mark.parametrize("way", ["hooked", "edit", "run", "inline", "loop"])
@pytest.mark.filterwarnings("ignore:.*was never reached")
def test_rules_by_position_hold_where_nothing_is_padded(way):
    """Steering of the prompt alone reached every new token, for prompts of one length."""
    model = build("llama")
    nn, batch = wrapped(model), batch_of(["w1 w2 w3", "w4 w5 w6"])
    v = sf.Direction(unit(5), site="resid_post.1")
    step = sf.verbs.base.Chain(tuple(sf.Clamp(v, add=0.5, where=rule) for rule in POSITIONS))
    if way == "hooked":
        with sf.hooked(model, step) as log:
            bare_generate(model, batch)
        receipts = [step.receipt(log)]
    elif way == "run":
        receipts = [sf.run(nn, batch, step, max_new_tokens=NEW, allow_unfired=True).receipt]
    elif way == "inline":
        receipts = [step.receipt(generate(nn, batch, step)[1])]
    elif way == "loop":
        with nn.generate(max_new_tokens=NEW, do_sample=False) as tracer:
            with tracer.invoke(batch):
                logs = nnsight.save([])
                for number in tracer.iter[:]:
                    logs.append(step(nn, step=number))
            with tracer.invoke():
                nnsight.save(tracer.result)
        receipts = [step.receipt(log) for log in logs]
    else:  # a copy gives no receipt: it must equal the edit of the prompt alone, by hand
        edited = sf.edit(nn, sf.Clamp(v, 60.0, where=sf.Tokens.prompt()))

        def once(x):
            return x if x.shape[1] == 1 else x + (60.0 - x @ unit(5))[..., None] * unit(5)

        with raw_hooks(model, {1: once}):
            wanted = bare_generate(model, batch)
        assert torch.equal(generate(edited, batch)[0], wanted)
        return
    counts = [sum(receipt.rows[n].tokens for receipt in receipts) for n in range(5)]
    assert counts == [6, 2 * (NEW - 1), 2, 2, 2]


def test_batch_size_changes_nothing():
    nn = wrapped(build("gemma2"))
    sae = make_sae()
    step = sf.Ablate(sae.latents([1, 2, 3])) | sf.Probe(sae.latents([4, 5]))
    whole = sf.run(nn, RAGGED, step, max_new_tokens=3)
    cut = sf.run(nn, RAGGED, step, max_new_tokens=3, batch_size=2)
    assert whole.completions == cut.completions and whole.prompts == cut.prompts
    torch.testing.assert_close(whole.logits, cut.logits, atol=1e-5, rtol=1e-5)
    a, b = whole.readings[0], cut.readings[0]
    assert torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.values[a.mask], b.values[b.mask], atol=1e-5, rtol=1e-5)
    assert whole.receipt.rows[0].tokens == cut.receipt.rows[0].tokens
    assert cut.receipt.passes == 2 * whole.receipt.passes


def test_values_that_differ_by_prompt_meet_their_prompt_in_every_batch():
    """Late-bound closures: every hook uses the last row."""
    nn = wrapped(build("llama"))
    v = sf.Direction(unit(5), site="resid_post.1")
    amounts = torch.tensor([[3.0], [-4.0], [9.0]])
    step = sf.Clamp(v, add=amounts) | sf.Probe(v)
    wanted = [sf.run(nn, [p], sf.Clamp(v, add=float(a)), max_new_tokens=3) for p, a in
              zip(RAGGED, amounts, strict=True)]  # fmt: skip
    for size in (3, 2, 1):
        out = sf.run(nn, RAGGED, step, max_new_tokens=3, batch_size=size)
        assert out.completions == tuple(one.completions[0] for one in wanted)
    with pytest.raises(sf.errors.LatentError, match="values for 3 prompts"):
        sf.run(nn, RAGGED[:2], step)


def test_a_finished_row_is_not_read_or_counted():
    """Pads counted in sums: after EOS a row is fed pads while the others go on."""
    model = build("llama")
    nn = wrapped(model)
    free = sf.run(nn, RAGGED, max_new_tokens=NEW)
    stop = free.completions[0][0]  # the first row stops at once
    assert all(stop not in row for row in free.completions[1:])
    model.generation_config.eos_token_id = stop
    v = sf.Direction(unit(5), site="resid_post.1")
    step = sf.Clamp(v, scale=1.0) | sf.Probe(v)
    together = sf.run(nn, RAGGED, step, max_new_tokens=NEW)
    alone = [sf.run(nn, [p], step, max_new_tokens=NEW) for p in RAGGED]
    assert len(together.completions[0]) == 1 == len(alone[0].completions[0])
    assert together.readings[0].mask.sum() == sum(one.readings[0].mask.sum() for one in alone)
    assert together.receipt.rows[0].tokens == sum(one.receipt.rows[0].tokens for one in alone)


# ---------------------------------------------------------------- (d) inline


def test_each_invoke_is_edited_by_its_own_intervention():
    model = build("gemma2")
    nn = wrapped(model)
    sae = make_sae()
    a, b = sf.Ablate(sae.latents([1, 2, 3, 4])), sf.Clamp(sae.latents([7, 9]), 4.0)
    first, second = batch_of(RAGGED[:2]), batch_of(RAGGED[2:])
    with torch.no_grad(), nn.trace() as tracer:
        with tracer.invoke(first):
            log_a = nnsight.save(a(nn))
            got_a = nnsight.save(nn.output.logits[:, -1])
        with tracer.invoke(second):
            log_b = nnsight.save(b(nn))
            got_b = nnsight.save(nn.output.logits[:, -1])
    for got, batch, step, log in ((got_a, first, a, log_a), (got_b, second, b, log_b)):
        wanted, alone = trace(nn, batch, step)
        torch.testing.assert_close(got, wanted[:, -1], atol=2e-5, rtol=1e-5)
        assert step.receipt(log).rows[0].tokens == int(batch["attention_mask"].sum())
        assert step.receipt(log).rows[0].changed == step.receipt(alone).rows[0].changed
    with nn.generate(max_new_tokens=NEW, do_sample=False) as tracer:
        with tracer.invoke(first):
            a(nn)
        with tracer.invoke(second):
            b(nn)
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    wanted = [*generate(nn, first, a)[0].tolist(), *generate(nn, second, b)[0].tolist()]
    assert tokens[:, 6:].tolist() == wanted


def test_a_bare_invoke_beside_an_edited_one_is_untouched():
    model = build("llama")
    nn = wrapped(model)
    step = sf.Clamp(sf.Direction(unit(), site="resid_post.1"), 9.0)
    batch = batch_of(RAGGED[:2])
    with torch.no_grad(), nn.trace() as tracer:
        with tracer.invoke(batch):
            step(nn)
            edited = nnsight.save(nn.output.logits)
        with tracer.invoke(batch):
            bare = nnsight.save(nn.output.logits)
    with torch.no_grad():
        torch.testing.assert_close(bare, forward(model, batch), atol=1e-5, rtol=1e-5)
    assert (edited - bare).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.*was never reached")  # nnsight says so of every open loop
def test_a_user_loop_over_passes():
    model, batch = build("gemma2"), batch_of()
    nn = wrapped(model)
    sae = make_sae()
    step = (
        sf.Clamp(sae.latents([3, 8]), 2.0, where=sf.Tokens.last(1) | sf.Tokens.generated(2))
        | sf.Ablate(sae.latents([5, 6]))
    )  # fmt: skip
    wanted, log = generate(nn, batch, step)
    with nn.generate(max_new_tokens=NEW, do_sample=False) as tracer:
        with tracer.invoke(batch):
            logs = nnsight.save([])
            for number in tracer.iter[:]:
                logs.append(step(nn, step=number))
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    assert torch.equal(tokens[:, 6:], wanted) and len(logs) == NEW
    parts = [step.receipt(one) for one in logs]
    for row in range(2):
        total = sum(part.rows[row].tokens for part in parts)
        assert total == step.receipt(log).rows[row].tokens
    with nn.generate(max_new_tokens=NEW, do_sample=False) as tracer:
        with tracer.invoke(batch):
            for number in tracer.iter[2:3]:  # one pass alone
                only = nnsight.save(step(nn, step=number))
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    bare = bare_generate(model, batch)
    assert torch.equal(tokens[:, 6:8], bare[:, :2])
    assert [row.tokens for row in step.receipt(only).rows] == [0, 3]


def test_later_reads_of_the_block_see_the_edit():
    nn = wrapped(build("llama"))
    v = sf.Direction(unit(), site="resid_post.1")
    with torch.no_grad(), nn.trace(batch_of()):
        sf.Clamp(v, 9.0)(nn)
        x = nnsight.save(nn.model.layers[2].input)
    real = batch_of()["attention_mask"].bool()
    torch.testing.assert_close((x @ unit())[real], torch.full((13,), 9.0), atol=1e-4, rtol=0)


def test_calling_it_too_late_says_so():
    nn = wrapped(build("llama"))
    step = sf.Ablate(sf.Direction(unit(), site="resid_post.1"))

    def block():
        with nn.trace(batch_of()):
            nnsight.save(nn.model.layers[2].output)
            step(nn)

    with pytest.raises(Exception, match="before anything else in the block"):
        block()


# ---------------------------------------------------------------- (e) nothing is left behind


class Boom(Exception):
    pass


def failing(model, error):
    """A hook on the last block that raises once."""

    def hook(*_):
        handle.remove()
        raise error

    handle = blocks_of(model)[2].register_forward_hook(hook)


@pytest.mark.parametrize("way", ["hooked", "edit", "run", "inline"])
@pytest.mark.parametrize(
    "trouble", ["none", "error inside", "module raises", "ctrl-c", "wrong layer"]
)
def test_nothing_is_left_behind(way, trouble):
    model, batch = build("gpt2"), batch_of()
    nn = wrapped(model)
    with torch.no_grad():
        before = forward(model, batch)
    layer = 7 if trouble == "wrong layer" else 1
    v = sf.Direction(unit(), site=f"resid_post.{layer}")
    step = sf.Clamp(v, 9.0) | sf.Clamp(sf.Direction(unit(1), site="attn_out.0"), add=2.0)
    if trouble == "module raises":
        failing(model, Boom())
    if trouble == "ctrl-c":
        failing(model, KeyboardInterrupt())
    hooks = hook_count(model) - (trouble in ("module raises", "ctrl-c"))

    def go():
        if way == "hooked":
            with torch.no_grad(), sf.hooked(model, step):
                forward(model, batch)
                if trouble == "error inside":
                    raise Boom
        elif way == "run":
            sf.run(nn, batch, step, max_new_tokens=2)
            if trouble == "error inside":
                raise Boom
        else:
            use = sf.edit(nn, step) if way == "edit" else nn
            with torch.no_grad(), use.trace(batch):
                if way == "inline":
                    step(nn)
                if trouble == "error inside":
                    raise Boom
                nnsight.save(use.output.logits)

    if trouble == "none":
        go()
    else:
        with pytest.raises(BaseException) as caught:
            go()
        if trouble == "ctrl-c":
            assert isinstance(caught.value, KeyboardInterrupt)
    assert hook_count(model) == hooks
    with torch.no_grad():
        assert torch.equal(forward(model, batch), before)
        with nn.trace(batch):
            logits = nnsight.save(nn.output.logits)
    assert torch.equal(logits, before)
    assert not any(p.grad is not None for p in model.parameters())


def test_edit_leaves_the_original_and_stacks():
    model, batch = build("llama"), batch_of()
    nn = wrapped(model)
    sae = make_sae()
    a, b = sf.Clamp(sae.latents([3, 8]), 3.0), sf.Ablate(sae.latents([8, 5, 40, 22]))
    bare = trace(nn, batch)[0]
    once = sf.edit(nn, a)
    twice = sf.edit(once, b)
    assert torch.equal(trace(nn, batch)[0], bare)
    assert torch.equal(trace(once, batch)[0], trace(nn, batch, a)[0])
    stacked, chained = trace(twice, batch)[0], trace(nn, batch, a | b)[0]
    torch.testing.assert_close(stacked, chained, atol=1e-5, rtol=1e-5)
    assert (stacked - trace(nn, batch, b | a)[0]).abs().max() > 1e-3
    assert torch.equal(generate(twice, batch)[0], generate(nn, batch, a | b)[0])
    assert torch.equal(trace(once, batch)[0], trace(nn, batch, a)[0])


def test_edited_copies_take_inline_steps_too():
    model, batch = build("llama"), batch_of()
    nn = wrapped(model)
    sae = make_sae()
    a, b = sf.Clamp(sae.latents([3, 8]), 3.0), sf.Ablate(sae.latents([8, 5, 40, 22]))
    edited = sf.edit(nn, a)
    torch.testing.assert_close(
        trace(edited, batch, b)[0], trace(nn, batch, a | b)[0], atol=1e-5, rtol=1e-5
    )


def test_one_object_serves_again_and_on_other_models():
    sae = make_sae()
    step = sf.Ablate(sae.latents([1, 2, 3]))
    text = repr(step)
    results = []
    for family, dtype in [
        ("llama", torch.float32),
        ("gpt2", torch.float64),
        ("llama", torch.bfloat16),
        ("llama", torch.float32),
    ]:
        model = build(family, dtype)
        with torch.no_grad(), sf.hooked(model, step):
            results.append(forward(model, batch_of()))
    assert torch.equal(results[0], results[3]) and repr(step) == text
    assert results[1].dtype == torch.float64 and results[2].dtype == torch.bfloat16


def test_runs_are_deterministic():
    nn = wrapped(build("gemma2"))
    step = sf.Ablate(make_sae("topk").latents([1, 2, 3]))
    a, b = (sf.run(nn, RAGGED, step, max_new_tokens=3) for _ in range(2))
    assert torch.equal(a.logits, b.logits) and a.completions == b.completions


def test_the_models_own_values_are_not_edited_in_place():
    """Clamp writes to a copy; 'before' aliases the edited tensor (all zeros)."""
    model, batch = build("llama"), batch_of()
    v = sf.Direction(unit(), site="resid_post.1")
    raw = []
    model.model.layers[1].register_forward_hook(lambda m, a, out: raw.append(out))
    with torch.no_grad(), sf.hooked(model, sf.Ablate(v)):
        forward(model, batch)
    assert (raw[0] @ unit()).abs().min() > 1e-4  # the block's own output is as it was


# ---------------------------------------------------------------- (f) order


def test_at_one_site_the_second_reads_what_the_first_left():
    model, batch = build("llama"), batch_of()
    v = sf.Direction(unit(), site="resid_post.1")
    probe = sf.Probe(v)
    chain = probe | sf.Clamp(v, 5.0) | probe | sf.Clamp(v, scale=-2.0) | probe
    with torch.no_grad(), sf.hooked(model, chain) as log:
        forward(model, batch)
    first, second, third = chain.readings(log)
    assert (first.values[first.mask] - 5.0).abs().min() > 1e-3
    for reading, value in ((second, 5.0), (third, -10.0)):
        wanted = torch.full((13,), value)
        torch.testing.assert_close(reading.values[reading.mask], wanted, atol=1e-4, rtol=0)


def test_probe_reads_after_the_edits_before_it():
    """An SAE's reading after an ablation of its own direction is what the edited stream encodes."""
    model, batch = build("gemma2"), batch_of()
    sae = make_sae()
    chosen = sae.latents([3, 40, 17])
    chain = sf.Probe(chosen) | sf.Ablate(chosen) | sf.Probe(chosen)
    values = []
    model.model.layers[2].register_forward_pre_hook(lambda m, args: values.append(args[0]))
    with torch.no_grad(), sf.hooked(model, chain) as log:
        forward(model, batch)
    before, after = chain.readings(log)
    real = batch["attention_mask"].bool()
    wanted = sae.encode(values[0], [3, 40, 17])
    torch.testing.assert_close(after.values[real], wanted[real], atol=1e-5, rtol=1e-5)
    assert (before.values[real] > 0).any()


def test_across_sites_the_listing_order_does_not_matter():
    nn = wrapped(build("gpt2"))
    steps = [
        sf.Ablate(make_sae("jumprelu", "resid_post.2", 1).latents([1, 2, 3])),
        sf.Clamp(make_sae("standard", "mlp_out.1", 2).latents([4, 5]), 2.0),
        sf.Clamp(sf.Direction(unit(3), site="attn_out.0"), add=3.0),
        sf.Ablate(make_sae("transcoder", seed=3).latents([6, 7])),
        sf.Clamp(sf.Direction(unit(4), site="resid_pre.1"), 2.0),
    ]
    results = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 3, 1, 0], [2, 0, 4, 3, 1]):
        # mlp_out.1 is written by two steps: their own order stays
        order = [n for n in order if n not in (1, 3)] + [3, 1]
        chain = sf.verbs.base.Chain(tuple(steps[n] for n in order))
        results.append(trace(nn, batch_of(), chain)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_two_dictionaries_at_one_site_both_act():
    """Two SAEs at one site overwrite each other. In a chain the second reads what the first left;
    in one verb neither sees the other, so that the order of a union does not matter."""
    model, batch = build("llama"), batch_of()
    x = []
    model.model.layers[2].register_forward_pre_hook(lambda m, args: x.append(args[0]))
    a, b = make_sae("standard", seed=1), make_sae("jumprelu", seed=2)
    step = sf.Clamp(a.latents([3]), 2.0) | sf.Clamp(b.latents([4]), 3.0)
    joint = sf.Clamp(a.latents([3]) | b.latents([4]), torch.tensor([2.0, 3.0]))
    turned = sf.Clamp(b.latents([4]) | a.latents([3]), torch.tensor([3.0, 2.0]))
    with torch.no_grad():
        forward(model, batch)
        for each in (step, joint, turned):
            with sf.hooked(model, each):
                forward(model, batch)
    one = x[0] + (2.0 - a.encode(x[0], [3])) @ a.directions([3])
    two = one + (3.0 - b.encode(one, [4])) @ b.directions([4])
    both = one + (3.0 - b.encode(x[0], [4])) @ b.directions([4])
    real = batch["attention_mask"].bool()
    for found, wanted in zip(x[1:], (two, both, both), strict=True):
        torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)
    assert (two - both).abs().max() > 1e-4


def test_a_transcoders_latent_is_edited_once_in_a_chain():
    """Its second reading would be upstream of the first edit: deltas would add up unseen."""
    t = make_sae("transcoder")
    nn = wrapped(build("llama"))
    for second in (sf.Ablate(t.latents([3])), sf.Probe(t.latents([3]))):
        with pytest.raises(sf.errors.LatentError, match="edited earlier in the chain"):
            sf.run(nn, RAGGED, sf.Ablate(t.latents([3, 4])) | second)
    before = sf.run(nn, RAGGED, sf.Probe(t.latents([3])) | sf.Ablate(t.latents([3])))
    other = sf.run(nn, RAGGED, sf.Ablate(t.latents([4])) | sf.Probe(t.latents([3])))
    torch.testing.assert_close(before.readings[0].values, other.readings[0].values)


def test_a_loop_of_ones_own_refuses_what_looks_back():
    nn, sae = wrapped(build("llama")), make_sae()
    v = sf.Direction(unit(5), site="resid_post.1")
    held = sf.Clamp(v, add=1.0, when=sf.When(sae.latents([1]), hold=True))
    role = sf.Clamp(v, add=1.0, where=~sf.Tokens.role("user"))
    for verb in (held, role):
        with pytest.raises(sf.errors.LatentError, match="without step"):
            verb(nn, step=0)


@pytest.mark.parametrize("way", ["hooked", "edit"])
@pytest.mark.parametrize("rows", [1, 2])
def test_values_for_other_prompts_never_broadcast(way, rows):
    """One prompt in, three rows out; or one row's values on three prompts."""
    model = build("llama")
    step = sf.Clamp(make_sae().latents([2, 5]), torch.randn(rows, 2))
    batch = batch_of()
    with pytest.raises(ValueError, match=f"values for {rows} prompts, and the batch has 3"):
        if way == "hooked":
            with sf.hooked(model, step):
                forward(model, batch)
        else:
            with sf.edit(wrapped(model), step).trace(batch):
                pass


def test_a_cache_begun_elsewhere_is_another_sequence():
    """`hooked` must not go on with the prompt it saw last; where the prompt ended, nobody says."""
    model = build("llama")
    prefix, rest = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])
    v = sf.Direction(unit(5), site="resid_post.1")

    def go_on():
        with torch.no_grad():
            cache = model(prefix, use_cache=True).past_key_values
        return lambda: model(rest, past_key_values=cache).logits

    push, refused = (sf.Clamp(v, add=1.0, where=w) for w in (~sf.Tokens.ids(8), sf.Tokens.last(1)))
    alone, after, late = go_on(), go_on(), go_on()
    with torch.no_grad(), sf.hooked(model, push):
        wanted = alone()
    with torch.no_grad(), sf.hooked(model, push):
        model(torch.tensor([[20, 21, 22, 23, 24, 25, 26]]))
        found = after()
    torch.testing.assert_close(found, wanted)
    unknown = pytest.raises(ValueError, match="prompt's length, which is not known")
    with torch.no_grad(), unknown, sf.hooked(model, refused):
        late()


def test_padding_without_a_mask_is_refused():
    with pytest.raises(sf.errors.PromptError, match="without an attention mask"):
        sf.run(wrapped(build("llama")), batch_of()["input_ids"])


@pytest.mark.parametrize("given", [{"batch_size": 0}, {"max_new_tokens": 2.5}])
def test_counts_are_whole_numbers(given):
    with pytest.raises(sf.errors.PromptError, match=next(iter(given))):
        sf.run(wrapped(build("llama")), RAGGED, **given)


def test_provenance_names_every_latent_and_condition():
    a, b = make_sae(seed=1), make_sae(layer=0, seed=2)
    verb = sf.Ablate(a.latents(range(9)), when=sf.When(b.latents([4]), above=-1.0))
    found = sf.run(wrapped(build("llama")), RAGGED, verb).provenance
    assert found.latents == ({"resid_post.1": list(range(9))},)
    assert b.fingerprint([4]) in found.dictionaries["resid_post.0"]


# ---------------------------------------------------------------- (g) readings


@pytest.mark.parametrize("reduce", [None, "max", "mean", "last"])
@pytest.mark.parametrize("way", ["hooked", "run", "inline"])
def test_readings_against_brute_force(reduce, way):
    model, batch = build("gemma2"), batch_of()
    nn = wrapped(model)
    sae = make_sae()
    rule = ~sf.Tokens.first(1) & ~sf.Tokens.generated(2, 3)
    probe = sf.Probe(sae.latents([7, 0, 30]), where=rule, reduce=reduce)
    if way == "run":
        (reading,) = sf.run(nn, batch, probe, max_new_tokens=NEW).readings
    elif way == "hooked":
        with sf.hooked(model, probe) as log:
            bare_generate(model, batch)
        (reading,) = probe.readings(log)
    else:
        (reading,) = probe.readings(generate(nn, batch, probe)[1])

    tokens = bare_generate(model, batch)[:, :-1]
    ids = torch.cat([batch["input_ids"], tokens], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens)], 1)
    x = []
    handle = model.model.layers[1].register_forward_hook(lambda m, a, out: x.append(out))
    with torch.no_grad():
        forward(model, {"input_ids": ids, "attention_mask": mask})
    handle.remove()
    f = sae.encode(x[0], [7, 0, 30])
    rows = []
    for row, length in enumerate([3, 6, 4]):
        start = 6 - length
        columns = [c for c in range(start + 1, 9) if c != 6 + 2]
        rows.append(f[row, columns])
    if reduce is None:
        assert reading.values.shape == reading.mask.shape == (3, 9, 3)
        counted = [int(n) for n in reading.mask[..., 0].sum(1)]
        assert counted == [len(r) for r in rows]
        for row, wanted in enumerate(rows):
            found = reading.values[row][reading.mask[row, :, 0]]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(reading.mean(), torch.cat(rows).mean(0), atol=1e-4, rtol=1e-4)
        share = (torch.cat(rows) > 0).float().mean(0)
        torch.testing.assert_close(reading.active(), share)
        assert 0 < share.max() < 1 or share.min() < 1
    by_row = {
        "max": torch.stack([r.amax(0) for r in rows]),
        "mean": torch.stack([r.mean(0) for r in rows]),
        "last": torch.stack([r[-1] for r in rows]),
    }
    for name in ("max", "last") if reduce is None else (reduce,):
        found = getattr(reading, name)() if reduce is None else reading.values[:, 0]
        torch.testing.assert_close(found, by_row[name], atol=1e-4, rtol=1e-4)
    if reduce is not None:
        assert reading.values.shape == (3, 1, 3) and reading.mask.all()


def test_before_is_not_an_alias_of_the_edited_value():
    """'Before' aliases the edited tensor (all zeros)."""
    model, batch = build("llama"), batch_of()
    v = sf.Direction(unit(), site="resid_post.1")
    alone, chain = sf.Probe(v), sf.Probe(v) | sf.Ablate(v)
    with torch.no_grad(), sf.hooked(model, alone) as log:
        forward(model, batch)
    wanted = alone.readings(log)[0].values
    with torch.no_grad(), sf.hooked(model, chain) as log:
        forward(model, batch)
    found = chain.readings(log)[0].values
    assert torch.equal(found, wanted) and found.abs().min() > 1e-4


# ---------------------------------------------------------------- (h) receipts


def test_receipts_count_exactly():
    model, batch = build("llama"), batch_of()
    sae = make_sae("jumprelu")
    index = [3, 40, 17, 8]
    x = []
    handle = model.model.layers[1].register_forward_hook(lambda m, a, out: x.append(out))
    with torch.no_grad():
        forward(model, batch)
    handle.remove()
    real = batch["attention_mask"].bool()
    f = sae.encode(x[0], index)
    out = sf.run(wrapped(model), batch, sf.Ablate(sae.latents(index)))
    row = out.receipt.rows[0]
    assert (row.tokens, row.changed) == (13, int((f[real] != 0).sum()))
    assert row.largest == pytest.approx(float(f[real].abs().max()), rel=1e-4)
    assert out.receipt.passes == 1 and out.receipt.unfired == ()
    last = sf.Clamp(sae.latents(index), 2.0, where=sf.Tokens.last(1))
    row = sf.run(wrapped(model), batch, last).receipt.rows[0]
    assert (row.tokens, row.changed) == (3, 12)


def test_an_edit_that_never_fires_is_an_error():
    nn = wrapped(build("llama"))
    never = sf.Ablate(make_sae().latents([1]), where=sf.Tokens.ids(99))
    fires = sf.Ablate(make_sae().latents([2]))
    with pytest.raises(sf.errors.FiringError) as caught:
        sf.run(nn, RAGGED, fires | never)
    text = str(caught.value)
    assert "Tokens.ids(99)" in text and "allow_unfired=True" in text
    out = sf.run(nn, RAGGED, fires | never, allow_unfired=True)
    assert out.receipt.rows[1].tokens == 0 and len(out.receipt.unfired) == 1


# ---------------------------------------------------------------- (i) tuples


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["hooked", "inline"])
def test_tuple_outputs_are_edited_on_all_rows(family, way):
    """``output[0]`` of a tensor is batch row 0: it changed row 0 by .29 and row 1 by 0.0."""
    model, batch = build(family), batch_of()
    for site in ("attn_out", "resid_post", "mlp_out"):
        v = sf.Direction(unit(), site=f"{site}.1")
        chain = sf.Clamp(v, 4.0) | sf.Probe(v)
        if way == "hooked":
            with torch.no_grad(), sf.hooked(model, chain) as log:
                logits = forward(model, batch)
        else:
            logits, log = trace(wrapped(model), batch, chain)
        (reading,) = chain.readings(log)
        torch.testing.assert_close(
            reading.values[reading.mask], torch.full((13,), 4.0), atol=1e-4, rtol=0
        )
        with torch.no_grad():
            moved = (logits - forward(model, batch))[:, -1].abs().amax(-1)
        assert (moved > 1e-3).all()


# ---------------------------------------------------------------- (j) transcoders


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_a_transcoder_reads_at_one_site_and_writes_at_another(family, architecture):
    """Fed the wrong norm, or written where it reads, it is silently wrong."""
    model, batch = build(family, torch.float64), batch_of()
    real = batch["attention_mask"].bool()
    sae = make_sae(architecture, dtype=torch.float64)
    index = [3, 40, 17]
    at_in, at_out = sf.Neurons("mlp_norm.1", D), sf.Neurons("mlp_out.1", D)
    look = sf.Probe(at_in) | sf.Probe(at_out)
    chain = sf.Clamp(sae.latents(index), 2.0) | look
    with torch.no_grad(), sf.hooked(model, look) as log:
        clean = forward(model, batch)
    x_in, x_out = (reading.values for reading in look.readings(log))
    with torch.no_grad(), sf.hooked(model, chain) as log:
        edited = forward(model, batch)
    y_in, y_out = (reading.values for reading in chain.readings(log))
    assert torch.equal(y_in, x_in)
    wanted = x_out + (2.0 - sae.encode(x_in, index)) @ sae.directions(index)
    torch.testing.assert_close(y_out[real], wanted[real], atol=1e-12, rtol=0)
    assert torch.equal(y_out[~real], x_out[~real])
    assert (edited - clean)[:, -1].abs().amax(-1).min() > 1e-4


# ---------------------------------------------------------------- (k) excluded tokens


def test_excluded_tokens_are_skipped_by_default():
    """BOS and special tokens included."""
    model = build("llama")
    nn = wrapped(model)
    batch = batch_of([[2, 10, 11, 12], [2, 3, 10, 1, 13, 14], [20, 21]])
    special = int(torch.isin(batch["input_ids"][batch["attention_mask"].bool()],
                             torch.tensor(tokenizer().all_special_ids)).sum())  # fmt: skip
    assert special == 4
    for excluded, skipped in ((), 0), ((2,), 2), ("special", 4):
        sae = make_sae(excluded=excluded)
        step = sf.Ablate(sae.latents([1, 2])) | sf.Probe(sae.latents([1]))
        out = sf.run(nn, batch, step)
        assert out.receipt.rows[0].tokens == 12 - skipped
        assert out.readings[0].mask.sum() == 12 - skipped
        asked = sf.run(nn, batch, sf.Ablate(sae.latents([1, 2]), where=sf.Tokens.all()))
        assert asked.receipt.rows[0].tokens == 12
        with torch.no_grad(), sf.hooked(model, step) as log:
            forward(model, batch)  # no tokenizer here: the configuration names bos, eos and pad
        plain = 12 - (3 if excluded == "special" else skipped)
        assert step.receipt(log).rows[0].tokens == plain


# ---------------------------------------------------------------- (l) without a cache


@pytest.mark.parametrize("verb", VERBS)
def test_generation_without_a_cache_equals_the_cached_one(verb):
    model, batch = build("llama"), batch_of()
    nn = wrapped(model)
    edited = sf.edit(nn, VERBS[verb](make_sae().latents([3, 40, 17, 8])))
    assert torch.equal(generate(edited, batch)[0], generate(edited, batch, use_cache=False)[0])


RULES = [sf.Tokens.last(1), sf.Tokens.prompt(), sf.Tokens.generated(1), sf.Tokens.first(2)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rules_hold_without_a_cache(rule):
    nn, batch = wrapped(build("llama")), batch_of()
    edited = sf.edit(nn, sf.Clamp(sf.Direction(unit(), site="resid_post.1"), 30.0, where=rule))
    assert torch.equal(generate(edited, batch)[0], generate(edited, batch, use_cache=False)[0])


@pytest.mark.parametrize("rule", RULES[:3], ids=repr)
def test_hooked_generation_without_a_cache(rule):
    model, batch = build("llama"), batch_of()
    step = sf.Clamp(sf.Direction(unit(), site="resid_post.1"), 30.0, where=rule)
    with sf.hooked(model, step) as log:
        cached = bare_generate(model, batch)
    with sf.hooked(model, step) as plain:
        uncached = bare_generate(model, batch, use_cache=False)
    assert step.receipt(log).rows[0].tokens > 0
    assert torch.equal(cached, uncached)
    positions = [int(acted.mask.sum()) for acted in plain.acted[0]][-1]
    assert positions == step.receipt(log).rows[0].tokens


def test_a_reduced_mean_without_a_cache():
    """Every pass sees the whole sequence: the prompt must not count once a pass."""
    model, batch = build("llama"), batch_of()
    nn = wrapped(model)
    probe = sf.Probe(sf.Direction(unit(), site="resid_post.1"), reduce="mean")
    cached = probe.readings(generate(nn, batch, probe)[1])[0].values
    uncached = probe.readings(generate(nn, batch, probe, use_cache=False)[1])[0].values
    torch.testing.assert_close(cached, uncached, atol=1e-4, rtol=1e-4)


def test_hooked_with_a_cache_and_no_mask():
    """A user's own decoding loop: position 0 at a decode step is the newest token."""
    model = build("llama")
    ids = torch.randint(4, 90, (2, 5))
    step = sf.Ablate(sf.Direction(unit(), site="resid_post.1"), where=sf.Tokens.first(1))
    with torch.no_grad(), sf.hooked(model, step) as log:
        out = model(ids, use_cache=True)
        model(ids[:, -1:], past_key_values=out.past_key_values)
    assert step.receipt(log).rows[0].tokens == 2


@pytest.mark.parametrize("reduce", [None, "mean", "max", "last"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_finished_row_keeps_its_readings(cached, reduce):
    """Without a cache each pass shows all tokens: a row that had stopped lost its readings.

    A setting that stops before the others has the columns of a run of its own.
    """
    model = build("llama")
    plain = model.generate(**batch_of(), max_new_tokens=NEW, do_sample=False)
    model.generation_config.use_cache = cached
    model.generation_config.eos_token_id = int(plain[0, -NEW + 1])  # the first row ends early
    nn, probe = wrapped(model), sf.Probe(make_sae().latents([1, 2]), reduce=reduce)
    batch = batch_of()
    found = sf.run(nn, batch, probe, max_new_tokens=NEW)
    assert 1 < len(found.completions[0]) < NEW
    for n in range(3):
        ids = {key: value[n : n + 1, -(3, 6, 4)[n] :] for key, value in batch.items()}
        alone = sf.run(nn, ids, probe, max_new_tokens=NEW)
        assert alone.completions[0] == found.completions[n]
        row, own = found.readings[0], alone.readings[0]
        assert torch.allclose(row.kept()[n].nanmean(0), own.kept()[0].nanmean(0), atol=1e-5)
        push = sf.Clamp(sf.Direction(unit(), site="resid_post.2"), add=50.0)
        sweep = sf.sweep(nn, ids, {"probe": probe, "push": push | probe}, max_new_tokens=NEW)
        swept = sweep["probe"].readings[0]
        assert torch.equal(swept.mask, own.mask)
        assert swept.starts is None or torch.equal(swept.starts, own.starts)
        torch.testing.assert_close(swept.values, own.values)


def test_a_trace_may_say_what_generate_says():
    """Taken for a generation, it waited for a second pass, and the rest of the block was lost."""
    nn, batch, probe = wrapped(build("llama")), batch_of(), sf.Probe(make_sae().latents([1]))
    with torch.no_grad(), nn.trace(batch, return_dict=True, use_cache=False):
        log = nnsight.save(probe(nn))
        logits = nnsight.save(nn.output.logits)
    assert logits.shape[1] == probe.readings(log)[0].values.shape[1] == 6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hooked_reads_arguments_by_position(family):
    """Second stands Llama's mask and GPT-2's cache: the mask was taken to be ones, the cache none.

    (nnsight's trace hands no positional mask to the model at all, so there it is not read either.)
    """
    model, batch = build(family), batch_of()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    probe = sf.Probe(make_sae().latents([1]), where=sf.Tokens.first(1))
    call = (ids, mask) if family == "llama" else (ids, None, mask)
    with torch.no_grad(), sf.hooked(model, probe) as log:
        cache = model(*call, use_cache=True).past_key_values
    first = probe.readings(log)[0].mask[..., 0]
    assert torch.equal(first, (mask.cumsum(1) == 1) & (mask == 1))
    grown = torch.cat([mask, mask[:, -1:]], 1)
    call = (ids[:, -1:], grown, None, cache) if family == "llama" else (ids[:, -1:], cache, grown)
    with torch.no_grad(), sf.hooked(model, probe) as log:
        model(*call)
    assert not probe.readings(log)[0].mask.any()


# ---------------------------------------------------------------- provenance


def test_a_result_says_where_it_comes_from():
    model = build("llama", torch.bfloat16)
    sae = make_sae()
    step = sf.Ablate(sae.latents([3]), where=sf.Tokens.last(2))
    found = sf.run(wrapped(model), RAGGED, step).provenance.to_dict()
    assert found["dtype"] == "bfloat16" and "Llama" in found["model"]
    assert found["intervention"] == repr(step)
    assert found["dictionaries"]["resid_post.1"].endswith(sae.fingerprint([3]))
    assert found["versions"]["nnsight"] == "0.8.1"


def test_provenance_names_both_dictionaries_of_a_site():
    a, b = make_sae("standard", seed=1), make_sae("jumprelu", seed=2)
    out = sf.run(wrapped(build("llama")), RAGGED, sf.Ablate(a.latents([3])) | sf.Probe(b))
    text = str(out.provenance.dictionaries)
    assert a.fingerprint([3]) in text and b.fingerprint() in text


# ---------------------------------------------------------------- open


def test_readings_of_batches_that_stop_early_keep_their_columns():
    """Prompts are aligned on the right and generated tokens follow, whatever the batch size."""
    model = build("llama")
    nn = wrapped(model)
    pair = [RAGGED[0], RAGGED[2]]
    model.generation_config.eos_token_id = sf.run(nn, pair, max_new_tokens=NEW).completions[0][0]
    probe = sf.Probe(sf.Direction(unit(), site="resid_post.1"))
    whole = sf.run(nn, pair, probe, max_new_tokens=NEW)
    cut = sf.run(nn, pair, probe, max_new_tokens=NEW, batch_size=1)
    assert [len(row) for row in whole.completions] == [1, NEW]
    assert torch.equal(whole.readings[0].mask, cut.readings[0].mask)


def test_the_last_of_nothing_is_no_number():
    nn = wrapped(build("llama"))
    probe = sf.Probe(sf.Direction(unit(), site="resid_post.1"), where=sf.Tokens.ids(99))
    (reading,) = sf.run(nn, RAGGED, probe).readings
    assert not reading.mask.any() and not torch.isfinite(reading.max()).any()
    assert not torch.isfinite(reading.last()).any()


def test_a_write_site_before_the_read_site_is_refused():
    with pytest.raises(sf.SaefeatError):
        step = sf.Ablate(make_sae("transcoder", "mlp_norm.1", write_site="attn_out.0"))
        trace(wrapped(build("llama")), batch_of(), step)


@pytest.mark.parametrize(
    "gives",
    [
        lambda ids, position: ids,
        lambda ids, position: ids[:, :1] > 5,
        lambda ids, position: (ids > 5).numpy(),
        lambda ids, position: None,
    ],
    ids=["numbers", "a column", "an array", "nothing"],
)
def test_a_function_for_a_rule_gives_a_mask(gives):
    """Numbers were taken for truths, and a column for every token of its row."""
    step = sf.Ablate(make_sae().latents([1]), where=sf.Tokens.where(gives))
    with pytest.raises(ValueError, match=r"a function of Tokens\.where gave"):
        sf.run(wrapped(build("llama")), RAGGED, step)
