"""The training script, re-run: a short run reaches the same bars as the shipped files."""

import json

import pytest
from tools.tiny import bars, train


@pytest.mark.slow
def test_a_small_run_reaches_the_bars(tmp_path):
    assert train.main(["--out", str(tmp_path), "--small", "--quiet"]) == 0
    figures = json.loads((tmp_path / "bars.json").read_text(encoding="utf-8"))
    assert all(bars.verdicts(figures).values())
    assert set(figures["chat"]["saes"]) == {"resid_post_2"}
