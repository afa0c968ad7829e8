"""run and stream: every pass, seeds, beams, long lists; against plain transformers and hooks."""

from __future__ import annotations

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import (
    EOS,
    RAGGED,
    batch_of,
    build,
    hook_count,
    make_sae,
    raw_hooks,
    tokenizer,
    unit,
    wrapped,
)
from saefeat.generation import Beams, Greedy, Sample
from saefeat.generation.decoding import decoding, seeded
from saefeat.kernel import program as kernel_program
from saefeat.remote import Server

NEW = 5


def direction(layer=1, seed=5) -> sf.Direction:
    return sf.Direction(unit(seed), site=f"resid_post.{layer}")


def push(x: torch.Tensor) -> torch.Tensor:
    """``Clamp(direction(), add=8)`` by hand."""
    return x + 8.0 * unit(5).to(x.dtype)


PUSH = sf.Clamp(direction(), add=8.0)


# ---------------------------------------------------------------- every pass


def test_an_edit_on_some_passes_only_is_an_error(monkeypatch):
    """nnsight's classic: 1 of 6. Provoked by a loop that stops early."""

    class Early:
        def __getitem__(self, wanted):
            return iter(range(1)[wanted])

    nn = wrapped(build("llama"))
    monkeypatch.setattr(kernel_program, "Iterations", Early)
    with pytest.raises(sf.errors.FiringError, match=r"applied to 1 of the 5 forward passes"):
        sf.run(nn, RAGGED, PUSH, max_new_tokens=NEW)
    with pytest.raises(sf.errors.FiringError, match=r"sweep.*applied to 1 of the 5"):
        sf.sweep(nn, RAGGED, {"push": PUSH}, max_new_tokens=NEW)
    out = sf.run(nn, RAGGED, PUSH, max_new_tokens=NEW, allow_unfired=True)
    assert out.receipt.passes == 1
    assert sf.run(nn, RAGGED, max_new_tokens=NEW).receipt.passes == 1  # nothing to miss
    assert sf.run(nn, RAGGED, PUSH).receipt.passes == 1


def test_a_generate_that_goes_around_the_model_is_noticed():
    model = build("llama")
    whole = type(model).generate

    def around(input_ids, attention_mask=None, max_new_tokens=1, **_):
        """The first token by the model, the others by its parts."""
        ids = whole(model, input_ids, attention_mask=attention_mask, max_new_tokens=1)
        for _ in range(max_new_tokens - 1):
            hidden = model.model(input_ids=ids).last_hidden_state[:, -1]
            ids = torch.cat([ids, model.lm_head(hidden).argmax(-1, keepdim=True)], 1)
        return ids

    model.generate = around
    with pytest.raises(sf.errors.FiringError, match="1 of the 5"):
        sf.run(wrapped(model), RAGGED, PUSH, max_new_tokens=NEW)


def test_rows_that_all_stop_early_are_no_missed_passes():
    model = build("llama")
    first = sf.run(wrapped(model), RAGGED[:1], PUSH, max_new_tokens=NEW).completions[0]
    out = sf.run(
        wrapped(model), RAGGED[:1], PUSH, max_new_tokens=NEW, decode=Greedy(stop=(first[1],))
    )
    assert out.completions[0] == first[: first.index(first[1]) + 1]
    assert out.receipt.passes == len(out.completions[0]) < NEW


# ---------------------------------------------------------------- sampling

