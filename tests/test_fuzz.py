"""Damaged files: an error of ours, or the dictionary itself; never another one, never a crash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saefeat as sf
from test_loading_layouts import (
    D,
    N,
    dump,
    flat,
    linear,
    llama,
    native,
    npz,
    save,
    state_of,
    tensors,
    threshold,
    trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not say by how much")
SITE = "resid_post.1"
FUZZ = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _dictionary_learning(folder: Path) -> None:
    dump(trainer("GatedAutoEncoder"), folder / "config.json")
    save(state_of("GatedAutoEncoder"), folder / "ae.safetensors")


def _sparsify(folder: Path) -> None:
    dump({"activation": "topk", "k": 5, "d_in": D, "num_latents": N}, folder / "cfg.json")
    t = tensors()
    state = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"]}
    save(state | {"W_dec": t["W_dec"], "b_dec": t["b_dec"]}, folder / "sae.safetensors")


def _scope_2(folder: Path) -> None:
    lower = {name.lower(): t for name, t in (tensors() | {"threshold": threshold()}).items()}
    save(lower, folder / "params.safetensors")


def _distilled(folder: Path) -> None:
    config = {"d_model": D, "expansion_factor": 3, "hook_point_in": "blocks.3.hook_resid_post"}
    norms = {"dataset_average_activation_norm": {"in": 3.0, "out": 3.0}}
    dump(config | norms, folder / "config.json")
    logs = {"log_jumprelu_threshold": threshold().clamp(min=0.01).log()}
    save(linear(tensors()) | logs, folder / "sae_weights.safetensors")


LAYOUTS = {
    "native": lambda f: native(f, flat(architecture="jumprelu"), threshold=threshold()),
    "topk": lambda f: native(f, flat(activation_fn_str="topk", activation_fn_kwargs={"k": 4})),
    "gemma scope": npz,
    "compressed": lambda f: npz(f, compressed=True),
    "gemma scope 2": _scope_2,
    "llama scope": lambda f: llama(f, 3.0),
    "distilled": _distilled,
    "dictionary_learning": _dictionary_learning,
    "sparsify": _sparsify,
}


CONFIGURED = [n for n in LAYOUTS if n not in ("gemma scope", "compressed", "gemma scope 2")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every layout's files, undamaged, and what they compute."""
    found = {}
    for name, write in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("layout") / "sae"
        write(folder)
        found[name] = (folder, computed(folder))
    return found


def computed(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    sae = sf.load_sae(folder, site=SITE)
    assert (sae.d_in, sae.d_sae) == (D, N)
    part = sae.encode(x, [3, 1])
    return sae.encode(x), sae.directions(), part


def copied(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / "damaged"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target


def same_or_refused(folder: Path, wanted) -> None:
    try:
        got = computed(folder)
    except sf.SaefeatError:
        return
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def files_of(folder: Path, *, weights: bool) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if (path.suffix != ".json") == weights]


@pytest.mark.parametrize("layout", LAYOUTS)
@FUZZ
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_anywhere(whole, tmp_path, layout, share):
    """Weights and configurations alike."""
    for path in (
        p.relative_to(whole[layout][0]) for p in whole[layout][0].rglob("*") if p.is_file()
    ):
        folder = copied(whole[layout][0], tmp_path)
        raw = (folder / path).read_bytes()
        (folder / path).write_bytes(raw[: int(share * len(raw))])
        with pytest.raises(sf.SaefeatError):
            computed(folder)


def header_end(raw: bytes, suffix: str) -> int:
    """Where a weights file's first header ends; npz has more, and a directory at its end."""
    return 8 + int.from_bytes(raw[:8], "little") if suffix == ".safetensors" else 200


@pytest.mark.parametrize("layout", LAYOUTS)
@FUZZ
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), at_end=st.booleans())
def test_a_byte_of_a_header(whole, tmp_path, layout, place, value, at_end):
    """One byte of a header: refused, or of no consequence."""
    folder, wanted = copied(whole[layout][0], tmp_path), whole[layout][1]
    path = files_of(folder, weights=True)[0]
    raw = bytearray(path.read_bytes())
    size = header_end(raw, path.suffix)
    at_end = at_end and path.suffix == ".npz"
    raw[len(raw) - 1 - place % size if at_end else place % size] = value
    path.write_bytes(raw)
    same_or_refused(folder, wanted)


