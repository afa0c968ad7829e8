"""Values that depend on where they act, orthogonal ablation, scorers, and topk's two semantics.

Oracles: arithmetic on what probes read before and after an edit, plain forward hooks, dense
formulas in float64, and the integer mixing written out on Python's own integers.
"""

from __future__ import annotations

from dataclasses import replace

import nnsight
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saefeat as sf
from helpers import (
    RAGGED,
    D,
    batch_of,
    blocks_of,
    build,
    continuation_loss,
    forward,
    make_sae,
    raw_hooks,
    tensors_for,
    unit,
    wrapped,
)
from saefeat.dictionaries.excerpt import Excerpt
from test_ways import bare_generate, every_way, generate

NEW = 4
LENGTHS = [3, 6, 4]
V = sf.Direction(unit(5), site="resid_post.1")
CHOSEN = [3, 40, 17, 8, 22, 30]


@pytest.fixture(scope="module")
def traced():
    return wrapped(build("gemma2"))


def sae_latents(architecture="standard", **options):
    return make_sae(architecture, **options).latents(CHOSEN)


def read(nn, prompts, latents, **options) -> sf.results.Readings:
    where = options.pop("where", None)
    return sf.run(nn, prompts, sf.Probe(latents, where=where), **options).readings[0]


def norm(x):
    return x.norm(dim=-1)


# ---------------------------------------------------------------- all ways, one result


def verbs(nn) -> dict[str, sf.Intervention]:
    """One of everything new, on ragged prompts; readings are of the bare model."""
    some, top = sae_latents(), sae_latents("topk")
    clean = read(nn, RAGGED, some)
    push = sf.Clamp(V, add=4.0)
    return {
        "schedule": sf.Clamp(V, add=sf.values.Schedule([8.0, -8.0, 4.0], prompt=1.0)),
        "pin": push | sf.Ablate(some, to=sf.values.Patch(clean)),
        "resample": sf.Ablate(some, to=sf.values.Resample(clean, seed=3)),
        "orthogonal": sf.Ablate(some.span()),
        "scorer": sf.Clamp(V, add=9.0, when=sf.When(norm, site="resid_post.0", above=17.5)),
        "held": sf.Clamp(
            V,
            add=sf.values.Schedule([9.0, 3.0]),
            when=sf.When(norm, site="resid_mid.0", below=15.0, hold=True),
        ),
        "reselect": sf.Ablate(top.reselect()),
        "reselect, scheduled": sf.Clamp(top.reselect(), scale=sf.values.Schedule([3.0, 0.0, 2.0])),
    }


NAMES = list(verbs(wrapped(build("gemma2"))))