SAMPLE = {"max_new_tokens": NEW, "decode": Sample(0.9, seed=3)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_seeded_sample_is_that_of_plain_transformers(family):
    model, batch = build(family), batch_of()
    options = {"top_p": 0.95, "top_k": 20}
    cut = Sample(0.9, seed=3, **options)
    out = sf.run(wrapped(model), batch, PUSH, max_new_tokens=NEW, decode=cut)
    with torch.random.fork_rng(), raw_hooks(model, {1: push}):
        torch.manual_seed(decoding(model, NEW, cut).at(0).seed)
        wanted = model.generate(
            **batch, max_new_tokens=NEW, do_sample=True, temperature=0.9, **options
        )
    assert torch.equal(torch.tensor(out.completions), wanted[:, 6:])


def test_seeds_decide_and_nothing_else():
    nn = wrapped(build("llama"))
    first = sf.run(nn, RAGGED, PUSH, **SAMPLE)
    torch.rand(7)
    assert sf.run(nn, RAGGED, PUSH, **SAMPLE).completions == first.completions
    other = sf.run(nn, RAGGED, PUSH, max_new_tokens=NEW, decode=Sample(0.9, seed=4))
    greedy = sf.run(nn, RAGGED, PUSH, max_new_tokens=NEW)
    assert len({first.completions, other.completions, greedy.completions}) == 3
    assert torch.equal(first.logits, greedy.logits)
    twins = sf.run(nn, [RAGGED[0]] * 4, PUSH, **SAMPLE, batch_size=2).completions
    assert len(set(twins)) > 2, "rows and batches draw apart"


def test_the_global_generator_is_left_alone():
    nn = wrapped(build("llama"))
    state = torch.get_rng_state()
    sf.run(nn, RAGGED, PUSH, **SAMPLE)
    assert torch.equal(torch.get_rng_state(), state)

    def broken(module, args, output):
        raise RuntimeError("broken")

    handle = nn._module.model.layers[2].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        sf.run(nn, RAGGED, PUSH, **SAMPLE)
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)


def test_an_edit_without_effect_draws_the_same_sample():
    """So what differs between the edited and the unedited sample is the edit's doing."""
    nn = wrapped(build("llama"))
    bare = sf.run(nn, RAGGED, **SAMPLE).completions
    assert sf.run(nn, RAGGED, sf.Clamp(direction(), add=0.0), **SAMPLE).completions == bare
    late = sf.Clamp(direction(), add=60.0, where=sf.Tokens.generated(2))
    moved = sf.run(nn, RAGGED, late, **SAMPLE).completions
    assert [row[:3] for row in moved] == [row[:3] for row in bare] and moved != bare


def test_no_hidden_top_k():
    """transformers samples from 50 tokens unless told otherwise."""
    model = build("llama")
    model.generation_config.top_k = 1
    hot = {**SAMPLE, "decode": Sample(3.0, seed=3)}
    assert len(set(sf.run(wrapped(model), [RAGGED[0]] * 6, **hot).completions)) > 1


