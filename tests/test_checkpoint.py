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
from helpers import RAGGED, build, make_sae, unit, watch, wrapped
from saefeat.files.checkpoint import Checkpoint
from saefeat.files.hashing import digest, weights
from saefeat.generation import Sample
from saefeat.results.provenance import model_identity

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
        pytest.raises(sf.errors.CheckpointError, match=f"differs in {name} "),
        Checkpoint(tmp_path, {**JOB, name: "other"}),
    ):
        pass


def test_folders_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(sf.errors.CheckpointError, match=name), Checkpoint(tmp_path / name, JOB):
            pass
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_identity_is_refused(tmp_path, content):
    with Checkpoint(tmp_path, JOB) as done:
        done.save(0, {}, {})
    (tmp_path / "identity.json").write_bytes(content)
    with (
        pytest.raises(sf.errors.CheckpointError, match="cannot be read"),
        Checkpoint(tmp_path, JOB),
    ):
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
        said = sf.errors.FileError if trouble is OSError else trouble
        for number in (0, 1):
            with pytest.raises(said):
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
    with pytest.raises(sf.errors.CheckpointError, match="object"):
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
    with pytest.raises(sf.errors.ModelError, match="edited copy"):
        model_identity(edited)
    with pytest.raises(sf.errors.ModelError, match="not loaded"):
        weights(build("llama").to("meta"))


# ---------------------------------------------------------------- run and stream


PROMPTS = [*RAGGED, "w20 w21", "w5 w6 w7"]


def job() -> sf.verbs.base.Chain:
    sae = make_sae(seed=1)
    edit = sf.Clamp(sae.latents([3, 4]) | make_sae(layer=0, seed=2).latents([5]), 3.0)
    means = sf.Probe(sae.latents([6]), reduce="mean")
    return edit | sf.Probe(sae.latents([7, 8]), where=sf.Tokens.last(2)) | means


OPTIONS = {"max_new_tokens": 4, "decode": Sample(0.9, seed=3), "batch_size": 2}


def passes(model) -> list:
    """Counts forward passes from here on."""
    seen: list = []
    WATCHES.append(watch(model, lambda *_: seen.append(1)))
    return seen


WATCHES: list = []


@pytest.fixture(autouse=True)
def nothing_is_watched_behind_a_test():
    yield
    while WATCHES:
        WATCHES.pop().remove()


def require_equal_runs(a: sf.results.Run, b: sf.results.Run) -> None:
    for name in ("prompts", "completions", "texts", "receipt"):
        assert getattr(a, name) == getattr(b, name), name
    assert torch.equal(a.logits, b.logits)
    for one, other in zip(a.readings, b.readings, strict=True):
        assert repr(one.latents) == repr(other.latents)
        for name in ("values", "mask", "counts"):
            x, y = getattr(one, name), getattr(other, name)
            assert (x is None and y is None) or torch.equal(x, y), name
    for one, other in zip(a.receipt.rows, b.receipt.rows, strict=True):
        assert len(one.events) and one.events.sites == other.events.sites
        for name, column in one.events.columns().items():
            assert torch.equal(column, other.events.columns()[name]), name
    first, second = a.provenance.to_dict(), b.provenance.to_dict()
    assert first | {"created": ""} == second | {"created": ""}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    wanted = sf.run(wrapped(build("llama")), PROMPTS, job(), **OPTIONS)
    for stopped in range(3):  # after so many batches
        model, folder = build("llama"), tmp_path / str(stopped)
        seen: list = []

        def interrupt(*_, seen=seen, stopped=stopped):
            seen.append(1)
            if len(seen) > 4 * stopped:
                raise KeyboardInterrupt

        handle = watch(model, interrupt)
        with pytest.raises(KeyboardInterrupt):
            sf.run(wrapped(model), PROMPTS, job(), **OPTIONS, checkpoint=folder)
        handle.remove()
        assert len(list(folder.glob("batch-*"))) == stopped
        count = passes(model)
        found = sf.run(wrapped(model), PROMPTS, job(), **OPTIONS, checkpoint=folder)
        require_equal_runs(found, wanted)
        assert len(count) == 4 * (3 - stopped)
        again = sf.run(wrapped(model), PROMPTS, job(), **OPTIONS, checkpoint=str(folder))
        require_equal_runs(again, wanted)
        assert len(count) == 4 * (3 - stopped), "nothing is run twice"


