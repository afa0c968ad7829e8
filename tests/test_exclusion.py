"""Tokens that a dictionary was not trained on: a file says so, and edits and readings skip them."""

from __future__ import annotations

import json

import pytest
import torch

import saefeat as sf
from helpers import batch_of, build, make_sae, wrapped
from saefeat.kernel.state import Memory
from saefeat.loading import native
from saefeat.remote.dry_run import bounds, generated

NOT_FIRST = sf.Tokens.positions(0, 1)
PROMPTS = [[2, 10, 11, 12], [10, 11, 2, 12, 13, 14], [20, 21]]


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (NOT_FIRST, [[0], [0], [0]]),
        (sf.Tokens.positions(1), [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3]]),
        (sf.Tokens.positions(3, 5), [[3, 4], [3, 4], [3]]),
        (~sf.Tokens.positions(2), [[0, 1], [0, 1], [0, 1]]),
    ],
)
def test_positions_are_of_the_text_and_go_on_in_generation(rule, wanted):
    """Left pads have none, and the third decode step is no position 0."""
    nn, neurons = wrapped(build("llama")), sf.Neurons("resid_post.1", 32)
    look = sf.Probe(neurons.latents([0]), where=rule)
    for batch in (batch_of(PROMPTS), PROMPTS):
        out = sf.run(nn, batch, look, max_new_tokens=3).readings[0]
        masks = zip(out.mask[..., 0], out.starts.tolist(), strict=True)
        real = [(mask.nonzero().flatten() - start).tolist() for mask, start in masks]
        assert real == wanted


@pytest.mark.parametrize("bad", [(-1, None), (0, 0), (3, 1), (1.0, None), (0, True), ("0", None)])
def test_positions_that_mean_nothing_are_refused(bad):
    with pytest.raises(sf.errors.PromptError, match=r"Tokens\.positions.*Try:"):
        sf.Tokens.positions(*bad)


def test_positions_print_as_they_are_written():
    assert repr(sf.Tokens.positions(1)) == "Tokens.positions(1)"
    assert repr(~sf.Tokens.positions(0, 2)) == "~Tokens.positions(0, 2)"


def test_a_preflight_knows_positions_of_tokens_it_has_not_seen():
    view = generated(torch.tensor([[4], [2]]), 3)
    sure, may = bounds(("positions", 3, 5), view)
    assert torch.equal(sure, may)
    assert sure.tolist() == [[True, False, False], [False, True, True]]
    assert isinstance(view.memory, Memory)


# ---------------------------------------------------------------- what files say


def folder(path, **metadata):
    theirs = make_sae()._weights
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    save_file({n: theirs.read(n).contiguous() for n in theirs.names()}, path / native.WEIGHTS)
    d_in, d_sae = theirs.shape("W_enc")
    config = {"architecture": "standard", "d_in": d_in, "d_sae": d_sae, "metadata": metadata}
    config["metadata"]["hook_name"] = "blocks.1.hook_resid_post"
    (path / native.CONFIG).write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("declared", "wanted"),
    [
        (None, ()),
        ([None], ()),
        ([0, None], ()),
        ([None, None, 1], ()),
        ([1, None], NOT_FIRST),
        ([5], sf.Tokens.positions(5)),  # slice(5)
        ([2, 9], sf.Tokens.positions(0, 2) | sf.Tokens.positions(9)),
    ],
)
def test_seqpos_slice_says_which_positions_were_not_trained_on(tmp_path, declared, wanted):
    assert sf.load_sae(folder(tmp_path, seqpos_slice=declared)).excluded == wanted


def test_positions_and_special_tokens_are_both_left_out(tmp_path):
    kept = {"seqpos_slice": [1, None]}
    ids = sf.load_sae(folder(tmp_path, exclude_special_tokens=[2, 5], **kept))
    assert ids.excluded == sf.Tokens.ids(2, 5) | NOT_FIRST
    special = sf.load_sae(folder(tmp_path, exclude_special_tokens=True, **kept))
    assert special.excluded == sf.Tokens.special() | NOT_FIRST
    assert repr(special).endswith("without Tokens.special() | Tokens.positions(0, 1))")