@pytest.mark.parametrize("name", NAMES)
def test_all_ways_agree_on_a_ragged_batch_and_batched_is_single(name, traced):
    model = build("gemma2")
    edit = verbs(traced)[name]
    ways = every_way(model, batch_of(), edit)
    reference = ways.pop("hooked")
    bare = sf.run(traced, RAGGED, max_new_tokens=NEW)
    assert (reference[0] - bare.logits).abs().max() > 1e-3, "the edit does nothing here"
    for way, (logits, tokens) in ways.items():
        torch.testing.assert_close(logits, reference[0], atol=2e-5, rtol=1e-5, msg=way)
        assert torch.equal(tokens, reference[1]), way
    together = sf.run(traced, RAGGED, edit, max_new_tokens=NEW)
    apart = sf.run(traced, RAGGED, edit, max_new_tokens=NEW, batch_size=1)
    assert apart.completions == together.completions
    torch.testing.assert_close(apart.logits, together.logits, atol=2e-5, rtol=1e-5)
    for one, all_ in zip(apart.receipt.rows, together.receipt.rows, strict=True):
        assert (one.tokens, one.changed) == (all_.tokens, all_.changed)
        assert one.largest == pytest.approx(all_.largest, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_changes_nothing(name, traced):
    """Without a cache every pass shows the whole sequence; what a token gets is the same."""
    model, edit = build("gemma2"), verbs(traced)[name]
    with sf.hooked(model, edit):
        cached = bare_generate(model, batch_of())
    with sf.hooked(model, edit):
        anew = bare_generate(model, batch_of(), use_cache=False)
    assert torch.equal(cached, anew)


def test_a_sweep_gives_each_what_it_gives_alone(traced):
    """Several side by side in one batch: rows of the batch are not numbers of prompts."""
    settings = verbs(traced)
    found = sf.sweep(traced, RAGGED, settings, max_new_tokens=NEW, batch_size=20)
    for name, edit in settings.items():
        alone = sf.run(traced, RAGGED, edit, max_new_tokens=NEW)
        assert found[name].completions == alone.completions, name
        torch.testing.assert_close(found[name].logits, alone.logits, atol=1e-4, rtol=1e-4)
        assert [r.tokens for r in found[name].receipt.rows] == [
            r.tokens for r in alone.receipt.rows
        ]
    probe = sf.Probe(V) | sf.Probe(V, reduce="last")
    readings = sf.sweep(traced, RAGGED, {0: None, 1: probe}, max_new_tokens=2)[1].readings
    assert readings[0].starts.tolist() == [3, 0, 2] and readings[1].starts is None


# ---------------------------------------------------------------- Schedule


def steps_of(out: sf.results.Run, latents) -> torch.Tensor:
    """[prompts, columns]: what an edit between two probes of a direction did."""
    before, after = (r.values[..., 0] for r in out.readings)
    return after - before


def test_a_schedule_counts_each_rows_own_generated_tokens(traced):
    fade = sf.values.Schedule([5.0, 3.0, 2.0], prompt=1.0)
    step = sf.Probe(V) | sf.Clamp(V, add=fade) | sf.Probe(V)
    for size in (3, 1):
        out = sf.run(traced, RAGGED, step, max_new_tokens=6, batch_size=size)
        moved, mask = steps_of(out, V), out.readings[0].mask[..., 0]
        for row, length in enumerate(LENGTHS):
            wanted = torch.tensor([1.0] * length + [5.0, 3.0, 2.0, 2.0, 2.0])
            torch.testing.assert_close(moved[row][mask[row]], wanted, atol=1e-4, rtol=1e-4)


def test_the_prompt_takes_the_first_value_unless_told(traced):
    step = sf.Probe(V) | sf.Clamp(V, add=sf.values.Schedule([5.0, 3.0])) | sf.Probe(V)
    out = sf.run(traced, RAGGED, step)
    torch.testing.assert_close(
        steps_of(out, V)[out.readings[0].mask[..., 0]], torch.full((13,), 5.0)
    )


def test_a_schedule_has_a_value_a_latent_and_its_columns_follow_them(traced):
    a, b = sf.Neurons("resid_post.0", D).latents([3, 5]), V.latents()
    fade = sf.values.Schedule([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], prompt=[0.0, 0.5, 0.25])
    for latents, order in ((a | b, [0, 1, 2]), (b | a, [0, 1, 2])):
        probe = sf.Probe(latents)
        out = sf.run(traced, RAGGED, probe | sf.Clamp(latents, add=fade) | probe, max_new_tokens=3)
        moved = out.readings[1].values - out.readings[0].values
        last = moved[:, -1][:, order]
        torch.testing.assert_close(
            last, torch.tensor([[10.0, 20.0, 30.0]]).expand(3, 3), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            moved[:, 5], torch.tensor([[0.0, 0.5, 0.25]]).expand(3, 3), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["value", "scale", "add"])
def test_a_constant_schedule_is_the_plain_number_bit_for_bit(name, dtype):
    nn, latents = wrapped(build("llama", dtype)), sae_latents()
    plain = sf.Clamp(latents, **{name: 0.7})
    scheduled = sf.Clamp(latents, **{name: sf.values.Schedule([0.7, 0.7])})
    a, b = (sf.run(nn, RAGGED, edit, max_new_tokens=NEW) for edit in (plain, scheduled))
    assert torch.equal(a.logits, b.logits)
    assert a.completions == b.completions
    assert a.receipt.rows[0].largest == b.receipt.rows[0].largest


def test_a_schedule_in_a_loop_of_ones_own(traced):
    """Each pass decides on its own: the step is known from the prompt's length."""
    edit = sf.Clamp(V, add=sf.values.Schedule([8.0, -8.0, 4.0], prompt=1.0))
    with traced.generate(max_new_tokens=NEW, do_sample=False) as tracer:
        with tracer.invoke(batch_of()):
            for number in tracer.iter[0:NEW]:
                edit(traced, step=number)
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    assert torch.equal(tokens[:, -NEW:], generate(traced, batch_of(), edit)[0])


# ---------------------------------------------------------------- Patch


def test_pinning_a_whole_site_restores_the_clean_run(traced):
    """Activation patching: with all of resid_post.1 as it was, nothing upstream matters."""
    site = sf.Neurons("resid_post.1", D)
    clean = sf.run(traced, RAGGED, sf.Probe(site))
    corrupt = sf.Clamp(sf.Direction(unit(9), site="resid_post.0"), add=20.0)
    pinned = corrupt | sf.Ablate(site, to=sf.values.Patch(clean.readings[0]))
    broken = sf.run(traced, RAGGED, corrupt)
    assert (broken.logits - clean.logits).abs().max() > 0.1
    for size in (3, 2, 1):
        out = sf.run(traced, RAGGED, pinned, batch_size=size)
        torch.testing.assert_close(out.logits, clean.logits, atol=2e-4, rtol=1e-4)
        assert out.receipt.rows[1].tokens == 13


def test_a_pin_holds_on_prompt_tokens_alone_and_says_so(traced):
    site = sf.Neurons("resid_post.1", D)
    clean = read(traced, RAGGED, site)
    push = sf.Clamp(V, add=3.0)
    edit = push | sf.Ablate(site, to=sf.values.Patch(clean))
    out = sf.run(traced, RAGGED, edit, max_new_tokens=NEW)
    assert [row.tokens for row in out.receipt.rows] == [13 + 9, 13]
    same = push | sf.Ablate(site, to=sf.values.Patch(clean), where=sf.Tokens.prompt())
    assert sf.run(traced, RAGGED, same, max_new_tokens=NEW).completions == out.completions


def test_a_pin_to_a_generation_holds_on_what_it_generated(traced):
    """Read over prompt and new tokens, pinned where the whole text is shown at once."""
    site = sf.Neurons("resid_post.1", D)
    clean = sf.run(traced, RAGGED, sf.Probe(site), max_new_tokens=NEW)
    corrupt = sf.Clamp(sf.Direction(unit(9), site="resid_post.0"), add=20.0)
    pinned = corrupt | sf.Ablate(site, to=sf.values.Patch(clean.readings[0]))
    text = clean.prompts, clean.completions
    bare = continuation_loss(traced, *text)
    for size in (3, 1):
        loss = continuation_loss(traced, *text, pinned, batch_size=size)
        torch.testing.assert_close(loss, bare, atol=1e-4, rtol=1e-4)
    assert (continuation_loss(traced, *text, corrupt) - bare).abs().max() > 0.05
    out = sf.run(traced, RAGGED, pinned, max_new_tokens=NEW)
    assert out.completions == clean.completions
    assert out.receipt.rows[1].tokens == 13 + 9


def test_tokens_that_the_probe_did_not_select_are_not_pinned(traced):
    last = read(traced, RAGGED, V, where=sf.Tokens.last(2))
    shifted = sf.Clamp(V, add=5.0)
    probe = sf.Probe(V)
    out = sf.run(traced, RAGGED, shifted | sf.Clamp(V, sf.values.Patch(last)) | probe)
    bare = read(traced, RAGGED, V)
    moved = (out.readings[0].values - bare.values)[..., 0]
    expected = torch.full_like(moved, 5.0)
    expected[:, -2:] = 0.0  # pinned back
    real = bare.mask[..., 0]
    torch.testing.assert_close(moved[real], expected[real], atol=1e-4, rtol=1e-4)
    assert out.receipt.rows[1].tokens == 6


def test_columns_are_found_by_latent_in_any_order_among_others(traced):
    sae = make_sae()
    clean = read(traced, RAGGED, sae.latents([30, 3, 9, 40]) | V.latents())
    edit = sf.Ablate(V.latents() | sae.latents([40, 30]), to=sf.values.Patch(clean))
    out = sf.run(traced, RAGGED, edit)
    assert out.receipt.rows[0].largest < 1e-5  # the model's own values


def test_a_pin_leaves_a_latent_alone_where_it_alone_was_not_read(traced):
    """Masks may differ by latent, in readings put together from several probes."""
    two = sf.Neurons("resid_post.1", D).latents([3, 5])
    read_once = read(traced, RAGGED, two)
    mask = read_once.mask.clone()
    mask[:, :-1, 1] = False  # of the second latent only the last token is known
    mask[:, -1, 0] = False
    values = torch.full_like(read_once.values, 7.0)
    pin = sf.values.Patch(sf.results.Readings(two, values, mask, read_once.starts))
    out = sf.run(traced, RAGGED, sf.Probe(two) | sf.Ablate(two, to=pin) | sf.Probe(two))
    before, after = (r.values for r in out.readings)
    real = read_once.mask
    wanted = torch.where(mask, 7.0, before)
    torch.testing.assert_close(after[real], wanted[real], atol=1e-5, rtol=1e-5)
    assert torch.equal(after[real & ~mask], before[real & ~mask])
    row = out.receipt.rows[0]
    assert (row.tokens, row.changed) == (13, 13)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    size=st.integers(1, 4),
    new=st.integers(0, 3),
    rule=st.sampled_from([None, sf.Tokens.last(2), ~sf.Tokens.first(1), sf.Tokens.generated()]),
    by_hooks=st.booleans(),
)
def test_a_pin_of_a_runs_own_readings_is_a_no_op(lengths, size, new, rule, by_hooks):
    model = build("llama")
    nn, sae = wrapped(model), make_sae()
    prompts = [[4 + (7 * n + i) % 90 for i in range(m)] for n, m in enumerate(lengths)]
    clean = sf.run(nn, prompts, sf.Probe(sae.latents([3, 40]), where=rule), max_new_tokens=new,
                   batch_size=size)  # fmt: skip
    edit = sf.Ablate(sae.latents([40, 3]), to=sf.values.Patch(clean.readings[0]))
    if by_hooks:
        with torch.no_grad(), sf.hooked(model, edit) as log:
            logits = forward(model, batch_of(prompts))[:, -1]
        receipt = edit.receipt(log)
    else:
        out = sf.run(nn, prompts, edit, max_new_tokens=new, allow_unfired=True)
        logits, receipt = out.logits, out.receipt
        assert receipt.rows[0].tokens == int(clean.readings[0].mask[..., 0].sum())
    torch.testing.assert_close(logits, clean.logits, atol=1e-5, rtol=1e-5)
    assert receipt.rows[0].largest < 1e-5


