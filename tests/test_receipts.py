"""Receipts against bookkeeping by hand, in plain hooks that know nothing of saefeat."""

from __future__ import annotations

import inspect
import sys

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import (
    RAGGED,
    D,
    batch_of,
    blocks_of,
    build,
    forward,
    make_sae,
    raw_hooks,
    tensors_for,
    unit,
    wrapped,
)
from saefeat.kernel import edit
from saefeat.results import receipt as events_module

NEW = 5
LENGTHS = [3, 6, 4]
INDEX = {0: [3, 40, 17, 8], 1: [5, 30, 21]}
ADD = 2.5


def encode_by_hand(sae: dict, x: torch.Tensor, index: list[int]) -> torch.Tensor:
    return torch.relu((x - sae["b_dec"]) @ sae["W_enc"][:, index] + sae["b_enc"][index])


class ByHand:
    """The edit below, its events and its tokens, from hooks on blocks 0 and 1."""

    def __init__(self, model, threshold: float | None, where: str) -> None:
        saes = [tensors_for("standard", n, dtype=torch.float64) for n in (0, 1)]
        self.model, self.saes, self.threshold, self.where = model, saes, threshold, where
        self.rows: dict[int, list[tuple]] = {0: [], 1: []}
        self.tokens, self.ids, self.hit = 0, None, None

    def selected(self, columns: int, seen: int) -> torch.Tensor:
        """[b, t]: position and step of each column, counted by hand from the prompts' lengths."""
        position = torch.tensor(
            [[seen - columns + c - (6 - n) for c in range(columns)] for n in LENGTHS]
        )
        length = torch.tensor(LENGTHS)[:, None]
        real = position >= 0
        if self.where == "all":
            return position, real
        last2 = (position >= length - 2) & (position < length)
        return position, real & (last2 | (position >= length + 1))

    def edit(self, layer: int):
        def run(x):
            if layer == 0:
                self.seen = x.shape[1] if self.ids is None else self.seen + 1
                self.ids = True
            position, mask = self.selected(x.shape[1], self.seen)
            if self.threshold is not None:
                mask = mask & self.hit
            f = encode_by_hand(self.saes[layer], x, INDEX[layer])
            new = torch.where(f != 0, f + ADD, f)
            delta = (new - f) @ self.saes[layer]["W_dec"][INDEX[layer]]
            for row, column in mask.nonzero().tolist():
                at = int(position[row, column])
                step = at - LENGTHS[row] if at >= LENGTHS[row] else -1
                for place, latent in enumerate(INDEX[layer]):
                    was, now = float(f[row, column, place]), float(new[row, column, place])
                    if was != now:
                        size = float(delta[row, column].norm())
                        self.rows[layer].append((row, at, step, layer, latent, was, now, size))
            self.tokens += int(mask.sum()) if layer == 1 else 0
            return torch.where(mask[..., None], x + delta, x)

        return run

    def look(self, _, args, kwargs) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.hit = x @ unit(3).to(x.dtype) > (self.threshold or 0.0)

    def run(self, batch) -> torch.Tensor:
        handle = blocks_of(self.model)[0].register_forward_pre_hook(self.look, with_kwargs=True)
        with raw_hooks(self.model, {n: self.edit(n) for n in (0, 1)}):
            found = self.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        handle.remove()
        return found


def the_edit(saes, threshold, where) -> sf.Clamp:
    rule = None if where == "all" else sf.Tokens.last(2) | sf.Tokens.generated(1)
    score = sf.Direction(unit(3), site="resid_pre.0")
    when = None if threshold is None else sf.When(score, above=threshold)
    latents = saes[0].latents(INDEX[0]) | saes[1].latents(INDEX[1])
    return sf.Clamp(latents, add=ADD, active_only=True, where=rule, when=when)