def test_a_stream_goes_on_where_it_stopped(tmp_path):
    model = build("llama")
    nn, count = wrapped(model), passes(model)
    first = sf.run(nn, iter(PROMPTS), job(), **OPTIONS, checkpoint=tmp_path, stream=True)
    one = next(first)
    first.close()
    rest = list(sf.run(nn, iter(PROMPTS), job(), **OPTIONS, checkpoint=tmp_path, stream=True))
    require_equal_runs(rest[0], one)
    assert len(rest) == 3 and len(count) == 3 * 4
    wanted = sf.run(nn, PROMPTS, job(), **OPTIONS, checkpoint=tmp_path)  # run reads it too
    assert len(count) == 3 * 4
    assert wanted.completions == sum((part.completions for part in rest), ())


def test_a_bad_prompt_may_be_mended_and_the_job_goes_on(tmp_path):
    model = build("llama")
    nn, count = wrapped(model), passes(model)
    bad = [*PROMPTS[:4], ""]
    with pytest.raises(sf.errors.PromptError, match=r"prompts 4\.\.4"):
        list(sf.run(nn, bad, job(), **OPTIONS, checkpoint=tmp_path, stream=True))
    assert len(count) == 2 * 4
    found = list(sf.run(nn, PROMPTS, job(), **OPTIONS, checkpoint=tmp_path, stream=True))
    assert len(count) == 3 * 4 and len(found) == 3


OTHER = {
    "intervention": lambda: {"intervention": sf.Clamp(make_sae(seed=1).latents([3, 4]), 3.5)},
    "prompts": lambda: {"prompts": ["w9", *PROMPTS[1:]]},
    "max_new_tokens": lambda: {"max_new_tokens": 5},
    "seed": lambda: {"decode": Sample(0.9, seed=4)},
    "temperature": lambda: {"decode": Sample(0.8, seed=3)},
    "top_k": lambda: {"decode": Sample(0.9, seed=3, top_k=9)},
    "stops": lambda: {"decode": Sample(0.9, seed=3, stop=(9,))},
    "batch_size": lambda: {"batch_size": 3},
}


@pytest.mark.parametrize("name", [*OTHER, "weights", "configuration", "generation configuration"])
def test_another_call_is_refused_by_name(tmp_path, name):
    model = build("llama")
    given = {"prompts": PROMPTS, "intervention": job(), **OPTIONS, "checkpoint": tmp_path}
    sf.run(wrapped(model), **given)
    if name == "weights":
        with torch.no_grad():
            model.lm_head.weight[3, 3] += 1e-3
    elif name == "configuration":
        model.config.rms_norm_eps = 0.1
    elif name == "generation configuration":
        model.generation_config.repetition_penalty = 1.1
    else:
        given |= OTHER[name]()
    seen = passes(model)
    with pytest.raises(sf.errors.CheckpointError, match=rf"differs in [\w, ]*\b{name}\b"):
        sf.run(wrapped(model), **given)
    assert not seen, "refused before anything is run"


def test_values_by_prompt_count_in_full(tmp_path):
    nn = wrapped(build("llama"))
    v = sf.Direction(torch.eye(32), site="resid_post.1")
    values = torch.zeros(5, 32)
    sf.run(nn, PROMPTS, sf.Clamp(v, add=values + 1), checkpoint=tmp_path)
    values[3, 17] += 1e-4
    with pytest.raises(sf.errors.CheckpointError, match="intervention"):
        sf.run(nn, PROMPTS, sf.Clamp(v, add=values + 1), checkpoint=tmp_path)


@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.99])
def test_a_damaged_batch_is_run_again(tmp_path, keep):
    model = build("llama")
    wanted = sf.run(wrapped(model), PROMPTS, job(), **OPTIONS, checkpoint=tmp_path)
    file = tmp_path / "batch-000001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    count = passes(model)
    with pytest.warns(UserWarning, match="batch-000001.*damaged"):
        found = sf.run(wrapped(model), PROMPTS, job(), **OPTIONS, checkpoint=tmp_path)
    require_equal_runs(found, wanted)
    assert len(count) == 4
    sf.run(wrapped(model), PROMPTS, job(), **OPTIONS, checkpoint=tmp_path)
    assert len(count) == 4 and file.read_bytes() == content


def test_edited_copies_have_no_checkpoint(tmp_path):
    nn = wrapped(build("llama"))
    edited = sf.edit(nn, sf.Ablate(sf.Direction(unit(), site="resid_post.1")))
    with pytest.raises(sf.errors.ModelError, match="edited copy"):
        sf.run(edited, PROMPTS, checkpoint=tmp_path / "job")
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("folder", ["/dev/null/job", "a\0b", "x" * 300])
def test_a_folder_that_cannot_be_made_is_an_error_of_ours(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        sf.errors.FileError, match=r"run: `checkpoint` is .* cannot be made or read"
    ):
        sf.run(wrapped(build("llama")), PROMPTS, checkpoint=folder)