@pytest.mark.parametrize(
    ("decode", "name"),
    [
        (lambda: Sample(0.7), "seed"),
        (lambda: Sample(top_p=0.9), "seed"),
        (lambda: Sample(0.0, seed=0), "temperature"),
        (lambda: Sample(float("nan"), seed=0), "temperature"),
        (lambda: Sample(float("inf"), seed=0), "temperature"),
        (lambda: Sample("hot", seed=0), "temperature"),
        (lambda: Sample(1.0, seed=0, top_p=90), "top_p"),
        (lambda: Sample(1.0, seed=0, top_p=0), "top_p"),
        (lambda: Sample(1.0, seed=0, top_k=0), "top_k"),
        (lambda: Sample(1.0, seed=0, num_beams=0), "num_beams"),
        (lambda: Sample(1.0, seed=-1), "seed"),
        (lambda: Sample(1.0, seed=True), "seed"),
        (lambda: Beams(0), "num_beams"),
        (lambda: Greedy(stop=("w1",)), "stop"),
        (lambda: Sample(seed=0, stop=(-1,)), "stop"),
    ],
)
def test_ways_of_decoding_that_mean_nothing_are_refused_where_they_are_given(decode, name):
    with pytest.raises(sf.SaefeatError, match=f"`{name}`"):
        decode()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"decode": Beams(2), "max_new_tokens": 0}, "decode"),
        ({"decode": Sample(seed=0), "max_new_tokens": 0}, "decode"),
        ({"decode": 0.7}, "decode"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_settings_that_mean_nothing_are_refused(options, name, stream):
    with pytest.raises(sf.SaefeatError, match=f"`{name}`"):
        sf.run(wrapped(build("llama")), RAGGED, **{"max_new_tokens": 2, **options}, stream=stream)


def test_provenance_holds_how_tokens_were_chosen():
    model = build("llama")
    model.generation_config.repetition_penalty = 1.3
    found = sf.run(
        wrapped(model), RAGGED, PUSH, max_new_tokens=NEW, decode=Sample(0.9, seed=3, stop=(7,))
    ).provenance.to_dict()
    generation = found["generation"]
    own = generation.pop("model")
    chosen = {"temperature": 0.9, "top_p": 1.0, "top_k": 0, "seed": 3, "stops": [100, 7]}
    assert generation == {"max_new_tokens": NEW, "num_beams": 1, "batch_size": 32, **chosen}
    assert own["repetition_penalty"] == 1.3


def test_stops_end_rows_for_edits_too():
    """A row that has stopped is filling: neither edited nor counted."""
    nn = wrapped(build("llama"))
    free = sf.run(nn, RAGGED, PUSH, max_new_tokens=NEW)
    stop = free.completions[1][1]
    out = sf.run(nn, RAGGED, PUSH, max_new_tokens=NEW, decode=Greedy(stop=(stop,)))
    for row, wanted in zip(out.completions, free.completions, strict=True):
        assert row == (wanted[: wanted.index(stop) + 1] if stop in wanted else wanted)
    fed = sum(len(row) - 1 for row in out.completions)
    assert out.receipt.rows[0].tokens == 13 + fed


def test_seeding_is_refused_where_it_cannot_be_undone():
    with pytest.raises(sf.errors.ModelError, match="meta"), seeded(3, build("llama").to("meta")):
        pass


# ---------------------------------------------------------------- beams

BEAMS = {"max_new_tokens": NEW, "decode": Beams(3)}
SEARCH = {"max_new_tokens": NEW, "num_beams": 3}


def by_beams(model, batch, **options) -> torch.Tensor:
    return model.generate(**batch, **SEARCH, do_sample=False, **options)[:, 6:]


def ways_with_beams(model, batch, step) -> dict[str, torch.Tensor]:
    nn, found = wrapped(model), {}
    with sf.hooked(model, step):
        found["hooked"] = by_beams(model, batch)
    with sf.hooked(model, step):
        found["hooked, no cache"] = by_beams(model, batch, use_cache=False)
    with nn.generate(**SEARCH, do_sample=False) as tracer:
        with tracer.invoke(batch):
            nnsight.save(step(nn))
        with tracer.invoke():
            found["inline"] = nnsight.save(tracer.result)
    with sf.edit(nn, step).generate(**batch, **SEARCH, do_sample=False) as tracer:
        found["edit"] = nnsight.save(tracer.result)
    found["inline"], found["edit"] = (found[name][:, 6:] for name in ("inline", "edit"))
    rows = sf.run(nn, batch, step, **BEAMS).completions
    assert len({len(row) for row in rows}) == 1
    found["run"] = torch.tensor(rows)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_beams_are_those_of_plain_hooks(family):
    model, batch = build(family), batch_of()
    with raw_hooks(model, {1: push}):
        wanted = by_beams(model, batch)
    assert not torch.equal(wanted, by_beams(model, batch))
    for way, found in ways_with_beams(model, batch, PUSH).items():
        assert torch.equal(found, wanted), way


class WholeSequences:
    """Oracle for rules that look back: no cache, so every pass shows each beam's whole text."""

    def __init__(self, model, selected) -> None:
        self.model, self.selected, self.moved = model, selected, 0

    def see(self, _, args, kwargs):
        self.ids = kwargs["input_ids"]

    def look(self, _, args, kwargs):
        self.x = args[0] if args else kwargs["hidden_states"]

    def edit(self, x):
        mask = self.selected(self.ids, self.x)
        real = (self.ids != 0).cumsum(1) > 0
        self.moved += int((mask & real)[:, 6:].sum())
        return torch.where((mask & real)[..., None], x + 8.0 * unit(5), x)

    def run(self, batch) -> torch.Tensor:
        handles = [
            self.model.register_forward_pre_hook(self.see, with_kwargs=True),
            self.model.model.layers[0].register_forward_pre_hook(self.look, with_kwargs=True),
        ]
        with raw_hooks(self.model, {1: self.edit}):
            found = by_beams(self.model, batch, use_cache=False)
        for handle in handles:
            handle.remove()
        return found


@pytest.mark.parametrize("threshold", [0.6, 0.75, 0.9])
def test_held_conditions_follow_their_beam(threshold):
    model, batch = build("llama"), batch_of()

    def held(ids, x):
        hit = (x @ unit(3) > threshold) & ((ids != 0).cumsum(1) > 0)
        return hit.int().cummax(1).values.bool()

    oracle = WholeSequences(model, held)
    wanted = oracle.run(batch)
    assert oracle.moved
    when = sf.When(sf.Direction(unit(3), site="resid_pre.0"), above=threshold, hold=True)
    step = sf.Clamp(direction(), add=8.0, when=when)
    for way, found in ways_with_beams(model, batch, step).items():
        assert torch.equal(found, wanted), way


@pytest.mark.parametrize("way", ["run", "sweep", "generate", "measure", "hooked"])
def test_logits_that_are_no_numbers_are_refused(way):
    """A clamp that float16 cannot hold: all logits were NaN, the text '', and no word of it."""
    nn = wrapped(build("llama", torch.float16))
    step = sf.Clamp(direction(), 1e6)
    with pytest.raises(
        sf.errors.ModelError, match=f"{'run' if way == 'generate' else way}.*: .*not finite"
    ):
        if way == "sweep":
            sf.sweep(nn, RAGGED, {"bare": None, "huge": step})
        elif way == "measure":
            sf.metrics.measure(nn, RAGGED, sf.logit_diff(5, 6), step)
        elif way == "hooked":
            with torch.no_grad(), sf.hooked(nn, step):
                nn._module(**batch_of())
                nn._module(**batch_of())
        else:
            sf.run(nn, RAGGED, step, max_new_tokens=2 if way == "generate" else 0)


def test_a_word_that_is_never_said_is_no_fault():
    model = build("llama")
    model.lm_head.register_forward_hook(
        lambda m, args, out: out.index_fill(-1, torch.tensor([7]), -torch.inf)
    )
    nn, step = wrapped(model), sf.Clamp(direction(), 1.0)
    assert sf.run(nn, RAGGED).logits[:, 7].isinf().all()
    assert sf.metrics.measure(nn, RAGGED, sf.logit_diff(5, 6)).isfinite().all()
    with torch.no_grad(), sf.hooked(model, step):
        assert model(**batch_of()).logits[..., 7].isinf().all()


def test_rules_over_the_text_follow_their_beam():
    """As chat roles do: between one token and another, wherever the beams have put them."""
    model, batch = build("llama"), batch_of()
    common = by_beams(model, batch).flatten().bincount().topk(6).indices.tolist()
    differed = 0
    for start in common[:3]:
        for stop in common[3:]:
            rule = sf.Tokens(("between", (start,), (stop,)))

            def between(ids, _, start=start, stop=stop):
                mask = torch.zeros_like(ids, dtype=torch.bool)
                for row in range(len(ids)):
                    inside = False
                    for column in range(ids.shape[1]):
                        inside = inside and int(ids[row, column]) != stop
                        mask[row, column] = inside
                        inside = inside or int(ids[row, column]) == start
                return mask

            oracle = WholeSequences(model, between)
            wanted = oracle.run(batch)
            step = sf.Clamp(direction(), add=8.0, where=rule)
            with sf.hooked(model, step):
                assert torch.equal(by_beams(model, batch), wanted)
            out = sf.run(wrapped(model), batch, step, **BEAMS, allow_unfired=True)
            assert torch.equal(torch.tensor(out.completions), wanted)
            differed += not torch.equal(wanted, by_beams(model, batch))
    assert differed


def test_held_conditions_without_a_cache():
    """Tokens before the condition was met stay as they are, pass after pass."""
    model, batch = build("llama"), batch_of()
    when = sf.When(sf.Direction(unit(3), site="resid_pre.0"), above=0.75, hold=True)
    step = sf.Clamp(direction(), add=8.0, when=when)
    options = {"max_new_tokens": NEW, "do_sample": False}
    found = []
    for cached in (True, False):
        with sf.hooked(model, step):
            found.append(model.generate(**batch, **options, use_cache=cached))
    assert torch.equal(*found)


def test_values_by_prompt_reach_every_beam_of_their_prompt():
    model = build("llama")
    nn = wrapped(model)
    values = torch.tensor([[0.0, 2.0], [9.0, -4.0], [-6.0, 0.0]])
    latents = sf.Direction.at_sites(unit(5), sites=["resid_post.0", "resid_post.1"]).latents()
    for size in (32, 2):
        out = sf.run(nn, RAGGED, sf.Clamp(latents, add=values), batch_size=size, **BEAMS)
        for row, prompt in enumerate(RAGGED):
            alone = sf.run(nn, prompt, sf.Clamp(latents, add=values[row]), **BEAMS)
            assert out.completions[row] == alone.completions[0]


def test_beam_receipts_count_every_beam_and_list_none():
    model, nn = build("llama"), None
    nn = wrapped(model)
    out = sf.run(nn, RAGGED, PUSH, **BEAMS)
    (row,) = out.receipt.rows
    assert row.tokens == 3 * (13 + 3 * (NEW - 1)) and out.receipt.passes == NEW
    assert row.events is None
    assert out.logits.shape == (3, 100)
    torch.testing.assert_close(out.logits, sf.run(nn, RAGGED, PUSH).logits, atol=1e-5, rtol=1e-5)


def test_probes_under_beams_are_refused():
    nn = wrapped(build("llama"))
    for probe in (sf.Probe(direction()), PUSH | sf.Probe(direction(), reduce="max")):
        with pytest.raises(sf.SaefeatError, match=r"beams.*completion"):
            sf.run(nn, RAGGED, probe, **BEAMS)


def test_draws_by_prompt_under_beams_are_refused():
    step = sf.Ablate(direction(), to=sf.values.Resample(torch.randn(5, 1), seed=0))
    with pytest.raises(sf.SaefeatError, match=r"beams.*Resample"):
        sf.run(wrapped(build("llama")), RAGGED, step, **BEAMS)


@pytest.mark.filterwarnings("ignore:saefeat. run. . tokens of 1 prompts")  # of other prompts
def test_values_pinned_to_a_clean_run_reach_every_beam():
    nn, rows, v = wrapped(build("llama")), 3, direction()
    clean = sf.run(nn, RAGGED[::-1], sf.Probe(v)).readings[0]
    where = sf.Tokens.prompt()
    for size in (32, 2):
        step = sf.Clamp(v, sf.values.Patch(clean), where=where)
        out = sf.run(nn, RAGGED, step, batch_size=size, **BEAMS)
        for row in range(rows):
            fields = (clean.values[row, None], clean.mask[row, None], clean.starts[row, None])
            alone = sf.Clamp(
                v, sf.values.Patch(sf.results.Readings(clean.latents, *fields)), where=where
            )
            found = sf.run(nn, RAGGED[row], alone, **BEAMS)
            assert found.completions[0] == out.completions[row]


def test_what_a_server_cannot_do_is_refused():
    """Samples, stop tokens and checkpoints it can do: see test_remote_jobs.py."""
    with pytest.raises(sf.errors.RemoteError, match="2 beams"):
        sf.run(
            wrapped(build("llama")),
            RAGGED,
            PUSH,
            max_new_tokens=2,
            on=Server("local"),
            decode=Beams(2),
        )


@pytest.mark.parametrize("call", [sf.run, sf.remote.submit])
def test_a_model_in_memory_is_not_on_any_server(call):
    with pytest.raises(sf.errors.RemoteError, match="a model in memory or in a folder"):
        call(wrapped(build("llama")), RAGGED, PUSH, on=Server("http://127.0.0.1:9"))


def test_beams_that_finish_early():
    model = build("llama")
    nn, batch = wrapped(model), batch_of()
    with raw_hooks(model, {1: push}):
        free = by_beams(model, batch)
        stop = int(free[0, 2])
        wanted = by_beams(model, batch, eos_token_id=[100, stop])
    out = sf.run(nn, batch, PUSH, max_new_tokens=NEW, decode=Beams(3, stop=(stop,)))
    ends = [(row.tolist().index(stop) + 1) if stop in row else NEW for row in wanted]
    assert [list(row) for row in out.completions] == [
        row[:end].tolist() for row, end in zip(wanted, ends, strict=True)
    ]
    assert min(ends) < NEW


def test_sampled_beams_can_be_drawn_again():
    nn = wrapped(build("llama"))
    options = {"max_new_tokens": NEW, "decode": Sample(0.9, seed=3, num_beams=2)}
    first = sf.run(nn, RAGGED, PUSH, **options)
    assert first.completions == sf.run(nn, RAGGED, PUSH, **options).completions
    assert first.provenance.generation["num_beams"] == 2


# ---------------------------------------------------------------- stream


def both() -> sf.verbs.base.Chain:
    return sf.Clamp(make_sae().latents([1, 2]), 3.0) | sf.Probe(make_sae(seed=4).latents([5]))


def test_a_stream_is_the_run_batch_by_batch():
    nn = wrapped(build("llama"))
    prompts = [*RAGGED, "w20 w21", "w5"]
    whole = sf.run(nn, prompts, both(), **SAMPLE, batch_size=2)
    parts = list(sf.run(nn, iter(prompts), both(), **SAMPLE, batch_size=2, stream=True))
    assert [len(part.prompts) for part in parts] == [2, 2, 1]
    assert sum((part.completions for part in parts), ()) == whole.completions
    assert torch.equal(torch.cat([part.logits for part in parts]), whole.logits)
    assert sum(part.receipt.rows[0].changed for part in parts) == whole.receipt.rows[0].changed
    kept = torch.cat([part.readings[0].values[part.readings[0].mask] for part in parts])
    assert torch.equal(kept, whole.readings[0].values[whole.readings[0].mask])
    assert parts[0].receipt.rows[0].events.prompts == 2


def test_a_stream_takes_what_run_takes():
    nn, batch = wrapped(build("llama")), batch_of()
    wanted = [
        out.completions for out in sf.run(nn, batch, max_new_tokens=2, batch_size=2, stream=True)
    ]
    ids = [tokenizer()(prompt)["input_ids"] for prompt in RAGGED]
    for prompts in (RAGGED, tuple(RAGGED), (prompt for prompt in RAGGED), ids, iter(ids)):
        found = [
            out.completions
            for out in sf.run(nn, prompts, max_new_tokens=2, batch_size=2, stream=True)
        ]
        assert found == wanted
    for prompts in (RAGGED[0], ids[0]):
        (out,) = sf.run(nn, prompts, max_new_tokens=2, stream=True)
        assert out.completions[0] == wanted[0][0]
    for prompts in ([], iter([]), iter(ids[0]), 3):
        with pytest.raises(sf.errors.PromptError):
            list(sf.run(nn, prompts, max_new_tokens=2, stream=True))


def test_a_stream_takes_prompts_when_it_needs_them():
    taken = []

    def lines():
        for number in range(100):
            taken.append(number)
            yield f"w{number % 50} w1"

    found = sf.run(wrapped(build("llama")), lines(), both(), batch_size=4, stream=True)
    assert taken == []
    next(found)
    next(found)
    assert len(taken) == 8
    found.close()


def test_a_bad_prompt_loses_nothing_that_was_yielded():
    prompts = iter([*RAGGED, "w1", "", "w2"])
    found, seen = sf.run(wrapped(build("llama")), prompts, both(), batch_size=2, stream=True), []
    with pytest.raises(sf.errors.PromptError, match=r"prompts 4\.\.5.*no tokens"):
        seen.extend(found)
    assert not seen or len(seen) == 2
    with pytest.raises(sf.errors.PromptError):
        sf.run(wrapped(build("llama")), [*RAGGED, ""], both())


def test_an_edit_that_never_acts_is_known_at_the_end():
    nn = wrapped(build("llama"))
    rare = sf.Ablate(make_sae().latents([1]), where=sf.Tokens.ids(14))  # w10, in the last prompt
    assert len(list(sf.run(nn, RAGGED, rare, batch_size=1, stream=True))) == 3
    never = sf.Ablate(make_sae().latents([1]), where=sf.Tokens.ids(99))
    seen = []
    with pytest.raises(sf.errors.FiringError, match="selected no token"):
        for out in sf.run(nn, RAGGED, never, batch_size=1, stream=True):
            seen.append(out)
    assert len(seen) == 3
    assert len(list(sf.run(nn, RAGGED, never, batch_size=1, allow_unfired=True, stream=True))) == 3


def test_values_by_prompt_in_a_stream():
    nn = wrapped(build("llama"))
    step = sf.Clamp(direction(), add=torch.tensor([[1.0], [9.0], [-9.0]]))
    whole = sf.run(nn, RAGGED, step, max_new_tokens=3)
    parts = sf.run(nn, iter(RAGGED), step, max_new_tokens=3, batch_size=2, stream=True)
    assert sum((part.completions for part in parts), ()) == whole.completions
    for prompts in (RAGGED[:2], [*RAGGED, "w1"]):
        with pytest.raises(sf.SaefeatError, match="3 prompts"):
            list(sf.run(nn, iter(prompts), step, batch_size=2, stream=True))


# ---------------------------------------------------------------- long lists of chats


def test_long_chats_of_many_turns_stay_in_order():
    from saefeat.studies.refusal import tiny

    model = tiny.model("chat")
    turns = [("user", "how do i bake bread"), ("assistant", "sure"), ("user", "hello")]
    chats = [
        [{"role": role, "content": text} for role, text in (turns * 4)[: 1 + 2 * (n % 4)]]
        for n in range(7)
    ]
    saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
    step = sf.Clamp(saes.latents({2: [7]}), 3.0, where=sf.Tokens.role("user"))
    together = sf.run(model, chats, step, max_new_tokens=3, batch_size=3)
    for row, chat in enumerate(chats):
        alone = sf.run(model, [chat], step, max_new_tokens=3)
        assert together.prompts[row] == alone.prompts[0]
        assert together.completions[row] == alone.completions[0]
    counts = together.receipt.rows[0].events.prompt.bincount().tolist()
    assert counts[0] < counts[1] < counts[2] < counts[3] and counts[4] == counts[0]


# ---------------------------------------------------------------- readings


def test_unselected_values_are_nan_in_kept_and_absent_in_the_table():
    nn = wrapped(build("llama"))
    latents = make_sae().latents([7, 3]) | make_sae(layer=0).latents([5])
    probe = sf.Probe(latents, where=sf.Tokens.last(2))
    (reading,) = sf.run(nn, RAGGED, probe, max_new_tokens=3).readings
    kept = reading.kept()
    assert kept.shape == reading.values.shape == (3, 8, 3)
    assert torch.equal(kept.isnan(), ~reading.mask) and int(reading.mask.sum()) == 18
    assert torch.equal(kept[reading.mask], reading.values[reading.mask])
    torch.testing.assert_close(kept.nanmean((0, 1)), reading.mean())
    table = reading.to_pandas()
    assert list(table.columns) == ["prompt", "column", "site", "latent", "value"]
    assert len(table) == 18 and set(table["column"]) == {4, 5}
    assert table["site"].tolist()[:3] == ["resid_post.1", "resid_post.1", "resid_post.0"]
    assert table["latent"].tolist()[:3] == [7, 3, 5]
    assert table["value"].tolist() == reading.values[reading.mask].tolist()


@pytest.mark.parametrize("size", [32, 1])
def test_the_mean_of_reduced_means_weighs_tokens(size):
    nn = wrapped(build("llama"))
    latents = make_sae(excluded=(10,)).latents([7, 3]) | make_sae(layer=0).latents([5])
    where = ~sf.Tokens.first(1)
    (every,) = sf.run(nn, RAGGED, sf.Probe(latents), batch_size=size).readings
    (means,) = sf.run(nn, RAGGED, sf.Probe(latents, reduce="mean"), batch_size=size).readings
    assert means.counts.shape == means.values.shape == (3, 1, 3)
    torch.testing.assert_close(means.mean(), every.mean())
    unweighted = means.values.mean((0, 1))
    assert (unweighted - every.mean()).abs().max() > 1e-3
    rare = sf.Probe(latents, where=where & sf.Tokens.ids(4 + 2, 4 + 3), reduce="mean")
    (some,) = sf.run(nn, RAGGED, rare, batch_size=size).readings
    assert some.mask[:, 0, 0].tolist() == [True, False, False]
    torch.testing.assert_close(some.mean(), some.values[0, 0])


def test_a_stop_token_of_the_model_still_ends_rows():
    model = build("llama")
    model.generation_config.eos_token_id = EOS
    assert decoding(model, 1, Greedy(stop=[9, EOS])).stops == (EOS, 9)
    assert hook_count(model) == 0