def run_it(way, model, batch, step) -> tuple[torch.Tensor, sf.results.Receipt]:
    nn = wrapped(model)
    if way == "hooked":
        with sf.hooked(model, step) as log:
            tokens = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        return tokens[:, 6:], step.receipt(log)
    if way == "inline":
        with nn.generate(max_new_tokens=NEW, do_sample=False) as tracer:
            with tracer.invoke(batch):
                log = nnsight.save(step(nn))
            with tracer.invoke():
                tokens = nnsight.save(tracer.result)
        return tokens[:, 6:], step.receipt(log)
    size = 2 if way == "run in batches" else 32
    out = sf.run(nn, batch, step, max_new_tokens=NEW, batch_size=size)
    return torch.tensor(out.completions), out.receipt


@pytest.mark.parametrize("way", ["hooked", "inline", "run", "run in batches"])
@pytest.mark.parametrize(("threshold", "where"), [(None, "all"), (None, "some"), (0.1, "some")])
def test_every_change_is_recorded_as_it_was(way, threshold, where):
    model, batch = build("llama", torch.float64), batch_of()
    saes = [make_sae(layer=n, seed=n, dtype=torch.float64) for n in (0, 1)]
    hand = ByHand(model, threshold, where)
    wanted = hand.run(batch)
    tokens, receipt = run_it(way, model, batch, the_edit(saes, threshold, where))
    assert torch.equal(tokens, wanted[:, 6:])
    (row,) = receipt.rows
    found = row.events
    rows = [*hand.rows[0], *hand.rows[1]]
    assert len(found) == row.changed == len(rows) > 20
    assert row.tokens == hand.tokens and found.prompts == 3
    if threshold is not None:
        everything = ByHand(model, None, where)
        everything.run(batch)
        assert 0 < hand.tokens < everything.tokens
    names = ("prompt", "position", "step", "dictionary", "latent")
    keys = list(zip(*(getattr(found, name).tolist() for name in names), strict=True))
    order = sorted(range(len(rows)), key=lambda n: keys[n])
    rows.sort()
    assert [keys[n] for n in order] == [r[:5] for r in rows]
    for place, name in ((5, "before"), (6, "after"), (7, "norm")):
        values = getattr(found, name)[order]
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, torch.tensor([r[place] for r in rows]).double(),
                                   atol=1e-6, rtol=1e-6)  # fmt: skip
    starts = [6 - n for n in LENGTHS]
    ids = [int(wanted[r[0], starts[r[0]] + r[1]]) for r in rows]
    assert found.token[order].tolist() == ids


def test_norms_are_of_what_the_site_moved_by():
    """‖x' − x‖ at the site, transcoders and moving directions too."""
    model, batch = build("llama"), batch_of()
    cases = [
        sf.Ablate(make_sae("transcoder").latents([3, 40, 17])),
        sf.Clamp(make_sae(norm="layer_norm").latents([3, 40, 17]), 2.0),
        sf.Ablate(sf.dictionaries.ErrorTerm(make_sae("jumprelu"))),
        sf.Clamp(make_sae("topk").latents([3, 40, 17]), add=1.0),
    ]
    for step in cases:
        (basis, _), *_ = step.latents.parts
        look = sf.Probe(sf.Neurons(basis.write_site, D))
        with torch.no_grad(), sf.hooked(model, look) as log:
            forward(model, batch)
        before = look.readings(log)[0].values
        chain = step | look
        with torch.no_grad(), sf.hooked(model, chain) as log:
            forward(model, batch)
        after = chain.readings(log)[0].values
        found = chain.receipt(log).rows[0].events
        keys, norms = found.norms()
        moved = (after - before).norm(dim=-1)  # [b, t]
        starts = torch.tensor([6 - n for n in LENGTHS])
        wanted = moved[keys[:, 0], keys[:, 1] + starts[keys[:, 0]]]
        torch.testing.assert_close(norms, wanted, atol=1e-5, rtol=1e-4)
        assert len(keys) == int((moved > 1e-9).sum()) > 3 and norms.min() > 0


