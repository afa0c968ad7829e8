"""A model split over two processes by tensor parallelism gives what it gives in one.

Two ranks over gloo on this machine's CPU; heads and neurons lie half in one, half in the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import build, wrapped
from split_over_ranks import READ_ONLY, SHARDED, SITES, everything

pytestmark = [
    pytest.mark.slow,  # two more processes that load everything
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo"
    ),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every call of ``everything`` gave on each of the two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    build("llama").save_pretrained(folder)
    script = Path(__file__).with_name("split_over_ranks.py")
    path = os.pathsep.join(part for part in sys.path if part)
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=1200)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    return everything(wrapped(build("llama")))


REFUSED = [f"hooked {kind}" for kind in SHARDED]
EXACT = [
    *(f"{way} {kind}" for way in ("run", "hooked") for kind in SITES),
    *(f"attribute {kind}" for kind in ("resid_post", "mlp_out", "z")),
    "inline",
    "edit",
    "bare",
]


@pytest.mark.parametrize("name", [name for name in EXACT if name not in REFUSED])
def test_a_split_model_gives_the_same(name, ranks, alone):
    """On every rank: logits, tokens, readings, scores; also where values are split."""
    for found in ranks:
        assert not isinstance(found[name], str), found[name]
        for key, wanted in alone[name].items():
            if isinstance(wanted, torch.Tensor):
                torch.testing.assert_close(found[name][key], wanted, rtol=1e-4, atol=1e-5)
            else:
                assert found[name][key] == wanted
    assert set(alone) == set(EXACT)


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_of_a_value_is_refused(name, ranks, alone):
    assert not isinstance(alone[name], str)
    for found in ranks:
        assert found[name].startswith("SiteError: hooked:")
        assert "of which this process has a part" in found[name]
        assert "nnsight gathers" in found[name]


def test_the_edits_do_something(alone):
    """Else the comparisons above would hold for edits that never act."""
    bare = alone["bare"]["logits"]
    for kind in SITES:
        same = torch.allclose(alone[f"run {kind}"]["logits"], bare, atol=1e-3)
        assert same == (kind in READ_ONLY)
