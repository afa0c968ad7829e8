"""Directions, selections and clamps against slow and plain computations on the tiny model."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import saefeat as sf
from saefeat.studies.refusal import tiny
from saefeat.studies.refusal.clamping import held, scaled, scaled_per_prompt
from saefeat.studies.refusal.data import chats
from saefeat.studies.refusal.direction import (
    adding,
    last_token_means,
    layer_table,
    steering,
    sweep_layers,
)
from saefeat.studies.refusal.errors import UsageError
from saefeat.studies.refusal.filter import keep_typical, require_room
from saefeat.studies.refusal.selection import (
    active,
    attribution,
    by_site,
    cosines,
    degenerate,
    peaks,
    random_like,
    restored,
    top_overall,
    top_per_layer,
)
from saefeat.studies.refusal.setup import TINY, one_thread, tiny_lab
from saefeat.studies.refusal.suppression import category_table


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    settings = replace(TINY, limit=12, steps=2, batch_size=12)
    with one_thread():
        lab = tiny_lab(tmp_path_factory.mktemp("lab"), settings, lambda text: None, quiet=True)
        yield replace(lab, sets=lab.sets.limited(12))


@pytest.fixture(scope="module")
def vector(lab):
    found = [
        last_token_means(lab, part) for part in (lab.sets.harmful_train, lab.sets.harmless_train)
    ]
    return found[0][2] - found[1][2]


def hidden(lab, prompt, layer):
    """One prompt on its own through the plain model: ids [t] and residual stream [t, d]."""
    batch = sf.text.prompts.encode_prompts(lab.model.tokenizer, chats([prompt]))
    with torch.no_grad():
        states = lab.model._module(**batch, output_hidden_states=True).hidden_states
    return batch["input_ids"][0], states[layer + 1][0]


def test_the_direction_is_the_difference_of_last_token_means(lab, vector):
    def mean(prompts):
        return torch.stack([hidden(lab, prompt, 2)[1][-1] for prompt in prompts]).mean(0)

    expected = mean(lab.sets.harmful_train) - mean(lab.sets.harmless_train)
    torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-4)


def test_cosim_is_the_brute_force_cosine(lab, vector):
    pairs = []
    for site in lab.saes:
        file = tiny.saes_folder("chat") / f"resid_post_{site.layer}" / "sae_weights.safetensors"
        rows = load_file(file)["W_dec"].double()
        values = torch.nn.functional.cosine_similarity(rows, vector.double()[None], dim=1)
        pairs += [(float(value), str(site), n) for n, value in enumerate(values)]
    expected = {(site, n) for _, site, n in sorted(pairs, reverse=True)[:9]}
    found = top_overall(lab.saes, cosines(lab.saes, vector), 9)
    assert {(str(site), n) for site, n in found} == expected
    each = top_per_layer(lab.saes, cosines(lab.saes, vector), 3)
    for name, part in by_site(each):
        best = sorted((v, n) for v, site, n in pairs if site == name)[-3:]
        assert {n for _, n in part} == {n for _, n in best}


def test_actdiff_is_the_brute_force_difference_of_peaks(lab):
    site = sf.Site("resid_post", 1)
    dictionary = lab.saes[site]
    skipped = dictionary.excluded
    skipped = lab.model.tokenizer.all_special_ids if skipped == "special" else list(skipped)

    def peak(prompt):
        ids, stream = hidden(lab, prompt, 1)
        kept = ~torch.isin(ids, torch.tensor(skipped))
        kept[0] = False  # the first token is a sink in real models, and no token of the study
        return dictionary.encode(stream[kept]).amax(0)

    def mean(prompts):
        return torch.stack([peak(prompt) for prompt in prompts]).mean(0)

    expected = mean(lab.sets.harmful_train) - mean(lab.sets.harmless_train)
    harmful, harmless = peaks(lab, lab.sets.harmful_train), peaks(lab, lab.sets.harmless_train)
    found = harmful[site] - harmless[site]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert set(top_overall(lab.saes, {site: found}, 4)) == {
        (site, int(n)) for n in expected.topk(4).indices
    }
    firing = dict(by_site(active(lab.saes, harmful)))[str(site)]
    assert {n for _, n in firing} == set((harmful[site] > 0).nonzero().squeeze(1).tolist())


def test_cosim_ap_is_the_best_of_the_candidates(lab, vector):
    scores = attribution(lab, lab.sets.harmful_test, steering(lab, vector))
    near = top_per_layer(lab.saes, cosines(lab.saes, vector), 6)
    values = scores.scores_of(near)
    order = values.argsort(descending=True)[:3]
    listed = list(near)
    assert set(scores.top(3, within=near)) == {listed[i] for i in order.tolist()}
    assert len(scores.top(3, per="prompt", within=near)) == len(lab.sets.harmful_test)


def test_random_sets_match_in_number_and_layer_and_share_nothing(lab):
    pool = lab.saes.latents({0: range(30), 1: range(20)})
    like = lab.saes.latents({0: [3, 4], 1: [5]})
    drawn = random_like(pool, like, seed=0)
    assert {site: len(part) for site, part in by_site(drawn)} == {
        "resid_post.0": 2,
        "resid_post.1": 1,
    }
    assert not set(drawn) & set(like)
    assert set(drawn) <= set(pool)
    assert drawn == random_like(pool, like, seed=0) != random_like(pool, like, seed=1)


def test_selections_survive_json(lab):
    chosen = lab.saes.latents({1: [7, 3], 3: [500]})
    assert restored(lab.saes, chosen.to_dict()) == chosen


def test_local_sets_in_one_batch_are_each_prompt_alone(lab):
    prompts = lab.sets.harmful_test[:3]
    firing = [one for _, one in by_site(active(lab.saes, peaks(lab, prompts)))]
    sets = [firing[1].sample(6, seed=n) | firing[2].sample(6, seed=n) for n in range(2)]
    sets.append(sf.Latents(()))
    together = lab.read(prompts, scaled_per_prompt(sets, -1.0, lab.counted)).logits
    alone = [
        lab.read([prompt], scaled(one, -1.0, lab.counted)).logits[0]
        for prompt, one in zip(prompts, sets, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together[0], lab.read(prompts[:1]).logits[0], atol=1e-3)


def test_empty_sets_edit_nothing():
    empty, where = sf.Latents(()), sf.Tokens.all()
    assert scaled(empty, -1.0, where) is None
    assert scaled_per_prompt([empty, empty], -1.0, where) is None
    assert held(empty, 3.0, where) is None


def test_steering_removes_most_refusals_and_adding_makes_them(lab):
    """The tiny model has what the study looks for: one direction that carries refusal."""
    lab, kept = keep_typical(lab)
    assert all(one["kept"] >= 0.8 * one["read"] for one in kept.values())
    layers = sweep_layers(lab)
    best = torch.tensor(layers["directions"][layers["best"]])
    base = lab.outcomes(lab.sets.harmful_test)
    steered = lab.outcomes(lab.sets.harmful_test, steering(lab, best))
    assert base["refusal"]["value"] >= 0.9
    assert steered["refusal"]["value"] <= 0.3
    assert steered["jailbreak"]["value"] >= 0.6
    assert degenerate(lab, lab.sets.harmful_test, steering(lab, best)).sum() <= 4
    induced = lab.outcomes(lab.sets.harmless_test, adding(best, layers["best"]))
    # A direction from a dozen prompts; test_tiny_shipped holds the bar on all of them.
    assert induced["refusal"]["value"] >= 0.5


def test_one_pass_reads_all_layers(lab, monkeypatch):
    """The same numbers as a pass a layer; passes are counted, a pass being one batch."""
    prompts, layers, passes = lab.sets.harmful_train, range(len(lab.sites)), []
    handle = lab.model._module.model.layers[0].register_forward_hook(
        lambda *_: passes.append(1) and None
    )
    many = replace(lab, settings=replace(lab.settings, batch_size=5))  # 12 prompts: 5, 5, 2
    try:
        means, found = last_token_means(many, prompts), peaks(many, prompts)
    finally:
        handle.remove()
    assert len(passes) == 2 * 3
    for n in layers:
        neurons = sf.Neurons(lab.sites[n], lab.width).latents()
        probe = sf.Probe(neurons, where=sf.Tokens.last(1), reduce="last")
        alone = lab.read(prompts, probe).readings[0].values[:, 0].float().mean(0)
        torch.testing.assert_close(means[n], alone, rtol=1e-6, atol=1e-6)
    for site, dictionary in lab.saes.items():
        probe = sf.Probe(dictionary.latents(), where=lab.counted, reduce="max")
        alone = lab.read(prompts, probe).readings[0].values[:, 0].float().mean(0)
        torch.testing.assert_close(found[site], alone, rtol=1e-6, atol=1e-6)


def test_the_skipped_positions_are_read_scored_and_edited_nowhere(lab, vector):
    skipping = replace(lab, settings=replace(lab.settings, skipped=4))
    prompts = lab.sets.harmful_train[:3]
    scores = attribution(skipping, prompts, steering(lab, vector))
    assert (
        int(scores.position.min())
        >= 4
        > int(attribution(lab, prompts, steering(lab, vector)).position.min())
    )
    for edited, first in ((skipping, 4), (lab, 1)):
        edit = held(lab.saes.latents({1: [3]}), 2.0, edited.counted)
        assert int(edited.read(prompts, edit).receipt.rows[0].events.position.min()) == first
    site = lab.sites[1]
    later, every = peaks(skipping, prompts)[site], peaks(lab, prompts)[site]
    assert (every >= later).all() and (every > later).any()


def test_prompts_within_the_skipped_positions_are_refused(lab):
    """They would be edited nowhere, and counted as refused in spite of the edit."""
    splits = [getattr(lab.sets, name) for name in lab.sets.sizes()]
    lengths = [
        len(hidden(lab, prompt, 0)[0]) for prompts in splits for prompt in dict.fromkeys(prompts)
    ]
    shortest = min(lengths)
    require_room(replace(lab, settings=replace(lab.settings, skipped=shortest - 1)))
    with pytest.raises(UsageError, match=rf"--skip {shortest}: .* has {shortest} tokens"):
        keep_typical(replace(lab, settings=replace(lab.settings, skipped=shortest)))


def test_a_layer_that_is_given_is_the_only_one_tried(lab):
    one = replace(lab, settings=replace(lab.settings, layer=2))
    found = sweep_layers(one)
    assert found["best"] == 2
    assert [row["layer"] for row in found["rows"]] == [2]
    assert len(found["directions"]) == len(lab.sites)
    assert "The layer that was given, 2" in layer_table(found).caption


def test_outcomes_keep_every_answer_and_count_by_category(lab):
    prompts = lab.sets.harmful_test
    found = lab.outcomes(prompts)
    assert [row["request"] for row in found["records"]] == [p.instruction for p in prompts]
    assert [row["answer"] for row in found["records"]] == list(lab.ask(prompts).texts)
    assert sum(one["n"] for one in found["categories"].values()) == found["n"] == 12
    assert set(found["categories"]) == {prompt.category for prompt in prompts}
    for outcome in ("refused", "complied", "broken"):
        assert sum(one[outcome] for one in found["categories"].values()) == found[outcome]
    assert category_table({"x": {"rows": [{"method": "base", **found}]}}, "x", 4) is not None
    bare = [replace(prompt, category="") for prompt in prompts]
    none = lab.outcomes(bare[:2])
    assert category_table({"x": {"rows": [{"method": "base", **none}]}}, "x", 4) is None
