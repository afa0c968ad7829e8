"""Checkpoints: whole or absent, one job's and no other's."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saefeat as sf
from helpers import build, make_sae, unit, wrapped
from saefeat.checkpoint import Checkpoint
from saefeat.identity import digest, model_identity, weights

JOB = {"prompts": "abc", "options": {"temperature": 0.7, "stop": [1, 2]}}
TENSORS = {
    "half": torch.randn(3, 2).to(torch.bfloat16),
    "mask": torch.tensor([[True, False]]),
    "long": torch.arange(4),
    "empty": torch.zeros(0, 5),
    "view": torch.randn(4, 6)[:, ::2].T,
}


def test_a_batch_comes_back_as_it_was(tmp_path):
    with Checkpoint(tmp_path / "a" / "job", JOB) as done:
        assert done.load(0) is None
        done.save(0, TENSORS, {"rows": 3, "names": ["x", None]})
    with Checkpoint(tmp_path / "a" / "job", JOB) as done:
        tensors, meta = done.load(0)
        assert done.load(1) is None
    assert meta == {"rows": 3, "names": ["x", None]}
    assert tensors.keys() == TENSORS.keys()
    for name, wanted in TENSORS.items():
        assert tensors[name].dtype == wanted.dtype and torch.equal(tensors[name], wanted)
    assert {p.name for p in (tmp_path / "a" / "job").iterdir()} == {
        "identity.json",
        "batch-000000.safetensors",
    }


def test_tensors_that_share_storage_are_kept(tmp_path):
    whole = torch.arange(6.0)
    with Checkpoint(tmp_path, JOB) as done:
        done.save(0, {"a": whole[:3], "b": whole[3:], "c": whole}, {})
        assert torch.equal(done.load(0)[0]["b"], whole[3:])


def test_no_folder_keeps_nothing():
    with Checkpoint(None, {}) as done:
        done.save(0, TENSORS, {})
        assert done.load(0) is None


@pytest.mark.parametrize("name", ["prompts", "options", "more"])
def test_another_job_is_refused_by_name(tmp_path, name):
    with Checkpoint(tmp_path, JOB) as done:
        done.save(0, {}, {})
    with (
        pytest.raises(sf.CheckpointError, match=f"differs in {name} "),
        Checkpoint(tmp_path, {**JOB, name: "other"}),
    ):
        pass


def test_folders_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(sf.CheckpointError, match=name), Checkpoint(tmp_path / name, JOB):
            pass
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_identity_is_refused(tmp_path, content):
    with Checkpoint(tmp_path, JOB) as done:
        done.save(0, {}, {})
    (tmp_path / "identity.json").write_bytes(content)
    with pytest.raises(sf.CheckpointError, match="cannot be read"), Checkpoint(tmp_path, JOB):
        pass


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 600), flip=st.none() | st.integers(0, 255))
def test_a_damaged_batch_is_never_believed(tmp_path_factory, cut, flip):
    """Cut short or with one byte changed: done again, or exactly what was saved."""
    folder = tmp_path_factory.mktemp("job")
    with Checkpoint(folder, JOB) as done:
        done.save(0, {"a": torch.arange(9.0)}, {"rows": 3})
        file = folder / "batch-000000.safetensors"
        content = bytearray(file.read_bytes())
        place = cut % len(content)
        if flip is None:
            file.write_bytes(content[:place])
        else:
            content[place] ^= flip
            file.write_bytes(content)
        if flip == 0:
            assert done.load(0)[1] == {"rows": 3}
            return
        with pytest.warns(UserWarning, match="damaged"):
            assert done.load(0) is None


@pytest.mark.parametrize("trouble", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, trouble):
    def broken(*_):
        raise trouble

    with Checkpoint(tmp_path, JOB) as done:
        done.save(0, {"a": torch.ones(1)}, {})
        monkeypatch.setattr(os, "replace", broken)
        for number in (0, 1):
            with pytest.raises(trouble):
                done.save(number, {"a": torch.zeros(1)}, {})
        assert torch.equal(done.load(0)[0]["a"], torch.ones(1)) and done.load(1) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_write_left_is_no_obstacle(tmp_path):
    (tmp_path / ".identity.json.x.partial").write_text("{")
    with Checkpoint(tmp_path, JOB) as done:
        assert done.load(0) is None


# ---------------------------------------------------------------- hashes


@dataclass(frozen=True)
class Setting:
    a: int
    b: torch.Tensor


def different() -> list:
    sae = make_sae(seed=1)
    one = sae.latents([1, 2])
    added = torch.ones(2)
    limit, other = 3, 4
    return [
        None, True, 1, 1.0, "1", [1], ["1"], [[1]], {"a": 1}, {"a": 2}, {"b": 1}, (1, 2), (12,),
        torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(2, 1), torch.tensor(1.0),
        Setting(1, torch.ones(2)), Setting(1, torch.zeros(2)),
        sf.Ablate(one), sf.Ablate(sae.latents([2, 1])), sf.Ablate(make_sae(seed=2).latents([1, 2])),
        sf.Clamp(one, add=added), sf.Clamp(one, add=added + 1e-6), sf.Clamp(one, scale=added),
        sf.Ablate(one, where=sf.Tokens.last(1)), sf.Ablate(one, where=sf.Tokens.last(2)),
        sf.Ablate(one, when=sf.When(one)), sf.Ablate(one, when=sf.When(one, above=1.0)),
        sf.Ablate(one) | sf.Ablate(one), sf.Probe(one), sf.Probe(one, reduce="max"),
        sf.Ablate(one, where=sf.Tokens.where(lambda ids, at: ids > 3)),
        sf.Ablate(one, where=sf.Tokens.where(lambda ids, at: ids > 4)),
        sf.Ablate(one, where=sf.Tokens.where(lambda ids, at: ids > limit)),
        sf.Ablate(one, where=sf.Tokens.where(lambda ids, at: ids > other)),
        sf.Ablate(sf.Direction(unit(), site="resid_post.1")),
        sf.Ablate(sf.Direction(unit(), site="resid_post.2")),
        sf.Ablate(make_sae(seed=1, excluded=(2,)).latents([1, 2])),
    ]  # fmt: skip


def test_different_values_have_different_hashes_and_equal_ones_the_same():
    first, second = [digest(v) for v in different()], [digest(v) for v in different()]
    assert first == second
    assert len(set(first)) == len(first)


def test_long_tensors_count_in_full():
    """A repr shows six numbers of a thousand."""
    a = torch.zeros(100_000)
    b = a.clone()
    b[50_000] = 1e-9
    assert repr(a) == repr(b) and digest(a) != digest(b)


def test_what_cannot_be_hashed_is_refused():
    with pytest.raises(sf.CheckpointError, match="object"):
        digest({"x": object()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_weight_counts(dtype):
    model = build("llama", dtype)
    before = weights(model)
    assert before == weights(build("llama", dtype))
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        kept = weight[7, 3].clone()
        weight[7, 3] = torch.nextafter(kept.float(), torch.tensor(9.0)).to(dtype) + kept.abs() / 64
        assert weights(model) != before
        weight[7, 3] = kept
        assert weights(model) == before
        weight[[0, 1]] = weight[[1, 0]]
        assert weights(model) != before
        weight[[0, 1]] = weight[[1, 0]]
        weight[:, [0, 1]] = weight[:, [1, 0]]
        assert weights(model) != before


def test_weights_of_any_kind():
    module = torch.nn.Module()
    module.register_buffer("flag", torch.tensor(True))
    module.register_buffer("none", torch.zeros(0, 3))
    module.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))
    first = weights(module)
    module.wave[1] = 1j
    assert weights(module) != first


def test_a_model_is_known_by_more_than_its_weights():
    nn = wrapped(build("llama"))
    found = model_identity(nn)
    assert json.loads(json.dumps(found)) == found
    model = build("llama")
    model.generation_config.repetition_penalty = 1.5
    other = model_identity(wrapped(model))
    assert [n for n in found if found[n] != other[n]] == ["generation configuration"]
    model.config.rms_norm_eps = 0.1
    assert model_identity(model)["configuration"] != found["configuration"]


def test_edited_copies_and_models_without_weights_are_refused():
    nn = wrapped(build("llama"))
    edited = sf.edit(nn, sf.Ablate(sf.Direction(unit(), site="resid_post.1")))
    with pytest.raises(sf.ModelError, match="edited copy"):
        model_identity(edited)
    with pytest.raises(sf.ModelError, match="not loaded"):
        weights(build("llama").to("meta"))
