"""docs/guide/support.md says what tests/support.py finds today."""

from __future__ import annotations

import pytest
import torch

import support
from helpers import build

TEXT = support.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow  # the whole page is written anew there
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_model_types_row(family):
    assert support.sites_table([family]).splitlines()[2] in TEXT.splitlines()


@pytest.mark.parametrize("name", ["falcon", "qwen3_next"])
def test_a_familys_row(name):
    assert support.families_table([name]).splitlines()[2] in TEXT.splitlines()


@pytest.mark.parametrize("name", ["topk", "skip_transcoder", "error term"])
def test_a_dictionarys_row(name):
    assert support.dictionaries_table([name]).splitlines()[2] in TEXT.splitlines()


def test_the_page_holds_every_case_and_none_is_wrong():
    rows = [line.split(" | ")[0].strip("| ") for line in TEXT.splitlines() if line.startswith("|")]
    for names in (support.FAMILIES, support.ZOO, support.DICTIONARIES, support.DECODING):
        assert set(names) <= set(rows)
    assert all(kind in TEXT for kind in support.KINDS)
    assert TEXT.count(support.DIFFERS) == 1  # where the sign is explained


def test_a_wrong_result_would_show():
    """The table's own oracle can say no."""
    wanted = torch.tensor([1.0])
    assert support.outcome(lambda: (wanted,), wanted) == support.EXACT
    assert support.outcome(lambda: (wanted + 1e-2,), wanted) == support.DIFFERS
    model = build("llama")
    v = torch.nn.functional.normalize(torch.ones(support.D), dim=0)
    here, there = (support.wanted_by_hand(model, f"resid_post.{n}", v)[0] for n in (0, 1))
    assert (here - there).abs().max() > 1e-2


@pytest.mark.slow
def test_the_page_is_what_the_script_writes():
    assert support.page() == TEXT, "python tests/support.py writes it again"
