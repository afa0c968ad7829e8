"""The lm-evaluation-harness calls the model itself, and sees the edit that `hooked` makes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import saefeat as sf
from helpers import blocks_of
from saefeat.studies.refusal import tiny

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own, of which there are many

HARNESS = Path(__file__).resolve().parents[1] / "examples" / "harness"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield runpy.run_path(str(HARNESS / "evaluate.py"))


@pytest.fixture(scope="module")
def harness(example):
    """The harness's model, the edit, and the example's function that scores."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny.load("chat")
    ablate = sf.Ablate(example["refusal_latents"](model, tokenizer))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=256)
    return lm, ablate, example["score"]


def by_hand(dictionary, index):
    """The ablation of a few latents written out, for a plain hook on a block."""
    rows = dictionary.directions(index)

    def hook(_, __, output):
        x = output.float()
        return (x - dictionary.encode(x, index) @ rows).to(output.dtype)

    return hook


def test_the_harness_sees_the_edit(harness):
    """Its log likelihoods are those it finds under plain hooks, and others than without."""
    lm, ablate, score = harness
    found = torch.tensor(score(lm, ablate)[1])
    bare = torch.tensor(score(lm)[1])
    handles = [
        blocks_of(lm.model)[basis.site.layer].register_forward_hook(by_hand(basis, list(index)))
        for basis, index in ablate.latents.parts
    ]
    try:
        wanted = torch.tensor(score(lm)[1])
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert ((found - bare)[:, 0] < -0.5).sum() > 2  # refusing has become less likely


def test_scores_from_a_cache_are_no_scores_of_the_edit(harness):
    """The harness keeps answers; an edit over answers kept before would have no effect."""
    lm, ablate, _ = harness
    with (
        pytest.raises(sf.errors.FiringError, match="results from a cache"),
        sf.hooked(lm.model, ablate),
    ):
        pass