def test_readings_say_where_each_prompt_starts(traced):
    inline = sf.Probe(V)
    for size in (3, 2, 1):
        out = sf.run(traced, RAGGED, inline, max_new_tokens=2, batch_size=size)
        assert out.readings[0].starts.tolist() == [3, 0, 2]
    model = build("gemma2")
    with sf.hooked(model, inline) as log:
        bare_generate(model, batch_of())
    assert inline.readings(log)[0].starts.tolist() == [3, 0, 2]
    assert sf.run(traced, RAGGED, sf.Probe(V, reduce="max")).readings[0].starts is None


# ---------------------------------------------------------------- Resample


def mix(word: int) -> int:
    word = (word + 0x9E3779B9) % 2**32
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) % 2**32
    word = ((word ^ (word >> 15)) * 0x735A2D97) % 2**32
    return word ^ (word >> 15)


def row_for(seed: int, prompt: int, position: int, n: int) -> int:
    return mix(mix(mix(seed) ^ prompt) ^ position) % n


@pytest.mark.parametrize("size", [3, 2, 1])
def test_each_token_takes_the_joint_row_drawn_for_its_prompt_and_position(size, traced):
    a, b = sf.Neurons("resid_post.0", D).latents([3, 5]), V.latents()
    rows = torch.arange(30.0).reshape(10, 3)
    probe, seed = sf.Probe(a | b), 2**32 - 5
    out = sf.run(traced, RAGGED, sf.Ablate(a | b, to=sf.values.Resample(rows, seed=seed)) | probe,
                 max_new_tokens=3, batch_size=size)  # fmt: skip
    values, mask = out.readings[0].values, out.readings[0].mask[..., 0]
    for prompt, length in enumerate(LENGTHS):
        wanted = rows[[row_for(seed, prompt, p, 10) for p in range(length + 2)]]
        torch.testing.assert_close(values[prompt][mask[prompt]], wanted, atol=1e-4, rtol=1e-4)