JSON = st.none() | st.booleans() | st.integers(-3, 10**9) | st.floats() | st.text(max_size=8)
JSON = JSON | st.lists(JSON, max_size=2) | st.dictionaries(st.text(max_size=4), JSON, max_size=2)


@pytest.mark.parametrize(
    "layout", [n for n in LAYOUTS if n not in ("gemma scope", "compressed", "gemma scope 2")]
)
@FUZZ
@given(data=st.data())
def test_a_configuration_of_other_types(whole, tmp_path, layout, data):
    """Any entry replaced by anything, or left out: an error of ours, or a whole dictionary."""
    folder = copied(whole[layout][0], tmp_path)
    path = files_of(folder, weights=False)[0]
    config = json.loads(path.read_text())
    inner = config.get("trainer", config)
    key = data.draw(st.sampled_from(sorted(inner)))
    if data.draw(st.booleans()):
        inner[key] = data.draw(JSON)
    else:
        del inner[key]
    path.write_text(json.dumps(config))
    try:
        f, directions, part = computed(folder)
    except sf.SaefeatError:
        return
    assert f.shape == (3, N) and directions.shape == (N, D) and part.shape == (3, 2)


@pytest.mark.parametrize(
    "layout", [n for n in LAYOUTS if n not in ("gemma scope", "compressed", "gemma scope 2")]
)
@FUZZ
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_byte_of_a_configuration(whole, tmp_path, layout, place, value):
    folder = copied(whole[layout][0], tmp_path)
    path = files_of(folder, weights=False)[0]
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] = value
    path.write_bytes(raw)
    try:
        found = computed(folder)
    except sf.SaefeatError:
        return
    assert found[0].shape == (3, N)


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "compressed"])
def test_a_folder_among_others_is_refused_by_load_saes_too(whole, tmp_path, layout):
    folder = copied(whole[layout][0], tmp_path)
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x80\x04" + path.read_bytes()[2:20])
    with pytest.raises(sf.SaefeatError):
        sf.load_saes(tmp_path, ids={SITE: "damaged"})[SITE].encode(torch.zeros(D))


# ---------------------------------------------------------------- what bytes cannot tell


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [("standard", {"threshold": N}), ("topk", {"threshold": N}), ("standard", {"r_mag": N})],
)
def test_tensors_of_an_undeclared_architecture_are_refused(tmp_path, architecture, extra):
    """A JumpReLU SAE whose configuration lost its architecture would be read as a plain one."""
    more = {name: torch.ones(size) for name, size in extra.items()}
    k = {"k": 3} if architecture == "topk" else {}
    native(tmp_path / "sae", flat(architecture=architecture, **k), **more)
    with pytest.raises(sf.errors.DictionaryError, match=next(iter(extra))):
        sf.load_sae(tmp_path / "sae")


@pytest.mark.parametrize("k", [-3, 0, N + 1])
def test_a_k_that_cannot_be(tmp_path, k):
    native(tmp_path / "sae", flat(activation_fn_str="topk", activation_fn_kwargs={"k": k}))
    with pytest.raises(sf.errors.DictionaryError, match="k"):
        sf.load_sae(tmp_path / "sae")


def test_whole_numbers_are_no_weights(tmp_path):
    whole_numbers = {name: (10 * t).to(torch.int32) for name, t in tensors().items()}
    dump(flat(), tmp_path / "cfg.json")
    save(whole_numbers, tmp_path / "sae_weights.safetensors")
    with pytest.raises(sf.errors.DictionaryError, match="int32"):
        sf.load_sae(tmp_path).encode(torch.zeros(D))


@pytest.mark.parametrize(
    ("old", "new"), [(b"'<f4'", b"'>f4'"), (b"'<f4'", b"'<i4'"), (b"'<f4'", b"'<f2'")]
)
def test_another_type_of_number_in_an_npz_header(tmp_path, old, new):
    npz(tmp_path)
    path = tmp_path / "params.npz"
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(sf.errors.DictionaryError):
        sf.load_sae(tmp_path, site=SITE)