@pytest.mark.parametrize("bad", [[1, -1], [-5, None], [0, 10, 2], [True], ["1", None], [0, 0]])
def test_positions_counted_from_the_end_are_refused(tmp_path, bad):
    with pytest.raises(sf.errors.DictionaryError, match=r"seqpos_slice.*Try:"):
        sf.load_sae(folder(tmp_path, seqpos_slice=bad))


def test_positions_change_the_fingerprint(tmp_path):
    every = sf.load_sae(folder(tmp_path / "a"))
    later = sf.load_sae(folder(tmp_path / "b", seqpos_slice=[1, None]))
    assert every.fingerprint() == make_sae().fingerprint()
    assert later.fingerprint() != every.fingerprint()
    assert later.fingerprint([3]) != every.fingerprint([3])
    assert later.fingerprint() == make_sae(excluded=NOT_FIRST).fingerprint()


# ---------------------------------------------------------------- what is done with it


def counted(nn, step):
    return sf.run(nn, PROMPTS, step, max_new_tokens=2).receipt.rows[0].tokens


def test_edits_and_readings_skip_positions_by_default():
    """12 prompt tokens and one more a row that is fed back; the first of each row left out."""
    nn, sae = wrapped(build("llama")), make_sae(excluded=NOT_FIRST)
    latents = sae.latents([1, 2])
    assert counted(nn, sf.Ablate(latents)) == 15 - 3
    assert counted(nn, sf.Ablate(latents, where=sf.Tokens.prompt())) == 12 - 3
    assert counted(nn, sf.Ablate(latents, where=~sf.Tokens.ids(2))) == 15 - 3 - 1
    out = sf.run(nn, PROMPTS, sf.Probe(latents))
    assert out.readings[0].mask.sum() == 2 * (12 - 3)
    scores = sf.Attribute(sae, sf.metrics.logit_diff([5], [6]))(nn, PROMPTS)
    assert not (scores.position == 0).any() and scores.tokens.tolist() == [3, 5, 1]


def test_a_rule_that_names_tokens_means_them():
    nn = wrapped(build("llama"))
    latents = make_sae(excluded=NOT_FIRST).latents([1, 2])
    for rule, tokens in (
        (sf.Tokens.all(), 15),
        (sf.Tokens.positions(0, 2), 6),
        (sf.Tokens.ids(2), 2),
    ):
        assert counted(nn, sf.Ablate(latents, where=rule)) == tokens
    both = make_sae(excluded=sf.Tokens.ids(2) | NOT_FIRST).latents([1, 2])
    # naming positions brings positions back, and no special token
    assert counted(nn, sf.Ablate(both, where=sf.Tokens.positions(0))) == 15 - 2
    assert counted(nn, sf.Ablate(both)) == 15 - 3 - 1


def test_any_dictionary_may_skip_tokens():
    direction = sf.Direction(torch.ones(32), site="resid_post.1")
    direction.excluded = NOT_FIRST
    assert counted(wrapped(build("llama")), sf.Ablate(direction)) == 15 - 3


@pytest.mark.parametrize("bad", [2, [2], "bos", (2.0,), (True,), None])
def test_what_is_no_exclusion_is_refused(bad):
    with pytest.raises(sf.errors.DictionaryError, match=r"excluded.*Try:"):
        make_sae(excluded=bad)


def test_a_saved_intervention_keeps_what_is_skipped(tmp_path):
    sae = make_sae(excluded=sf.Tokens.special() | NOT_FIRST)
    step = sf.Ablate(sae.latents([1, 2]), where=~sf.Tokens.positions(4, 9))
    sf.save(step, tmp_path / "edit.safetensors")
    back = sf.load(tmp_path / "edit.safetensors")
    assert back.latents.parts[0][0].excluded == sae.excluded and back.rule == step.rule
    nn = wrapped(build("llama"))
    assert counted(nn, back) == counted(nn, step) == 15 - 3 - 1 - 4