def test_the_draw_is_even_and_another_seed_is_another_draw():
    counts = torch.zeros(7)
    for prompt in range(30):
        for position in range(70):
            counts[row_for(0, prompt, position, 7)] += 1
    assert (counts - 300).abs().max() < 75  # 4.7 standard deviations of the fair draw
    v = V.latents()
    nn, rows = wrapped(build()), torch.linspace(-5, 5, 50)[:, None]
    logits = [
        sf.run(nn, RAGGED, sf.Ablate(v, to=sf.values.Resample(rows, seed=s))).logits
        for s in (0, 0, 1)
    ]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_only_tokens_at_which_all_latents_were_selected_are_drawn_from(traced):
    latents = V.latents() | sf.Neurons("resid_post.0", D).latents([1])
    values = torch.tensor([[[1.0, 1.0], [2.0, 9.0], [9.0, 2.0]]])
    mask = torch.tensor([[[True, True], [True, False], [False, True]]])
    given = sf.results.Readings(latents, values, mask, torch.zeros(1, dtype=torch.long))
    out = sf.run(
        traced, RAGGED, sf.Ablate(latents, to=sf.values.Resample(given)) | sf.Probe(latents)
    )
    seen = out.readings[0]
    torch.testing.assert_close(seen.values[seen.mask], torch.ones(26), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- where else they are taken


def test_values_work_as_a_baseline_in_any_batches(traced):
    latents = make_sae().latents()
    some = make_sae(layer=0, seed=4).latents([1, 4, 9])
    clean = read(traced, RAGGED, some)
    for value in (
        sf.values.Patch(clean),
        sf.values.Resample(clean, seed=2),
        sf.values.Schedule([2.0, 1.0]),
    ):
        baseline = sf.Clamp(some, add=3.0) | sf.Ablate(some, to=value)
        wanted = sf.run(traced, RAGGED, baseline).logits
        found = [
            sf.Attribute(latents, sf.metrics.logit(7), baseline=baseline)(
                traced, RAGGED, batch_size=n
            )
            for n in (3, 1)
        ]
        for attribution in found:
            torch.testing.assert_close(attribution.baseline, wanted[:, 7], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[0].score, found[1].score, atol=1e-4, rtol=1e-3)


def test_bounds_and_conditions_meet_values(traced):
    """Where a pin knows nothing its bounds do nothing either."""
    last = read(traced, RAGGED, V, where=sf.Tokens.last(1))
    out = sf.run(
        traced, RAGGED, sf.Probe(V) | sf.Clamp(V, sf.values.Patch(last), low=50.0) | sf.Probe(V)
    )
    before, after = (r.values[..., 0] for r in out.readings)
    real = out.readings[0].mask[..., 0]
    earlier = real.clone()
    earlier[:, -1] = False
    assert torch.equal(before[earlier], after[earlier])
    torch.testing.assert_close(after[:, -1], torch.full((3,), 50.0), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- orthogonal


def projected(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """X less its projection on the rows' span, by the pseudo-inverse."""
    rows = rows.double()
    return x - x @ torch.linalg.pinv(rows) @ rows


def exact(architecture="standard", seed=0, **options):
    return make_sae(architecture, seed=seed, dtype=torch.float64, **options)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("repeated", [False, True])
def test_orthogonal_ablation_is_the_projection(architecture, repeated):
    model = build("llama", torch.float64)
    sae = exact(architecture)
    if repeated:  # five rows of rank three
        tensors = tensors_for(architecture, dtype=torch.float64)
        tensors["W_dec"][17] = tensors["W_dec"][3] * -2
        tensors["W_dec"][8] = tensors["W_dec"][3] + tensors["W_dec"][40]
        sae = sf.SAE.from_tensors(tensors, site="resid_post.1", architecture=architecture, k=7)
    indices = [3, 40, 17, 8, 22]
    edit = sf.Ablate(sae.latents(indices).span())
    rows = sae.directions(indices)
    batch = batch_of()
    after = []
    blocks_of(model)[2].register_forward_pre_hook(lambda _, args: after.append(args[0].clone()))
    bare = forward(model, batch)
    with torch.no_grad(), sf.hooked(model, edit):
        forward(model, batch)
    with torch.no_grad(), sf.hooked(model, edit | edit):
        forward(model, batch)
    real = batch["attention_mask"].bool()
    x, once, twice = after
    torch.testing.assert_close(once[real], projected(x, rows)[real], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(twice[real], once[real], atol=1e-12, rtol=1e-12)
    assert (once[real] @ rows.T).abs().max() < 1e-12
    assert torch.equal(once[~real], x[~real])
    assert bare.dtype == torch.float64


def test_it_acts_where_the_latents_are_zero_and_zero_ablation_does_not(traced):
    sae = make_sae()
    x = sf.Neurons("resid_post.1", D)
    rarest = read(traced, RAGGED, sae).active().argsort()[:2]
    silent = sae.latents(rarest)
    zero, orthogonal = sf.Ablate(silent, to="zero"), sf.Ablate(silent.span())
    assert sf.run(traced, RAGGED, zero).receipt.rows[0].changed < 13
    out = sf.run(traced, RAGGED, sf.Probe(x) | orthogonal | sf.Probe(x))
    before, after = (r.values[r.mask].reshape(-1, D) for r in out.readings)
    rows = sae.directions(silent.parts[0][1])
    assert (before @ rows.T).abs().max() > 0.1
    assert (after @ rows.T).abs().max() < 1e-5
    assert out.receipt.rows[0].changed == 26


def test_dictionaries_of_one_site_span_one_space(traced):
    """Taken apart each would put back a part along the other."""
    a, b = exact(seed=1), exact(seed=2)
    chosen = a.latents([3, 5, 9]) | b.latents([2, 4])
    nn = wrapped(build("llama", torch.float64))
    x = sf.Neurons("resid_post.1", D)
    out = sf.run(nn, RAGGED, sf.Probe(x) | sf.Ablate(chosen.span()) | sf.Probe(x))
    before, after = (r.values[r.mask].reshape(-1, D) for r in out.readings)
    rows = torch.cat([a.directions([3, 5, 9]), b.directions([2, 4])])
    torch.testing.assert_close(after, projected(before, rows), atol=1e-6, rtol=1e-6)


def test_different_default_rules_cannot_share_a_span(traced):
    chosen = make_sae(seed=1).latents([0]) | make_sae(seed=2, excluded=(5,)).latents([0])
    with pytest.raises(sf.errors.LatentError, match=r"skip different tokens.*where="):
        sf.run(traced, RAGGED, sf.Ablate(chosen.span()))
    sf.run(traced, RAGGED, sf.Ablate(chosen.span(), where=sf.Tokens.all()))


def test_the_dictionarys_own_rule_holds_and_a_transcoder_acts_where_it_writes(traced):
    first = batch_of()["input_ids"][1, 0].item()
    skipping = make_sae("transcoder", excluded=(first,))
    indices = [3, 40, 17]
    edit = sf.Ablate(skipping.latents(indices).span())
    out = sf.Neurons("mlp_out.1", D)
    done = sf.run(traced, RAGGED, sf.Probe(out) | edit | sf.Probe(out))
    before, after = (r.values for r in done.readings)
    rows = skipping.directions(indices)
    real = done.readings[0].mask[..., 0]
    acted = real & (batch_of()["input_ids"] != first)
    assert done.receipt.rows[0].tokens == 12 == int(acted.sum())
    torch.testing.assert_close(
        after[acted], projected(before.double(), rows).float()[acted], atol=1e-5, rtol=1e-5
    )
    assert torch.equal(after[real & ~acted], before[real & ~acted])


def test_more_latents_than_dimensions_leave_nothing(traced):
    x = sf.Neurons("resid_post.1", D)
    edit = sf.Ablate(make_sae().latents().span())
    after = sf.run(traced, RAGGED, edit | sf.Probe(x)).readings[0]
    assert after.values[after.mask].abs().max() < 1e-5


def test_orthogonal_to_the_error_term_is_refused(traced):
    with pytest.raises(sf.errors.LatentError, match="another at every token"):
        sf.run(traced, RAGGED, sf.Ablate(make_sae().error().latents().span()))


# ---------------------------------------------------------------- conditions


def moved_where(nn, when, latents=V, new=NEW) -> tuple[torch.Tensor, torch.Tensor, sf.results.Run]:
    """Which tokens an edit with this condition moved, which are real, and the run."""
    step = sf.Probe(latents) | sf.Clamp(latents, add=3.0, when=when) | sf.Probe(latents)
    out = sf.run(nn, RAGGED, step, max_new_tokens=new)
    return (steps_of(out, latents).abs() > 1), out.readings[0].mask[..., 0], out


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("bounds", [(18.0, None), (None, 16.5), (16.0, 17.6)])
def test_a_scorer_decides_at_the_token_or_for_the_rest(bounds, hold, traced):
    above, below = bounds
    when = sf.When(norm, site="resid_post.0", above=above, below=below, hold=hold)
    x = sf.Neurons("resid_post.0", D)
    moved, real, out = moved_where(traced, when)
    again = sf.run(
        traced, RAGGED, sf.Clamp(V, add=3.0, when=when) | sf.Probe(x), max_new_tokens=NEW
    )
    score = again.readings[0].values.norm(dim=-1)
    hit = torch.ones_like(real)
    hit &= True if above is None else score > above
    hit &= True if below is None else score < below
    hit &= real
    if hold:
        hit = hit.int().cummax(1).values.bool() & real
    assert 0 < int(hit.sum()) < int(real.sum())
    assert torch.equal(moved & real, hit)
    assert out.receipt.rows[0].tokens == int(hit.sum())


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("match", ["any", "all"])
def test_any_or_all_of_latents_of_several_dictionaries(match, hold, traced):
    """Held only from where all are met at one token, though one was met earlier."""
    a, b = make_sae(layer=0, seed=1), make_sae(layer=1, seed=2)
    latents = b.latents([0, 7]) | a.latents([1, 5])  # the later site first
    when = sf.When(latents, above=-0.5 if match == "all" else 1.5, match=match, hold=hold)
    low = sf.Neurons("resid_post.0", D).latents([0, 3]) | sf.Neurons("resid_post.1", D).latents([5])
    when = sf.When(low, above=-0.2 if match == "all" else 0.3, match=match, hold=hold)
    v = sf.Direction(unit(5), site="resid_post.2")
    moved, real, _ = moved_where(traced, when, v)
    seen = (
        sf.run(traced, RAGGED, sf.Probe(low) | sf.Clamp(v, add=3.0, when=when), max_new_tokens=NEW)
        .readings[0]
        .values
    )
    inside = seen > when.above
    hit = (inside.all(-1) if match == "all" else inside.any(-1)) & real
    hit = hit.int().cummax(1).values.bool() & real if hold else hit
    assert 0 < int(hit.sum()) < int(real.sum())
    assert torch.equal(moved & real, hit)


def test_a_condition_is_read_before_its_step_writes_anything(traced):
    """Two dictionaries of one site in one edit: the second is asked what the first was asked."""
    a, b = sf.Neurons("resid_post.1", D), sf.Neurons("resid_post.1", D)
    when = sf.When(a.latents([0]), above=0.0)
    edit = sf.Clamp(a.latents([0]) | b.latents([1]), -9.0, when=when)
    probe = sf.Probe(a.latents([0, 1]))
    out = sf.run(traced, RAGGED, probe | edit | probe)
    before, after = (r.values for r in out.readings)
    real = out.readings[0].mask[..., 0]
    met = (before[..., 0] > 0) & real
    assert 0 < int(met.sum()) < int(real.sum())
    torch.testing.assert_close(after[met], torch.full_like(after[met], -9.0))
    assert torch.equal(after[real & ~met], before[real & ~met])


def test_a_scorer_sees_float32_without_a_graph(traced):
    seen = []

    def spy(x):
        seen.append((x.dtype, x.requires_grad, torch.is_grad_enabled(), tuple(x.shape)))
        return x[..., 0]

    model = build("gemma2", torch.bfloat16)
    edit = sf.Clamp(V, add=3.0, when=sf.When(spy, site="resid_post.0", above=-100.0))
    with torch.enable_grad(), sf.hooked(model, edit):
        model(**batch_of())
    assert seen == [(torch.float32, False, False, (3, 6, D))]


def test_a_probe_module_is_a_scorer(traced):
    probe = torch.nn.Sequential(torch.nn.Linear(D, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    def score(x):
        return probe(x).squeeze(-1)

    when = sf.When(score, site="resid_post.0", above=0.1)
    moved, real, _ = moved_where(traced, when, new=1)
    x = read(traced, RAGGED, sf.Neurons("resid_post.0", D)).values
    with torch.no_grad():
        assert torch.equal(moved & real, (score(x) > 0.1) & real)
    with pytest.raises(ValueError, match=r"shape \(3, 6, 1\).*wanted \(3, 6\).*squeeze"):
        sf.run(traced, RAGGED, sf.Ablate(V, when=sf.When(probe, site="resid_post.0")))
    with pytest.raises(ValueError, match="wanted \\(3, 6\\)"):
        sf.run(traced, RAGGED, sf.Ablate(V, when=sf.When(torch.mean, site="resid_post.0")))
    assert "When(Sequential, site='resid_post.0', above=0.0)" in repr(
        sf.When(probe, site="resid_post.0")
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((norm,), {}, "`site` is None"),
        ((V,), {"site": "resid_post.0"}, "none for latents"),
        ((V,), {"above": 2.0, "below": 1.0}, "above < below"),
        ((V,), {"above": float("nan")}, "NaN"),
        ((V,), {"above": "high"}, "NaN"),
        ((V,), {"match": "most"}, '"any" or "all"'),
        (("resid",), {}, "`latents` is str"),
    ],
)
def test_a_condition_that_cannot_be_meant_is_refused(arguments, options, message):
    with pytest.raises(sf.errors.LatentError, match=message):
        sf.When(*arguments, **options)


def test_a_scorer_that_is_read_too_late_or_nowhere_is_refused(traced):
    for site, message in (("resid_post.2", "no later than resid_post.1"), ("resid_post.9", "9")):
        edit = sf.Ablate(V, when=sf.When(norm, site=site))
        with pytest.raises(sf.errors.SiteError, match=message):
            sf.run(traced, RAGGED, edit)
    with pytest.raises(sf.errors.LatentError, match="held condition"):
        sf.Ablate(V, when=sf.When(norm, site="resid_post.0", hold=True))(traced, step=0)


# ---------------------------------------------------------------- topk: frozen or reselect


def dense(sae: sf.SAE, x: torch.Tensor, change, signed: bool, how: str) -> torch.Tensor:
    """X' by whole encodes and decodes, as sae-lens has them; ``change`` maps the edited f."""
    t = {name: sae._weights.read(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    sizes = t["W_dec"].norm(dim=1) if sae.rescale else torch.ones(len(t["W_dec"])).double()
    scale = 1.0
    z = x
    if sae.norm == "layer_norm":
        z = x - x.mean(-1, keepdim=True)
        scale = z.std(-1, keepdim=True)
        z = z / (scale + 1e-5)
    h = ((z - t["b_dec"] if sae.subtract_bias else z) @ t["W_enc"] + t["b_enc"]) * sizes
    h = h if signed else h.relu()

    def select(h):
        rank = h.abs() if signed else h
        kept = torch.zeros_like(h, dtype=torch.bool).scatter(-1, rank.topk(sae.k).indices, True)
        return torch.where(kept, h, 0.0) if signed else torch.where(kept, h, 0.0).relu()

    f = select(h)
    if how == "frozen":
        new = f.clone()
        new[..., CHOSEN] = change(f[..., CHOSEN])
    else:
        competing = h.clone()
        competing[..., CHOSEN] = change(h[..., CHOSEN])
        new = select(competing)
    return x + ((new - f) / sizes) @ t["W_dec"] * scale


CHANGES = {
    "ablate": (sf.Ablate, lambda f: f * 0),
    "set": (lambda s: sf.Clamp(s, 0.9), lambda f: f * 0 + 0.9),
    "scale": (lambda s: sf.Clamp(s, scale=1.7), lambda f: f * 1.7),
    "add": (lambda s: sf.Clamp(s, add=0.4), lambda f: f + 0.4),
    "invert": (lambda s: sf.Clamp(s, scale=-1.0), lambda f: -f),
}
KINDS = [
    ("topk", {}),
    ("topk", {"rescale": True}),
    ("topk", {"norm": "layer_norm"}),
    ("abstopk", {}),
    ("abstopk", {"subtract_bias": False}),
]


@pytest.mark.parametrize("how", ["frozen", "reselect"])
@pytest.mark.parametrize(("architecture", "options"), KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_topk_kinds_equal_the_dense_formulas(name, architecture, options, how):
    model, batch = build("llama", torch.float64), batch_of()
    sae = exact(architecture, **options)
    make, change = CHANGES[name]
    real = batch["attention_mask"].bool().unsqueeze(-1)

    def by_hand(x):
        return torch.where(real, dense(sae, x, change, architecture == "abstopk", how), x)

    with raw_hooks(model, {1: by_hand}):
        wanted = forward(model, batch)
    with torch.no_grad(), sf.hooked(model, make(replace(sae.latents(CHOSEN), written=how))):
        found = forward(model, batch)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    assert (wanted - forward(model, batch)).abs().max() > 1e-4


def test_reselect_lets_others_in_and_frozen_does_not(traced):
    """What is written besides the edited latents' own change; the receipt counts these alone."""
    sae = make_sae("topk")
    x = sf.Neurons("resid_post.1", D)
    runs = {
        how: sf.run(traced, RAGGED, sf.Probe(x) | sf.Ablate(latents) | sf.Probe(x))
        for how, latents in {
            "frozen": sae.latents(CHOSEN),
            "reselect": sae.latents(CHOSEN).reselect(),
        }.items()
    }
    a, b = (run.receipt.rows[0] for run in runs.values())
    assert (a.tokens, a.changed, a.largest) == (b.tokens, b.changed, b.largest)
    assert a.changed > 0
    moved = [run.readings[1].values - run.readings[0].values for run in runs.values()]
    assert (moved[0] - moved[1]).abs().max() > 0.1


def test_reselecting_nothing_is_bit_for_bit_the_bare_model():
    for dtype in (torch.float32, torch.bfloat16):
        model, batch = build("gemma2", dtype), batch_of()
        bare = forward(model, batch)
        for architecture in ("topk", "abstopk"):
            latents = sae_latents(architecture)
            edits = (
                sf.Clamp(latents.reselect(), scale=1.0),
                sf.Clamp(latents.reselect(), add=0.0),
            )
            for edit in edits:
                with torch.no_grad(), sf.hooked(model, edit):
                    assert torch.equal(forward(model, batch), bare)


def test_reselect_with_active_only_moves_none_that_was_not_selected():
    model, batch = build("llama", torch.float64), batch_of()
    sae = exact("topk")
    edit = sf.Clamp(sae.latents(CHOSEN).reselect(), 5.0, active_only=True)
    after = []
    blocks_of(model)[2].register_forward_pre_hook(lambda _, args: after.append(args[0].clone()))
    forward(model, batch)
    x = after.pop()
    f = sae.encode(x)
    with torch.no_grad(), sf.hooked(model, edit) as log:
        forward(model, batch)
    new = f.clone()  # those selected win with 5; nobody else loses a place
    new[..., CHOSEN] = torch.where(f[..., CHOSEN] > 0, 5.0, 0.0).double()
    wanted = x + (new - f) @ sae.directions()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(after[0][real], wanted[real], atol=1e-10, rtol=1e-10)
    assert edit.receipt(log).rows[0].changed == int((f[..., CHOSEN] > 0)[real].sum()) > 0


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_reselect_is_refused_where_nothing_is_selected(architecture, traced):
    edit = sf.Ablate(sae_latents(architecture).reselect())
    with pytest.raises(sf.errors.LatentError, match=r"wanted a topk or abstopk dictionary.*frozen"):
        sf.run(traced, RAGGED, edit)
    generic = sf.dictionaries.Function(lambda x: x, torch.eye(D), site="resid_post.1", width=D)
    for other in (generic.latents([0]), V.latents(), make_sae("topk").error().latents()):
        with pytest.raises(sf.errors.LatentError, match="topk or abstopk"):
            sf.run(traced, RAGGED, sf.Clamp(other.reselect(), 1.0))


def test_reselect_needs_all_directions_and_says_so(traced):
    """An excerpt from a file holds the latents that were saved, and any other might enter."""
    some = Excerpt.of(make_sae("topk"), [tuple(CHOSEN)]).latents()
    sf.run(traced, RAGGED, sf.Ablate(some))
    with pytest.raises(sf.errors.LatentError, match=r"holds 6 of its directions.*frozen"):
        sf.run(traced, RAGGED, sf.Ablate(some.reselect()))


# ---------------------------------------------------------------- what is refused


def reading(values, mask=None, latents=None, starts=True) -> sf.results.Readings:
    values = torch.as_tensor(values)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    column = torch.zeros(len(values), dtype=torch.long) if starts else None
    return sf.results.Readings(V.latents() if latents is None else latents, values, mask, column)


NAN = torch.full((1, 2, 1), torch.nan)
BAD = {
    "no steps": (lambda: sf.values.Schedule([]), "at least one"),
    "steps not finite": (lambda: sf.values.Schedule([1.0, float("inf")]), "not finite"),
    "ragged steps": (lambda: sf.values.Schedule([[1.0], [1.0, 2.0]]), "1 or 2 dimensions"),
    "steps of text": (lambda: sf.values.Schedule("fade"), "`values` is str"),
    "steps by prompt": (lambda: sf.values.Schedule(torch.ones(2, 3, 1)), "1 or 2 dimensions"),
    "prompt not finite": (
        lambda: sf.values.Schedule([1.0], prompt=float("nan")),
        "`prompt`.*not finite",
    ),
    "steps for other latents": (
        lambda: sf.Clamp(V, add=sf.values.Schedule([[1.0, 2.0]])),
        "Clamp: `add` is a Schedule whose values are for 2 latents, wanted for 1",
    ),
    "prompt for other latents": (
        lambda: sf.Clamp(V, sf.values.Schedule([1.0], prompt=[1.0, 2.0])),
        "whose prompt are for 2",
    ),
    "pin of a tensor": (lambda: sf.values.Patch(torch.ones(1, 2, 1)), "`readings` is Tensor"),
    "pin of a reduced reading": (
        lambda: sf.values.Patch(reading(torch.ones(2, 1, 1), starts=False)),
        "without starts.*reduce",
    ),
    "pin not finite": (lambda: sf.values.Patch(reading(NAN)), "not finite"),
    "pin of other latents": (
        lambda: sf.Ablate(
            make_sae().latents([4]), to=sf.values.Patch(reading(torch.ones(1, 2, 1)))
        ),
        r"Ablate, to=Patch.*without latent 4 of resid_post.1",
    ),
    "draw from nothing": (lambda: sf.values.Resample(torch.ones(0, 1)), "at least one"),
    "draw from a line": (lambda: sf.values.Resample(torch.ones(4)), "2 dimensions"),
    "draw not finite": (lambda: sf.values.Resample(NAN[0]), "not finite"),
    "draw from a reduced reading": (
        lambda: sf.values.Resample(reading(torch.ones(2, 1, 1), starts=False)),
        "Resample: `activations` is Readings without starts.*reduce",
    ),
    "draw from readings not finite": (lambda: sf.values.Resample(reading(NAN)), "not finite"),
    "draw from no token": (
        lambda: sf.Ablate(
            V, to=sf.values.Resample(reading(torch.ones(1, 2, 1), torch.zeros(1, 2, 1).bool()))
        ),
        "at least one row",
    ),
    "draw from a list": (lambda: sf.values.Resample([[1.0]]), "`activations` is list"),
    "draw with a float": (lambda: sf.values.Resample(torch.ones(2, 1), seed=1.5), "`seed` is 1.5"),
    "draw with a negative": (lambda: sf.values.Resample(torch.ones(2, 1), seed=-1), "from 0"),
    "draw for other latents": (
        lambda: sf.Clamp(V, add=sf.values.Resample(torch.ones(5, 2))),
        r"Clamp: `add` is Resample from \[5, 2\]",
    ),
    "draw from other latents": (
        lambda: sf.Clamp(make_sae(), sf.values.Resample(reading(torch.ones(1, 2, 1)))),
        "without latent 0",
    ),
    "readings alone": (
        lambda: sf.Ablate(V, to=reading(torch.ones(1, 2, 1))),
        r"to=readings.mean\(\)\), or to=Patch\(readings\), or to=Resample",
    ),
    "an imaginary value": (
        lambda: sf.Clamp(V, torch.ones(1, dtype=torch.complex64)),
        r"`value` is Tensor of shape \(1,\), torch.complex64, wanted a finite real number",
    ),
    "a value of python's own": (lambda: sf.Clamp(V, add=1 + 2j), "`add` is complex"),
    "a value a latent too many": (
        lambda: sf.Clamp(V, [1.0, 2.0]),
        r"`value` is list of shape \(2,\), 2 values for 1 latents, wanted",
    ),
    "the mean": (lambda: sf.Ablate(V, to="mean"), r"readings.mean\(\)"),
    "a bound": (lambda: sf.Clamp(V, low=sf.values.Schedule([1.0])), "bounds do not change"),
    "a way of writing": (
        lambda: sf.Latents(V.latents().parts, "thawed"),
        '"frozen" or "reselect" or "span"',
    ),
    "both": (lambda: sf.Ablate(V.latents().span() | V.latents().reselect()), "in the same way"),
    "a value in a span": (lambda: sf.Ablate(V.latents().span(), to=1.0), "wanted no value"),
    "a span set": (lambda: sf.Clamp(V.latents().span(), 1.0), r"span\(\) belongs to Ablate"),
    "a span read": (lambda: sf.Probe(V.latents().span()), r"span\(\) belongs to Ablate"),
    "a condition on a span": (lambda: sf.When(V.latents().span()), "this is no edit"),
    "the old word": (lambda: sf.Ablate(V, to="orthogonal"), r"Ablate\(latents.span\(\)\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_refused(name):
    make, message = BAD[name]
    with pytest.raises(sf.errors.LatentError, match=message):
        make()


def test_values_for_other_prompts_are_refused(traced):
    clean = read(traced, RAGGED, V)
    edit = sf.Ablate(V, to=sf.values.Patch(clean))
    with pytest.raises(sf.errors.LatentError, match="values for 3 prompts"):
        sf.run(traced, RAGGED[:2], edit)
    model = build("gemma2")
    refused = pytest.raises(ValueError, match="3 prompts, and the batch has 2")
    with refused, torch.no_grad(), sf.hooked(model, edit):
        forward(model, batch_of(RAGGED[:2]))


# ---------------------------------------------------------------- as values


def values() -> list:
    some, other = reading(torch.ones(1, 2, 1)), reading(torch.full((1, 2, 1), 2.0))
    return [
        sf.values.Schedule([1.0, 2.0]),
        sf.values.Schedule([1.0, 2.5]),
        sf.values.Schedule([1.0, 2.0], prompt=0.0),
        sf.values.Schedule([[1.0], [2.0]]),
        sf.values.Patch(some),
        sf.values.Patch(other),
        sf.values.Resample(some),
        sf.values.Resample(some, seed=1),
        sf.values.Resample(torch.ones(2, 1)),
        sf.values.Resample(torch.ones(3, 1)),
    ]


def test_equal_values_are_equal_and_others_are_not():
    first, second = values(), values()
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            assert (a == b) is (i == j)
            assert (sf.Ablate(V, to=a) == sf.Ablate(V, to=b)) is (i == j)
        assert hash(a) == hash(second[i])
        assert hash(sf.Ablate(V, to=a)) == hash(sf.Ablate(V, to=second[i]))
    assert sf.Ablate(V.latents().span()) != sf.Ablate(V)
    assert sf.Ablate(V.latents().reselect()) != sf.Ablate(V)
    a, b = (sf.When(norm, site="resid_post.0", above=t) for t in (1.0, 2.0))
    assert a == sf.When(norm, site="resid_post.0", above=1.0) and a != b
    assert len({a, b, sf.When(norm, site="resid_post.0", above=1.0)}) == 2


def test_values_print_as_they_were_made_and_large_ones_by_their_content():
    shown = {repr(value) for value in values()}
    assert len(shown) == len(values())
    assert repr(sf.values.Schedule([[1.0, 0.5]], prompt=2)) == "Schedule([[1.0, 0.5]], prompt=2.0)"
    assert eval(
        repr(sf.values.Schedule([1, 0.7])), {"Schedule": sf.values.Schedule}
    ) == sf.values.Schedule([1, 0.7])
    assert repr(sf.Ablate(V.latents().span())) == "Ablate(Latents(1: resid_post.1 [0]).span())"
    assert repr(sf.Clamp(V.latents().reselect(), 2.0)).endswith("[0]).reselect(), value=2.0)")
    assert repr(sf.Clamp(V, torch.tensor([0.7]))).endswith("value=[0.7])")
    assert repr(sf.values.Patch(reading(torch.ones(1, 2, 1)))).startswith(
        "Patch(<[1, 2, 1] of Latents(1: resid_post.1 [0]), "
    )


def test_a_value_keeps_what_it_was_given():
    """The caller's tensor may change afterwards."""
    steps, rows = torch.tensor([1.0, 2.0]), torch.ones(2, 1)
    schedule, draw = sf.values.Schedule(steps), sf.values.Resample(rows)
    steps += 1
    rows += 1
    assert schedule == sf.values.Schedule([1.0, 2.0])
    assert draw == sf.values.Resample(torch.ones(2, 1))


# ---------------------------------------------------------------- other prompts


def test_a_patch_from_counterfactual_prompts_names_tokens_without_a_value(traced, recwarn):
    site = sf.Neurons("resid_post.1", D)
    short, long = [[1, 5, 6], [1, 7, 8]], [[1, 9, 10], [1, 7, 8, 11, 12]]
    clean = sf.values.Patch(read(traced, short, site))
    pairs = [[1, 9, 10], [1, 11, 12]]
    taken = sf.run(traced, pairs, sf.Clamp(site, clean))
    torch.testing.assert_close(taken.logits, sf.run(traced, short).logits, atol=2e-4, rtol=1e-4)
    sf.run(traced, long, sf.Clamp(site, clean, where=sf.Tokens.first(3)))
    sf.run(traced, pairs, sf.Clamp(site, clean), max_new_tokens=2)
    assert not [w for w in recwarn if "no value" in str(w.message)]
    said = r"2 tokens of 1 prompts \(prompt 1 the first\) have no value"
    with pytest.warns(UserWarning, match=f"run: {said}"):
        out = sf.run(traced, long, sf.Clamp(site, clean))
    assert out.receipt.rows[0].tokens == 6
    with pytest.warns(UserWarning, match=f"sweep: {said}"):
        sf.sweep(traced, long, {"patched": sf.Clamp(site, clean)})
    with pytest.raises(sf.errors.LatentError, match="values for 2 prompts"):
        sf.run(traced, [*long, [1, 2]], sf.Clamp(site, clean))