def test_an_edit_that_changes_nothing_has_no_events():
    out = sf.run(wrapped(build("llama")), RAGGED, sf.Clamp(make_sae().latents([1, 2]), scale=1.0))
    (row,) = out.receipt.rows
    assert (row.tokens, row.changed, len(row.events)) == (13, 0, 0)
    assert repr(row.events) == "Events(0 changes in 3 prompts)"
    assert len(row.events.norms()[1]) == 0


def test_wide_edits_keep_counts_alone():
    nn = wrapped(build("llama"))
    v = sf.Neurons("resid_post.1", D)
    wide = make_sae(d_sae=80)
    for latents, kept in ((v.latents(), True), (wide.latents(range(65)), False)):
        (row,) = sf.run(nn, RAGGED, sf.Clamp(latents, add=1.0), max_new_tokens=2).receipt.rows
        assert row.changed == (13 + 3) * len(latents)
        assert (row.events is not None) == kept
    two = sf.Clamp(v.latents([1]) | wide.latents(), add=1.0)
    assert sf.run(nn, RAGGED, two).receipt.rows[0].events is None


def test_long_runs_keep_counts_alone(monkeypatch):
    nn = wrapped(build("llama"))
    step = sf.Clamp(make_sae().latents([1, 2]), add=1.0)
    whole = sf.run(nn, RAGGED, step, max_new_tokens=4).receipt.rows[0]
    assert len(whole.events) == whole.changed == 44
    # of the function itself: a request that was rebuilt in this process brings its own copy
    monkeypatch.setitem(inspect.unwrap(edit.Write.note).__globals__, "PAIRS", 40)
    cut = sf.run(nn, RAGGED, step, max_new_tokens=4).receipt.rows[0]
    assert cut == whole and cut.events is None
    monkeypatch.undo()
    monkeypatch.setattr(events_module, "LIMIT", 40)
    cut = sf.run(nn, RAGGED, step, max_new_tokens=4, batch_size=1).receipt.rows[0]
    assert cut.events is None and cut.changed == 44


def test_batches_number_their_prompts_on():
    nn = wrapped(build("llama"))
    step = sf.Clamp(make_sae().latents([1, 2]), 3.0) | sf.Ablate(make_sae(layer=2).latents([7]))
    whole = sf.run(nn, RAGGED, step, max_new_tokens=3).receipt
    cut = sf.run(nn, RAGGED, step, max_new_tokens=3, batch_size=1).receipt
    for a, b in zip(whole.rows, cut.rows, strict=True):
        assert a == b
        assert a.events.prompts == b.events.prompts == 3
        names = [n for n in a.events.columns() if n not in ("before", "after", "norm")]
        for name in names:
            rows = [sorted(zip(*(e.columns()[n].tolist() for n in names), strict=True))
                    for e in (a.events, b.events)]  # fmt: skip
            assert rows[0] == rows[1], name


def test_sequences_in_one_hooked_block_number_on():
    model = build("llama")
    step = sf.Clamp(sf.Direction(unit(), site="resid_post.1"), 3.0, where=sf.Tokens.last(1))
    with sf.hooked(model, step) as log:
        for prompt in (RAGGED[:2], RAGGED[2:]):
            model.generate(**batch_of(prompt), max_new_tokens=3, do_sample=False)
    found = step.receipt(log).rows[0].events
    assert found.prompt.tolist() == [0, 1, 2] and found.prompts == 3
    assert found.position.tolist() == [2, 5, 3]


def test_invokes_have_receipts_of_their_own():
    nn = wrapped(build("llama"))
    steps = [sf.Clamp(sf.Direction(unit(n), site="resid_post.1"), 3.0) for n in (1, 2)]
    with torch.no_grad(), nn.trace() as tracer:
        with tracer.invoke(RAGGED[0]):
            first = nnsight.save(steps[0](nn))
        with tracer.invoke(RAGGED[1]):
            second = nnsight.save(steps[1](nn))
    for step, log, length in zip(steps, (first, second), (3, 6), strict=True):
        found = step.receipt(log).rows[0].events
        assert found.position.tolist() == list(range(length)) and set(found.prompt.tolist()) == {0}


def test_settings_of_a_sweep_have_events_of_their_own():
    nn = wrapped(build("llama"))
    latents = make_sae().latents([1, 2])
    settings = {v: sf.Clamp(latents, v) for v in (1.0, 2.0)}
    swept = sf.sweep(nn, RAGGED, settings, max_new_tokens=3)
    for value, step in settings.items():
        found = swept[value].receipt.rows[0].events
        alone = sf.run(nn, RAGGED, step, max_new_tokens=3).receipt.rows[0].events
        assert found.prompt.tolist() == alone.prompt.tolist()
        assert found.token.tolist() == alone.token.tolist()
        torch.testing.assert_close(found.after, torch.full((len(found),), value))
        torch.testing.assert_close(found.norm, alone.norm, atol=1e-5, rtol=1e-4)


def test_embeddings_have_no_token():
    model, batch = build("llama"), batch_of(["w1 w2 w3", "w4 w5 w6"])
    step = sf.Clamp(sf.Direction(unit(), site="resid_post.1"), 3.0)
    with torch.no_grad(), sf.hooked(model, step) as log:
        model(inputs_embeds=model.model.embed_tokens(batch["input_ids"]))
    found = step.receipt(log).rows[0].events
    assert found.token.tolist() == [-1] * 6 and found.position.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_receipt_as_a_table():
    nn = wrapped(build("llama"))
    step = sf.Clamp(make_sae().latents([1, 2]) | make_sae(layer=0).latents([5]), 3.0)
    receipt = sf.run(nn, RAGGED, step | sf.Ablate(make_sae(layer=2).latents([7]))).receipt
    table = receipt.to_pandas()
    assert len(table) == sum(row.changed for row in receipt.rows) > 40
    assert list(table.columns) == ["edit", "site", "prompt", "position", "step", "token", "latent",
                                   "before", "after", "norm"]  # fmt: skip
    assert set(table["edit"]) == {row.edit for row in receipt.rows}
    first = table[table["edit"] == receipt.rows[0].edit]
    assert first.groupby("site").size().to_dict() == {"resid_post.0": 13, "resid_post.1": 26}
    events = receipt.rows[0].events
    assert first["after"].tolist() == events.after.tolist()
    text = repr(events)
    assert text.startswith("Events(39 changes at 26 tokens of 3 prompts: 39 in prompts, 0 in")
    assert len(text.splitlines()) == 13 and text.endswith("... 29 more")
    assert max(map(len, text.splitlines())) < 110


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    step = sf.Clamp(make_sae().latents([1]), 3.0)
    receipt = sf.run(wrapped(build("llama")), RAGGED, step).receipt
    with pytest.raises(sf.SaefeatError, match=r"saefeat\[pandas\]"):
        receipt.to_pandas()


def test_noting_costs_a_decode_step_no_synchronization(monkeypatch):
    """Nothing is computed from values until the run is over: only references are kept."""
    model, batch = build("llama"), batch_of()
    step = sf.Clamp(make_sae().latents([1, 2]), 3.0)

    def refuse(*_, **__):
        raise AssertionError("computed while the model runs")

    monkeypatch.setattr(events_module, "record_events", refuse)
    monkeypatch.setattr(edit.Acted, "counts", refuse)
    with sf.hooked(model, step) as log:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    monkeypatch.undo()
    assert len(step.receipt(log).rows[0].events) == 2 * (13 + 6)


def test_tokens_of_dictionaries_that_skip_different_tokens_do_not_depend_on_batches():
    """One edit of two dictionaries, each of which skips the other's token."""
    a, b = make_sae(seed=1, excluded=(5,)), make_sae(seed=2, excluded=(6,))
    step = sf.Clamp(a.latents([3]) | b.latents([4]), 2.0)
    nn = wrapped(build("llama"))
    together, apart = (
        sf.run(nn, [[5, 5], [6, 6]], step, batch_size=size).receipt.rows[0].tokens
        for size in (2, 1)
    )
    assert together == apart == 2
