"""Loading releases: all of sae-lens's directory is planned, and read from a filled cache.

No weights are downloaded: the tests write tiny files under the releases' own file names into a
Hugging Face cache as the hub writes it (refs, blobs, snapshots), and compare with sae-lens's own
converters reading the same cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import saefeat as sf
from saefeat.loading import directory
from saefeat.loading.declaration import width_in, width_of
from saefeat.loading.directory import choose
from saefeat.loading.released import files
from test_loading_layouts import (
    HYPER,
    D,
    N,
    agree,
    built,
    flat,
    linear,
    state_of,
    tensors,
    threshold,
    trainer,
    values,
)

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Cache:
    """A Hugging Face cache on disk, in the hub's layout."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, repo: str, name: str, content: object) -> None:
        """Add a file: a state dict, a dict of arrays, a configuration, or bytes."""
        place = self.root / f"models--{repo.replace('/', '--')}"
        raw = self._bytes(name, content)
        blob = place / "blobs" / hashlib.sha256(raw).hexdigest()
        link = place / "snapshots" / REVISION / name
        for folder in (blob.parent, link.parent, place / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(raw)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        (place / "refs" / "main").write_text(REVISION)

    def _bytes(self, name: str, content: object) -> bytes:
        scratch = self.root / "scratch"
        if isinstance(content, bytes):
            return content
        if name.endswith((".json", ".yaml")):
            return json.dumps(content).encode()
        assert isinstance(content, dict)
        if name.endswith(".safetensors"):
            save_file({n: t.clone().contiguous() for n, t in content.items()}, scratch)
        elif name.endswith(".npz"):
            with scratch.open("wb") as file:
                np.savez(file, **{n: t.numpy() for n, t in content.items()})
        else:
            torch.save(content, scratch)
        return scratch.read_bytes()

    def fill(self, release: str, sae_id: str, *contents: object) -> None:
        """The files of one SAE, in the order in which ``released.files`` names them."""
        found = directory.release(release)
        entry = next(entry for entry in found.entries if entry.id == sae_id)
        names = files(found, entry)
        assert len(names) == len(contents)
        for name, content in zip(names, contents, strict=True):
            self.put(found.repo, name, content)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Cache:
    root = tmp_path / "home" / "hub"
    root.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    return Cache(root)


def converted(release: str, sae_id: str):
    """sae-lens's object from the same cache, at the width of the tiny files."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading import pretrained_saes_directory as listed

    convert = loaders.NAMED_PRETRAINED_SAE_LOADERS[loaders.get_conversion_loader_name(release)]
    repo, folder = listed.get_repo_id_and_folder_name(release, sae_id)
    overrides = listed.get_config_overrides(release, sae_id) | {"dtype": "float32"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config, state, _ = convert(repo, folder, "cpu", False, overrides)
    return built(config, state, listed.get_norm_scaling_factor(release, sae_id))


def one(release: str, sae_id: str):
    return next(iter(sf.load_saes(release, ids=[sae_id]).values()))


# ------------------------------------------------------------------ the whole directory


@pytest.mark.slow
def test_every_sae_of_the_directory_is_planned_or_refused_with_a_reason():
    planned, refused, unplaced = 0, Counter(), Counter()
    for name in directory.names():
        release = directory.release(name)
        assert release.conversion == "sae_lens" or files(release, release.entries[0])
        for entry in release.entries:
            if entry.problem:
                refused[release.conversion] += 1
            elif entry.trouble:
                assert entry.hook, f"no hook is known for {name}/{entry.id}"
                unplaced[re.sub(r"\d+", "L", entry.hook)] += 1
            else:
                planned += 1
    assert len(directory.names()) == 170
    assert planned + refused.total() + unplaced.total() == 13_857
    assert refused == {}
    assert unplaced == {}  # every hook has a place


@pytest.mark.slow
def test_the_plan_is_sae_lenss_directory():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    theirs = get_pretrained_saes_directory()
    assert list(theirs) == directory.names()
    for name, found in theirs.items():
        ours = directory.release(name)
        assert (ours.repo, ours.overrides) == (found.repo_id, found.config_overrides or {})
        assert {e.id: e.path for e in ours.entries} == found.saes_map
        assert {e.id: e.scale for e in ours.entries if e.scale} == found.norm_scaling_factor


def test_sites_are_those_of_sae_lenss_own_configurations():
    """Where sae-lens knows the hook from names alone, without a file."""
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_CONFIG_GETTERS

    named = ("gemma_2", "gemma_2_transcoder", "qwen_scope", "deepseek_r1", "goodfire")
    compared = 0
    for name in directory.names():
        release = directory.release(name)
        if release.conversion not in named:
            continue
        for entry in release.entries:
            getter = NAMED_PRETRAINED_SAE_CONFIG_GETTERS[release.conversion]
            config = getter(release.repo, entry.path, "cpu", False, None)
            assert entry.hook == config["hook_name"], (name, entry)
            assert entry.hook_out == config.get("hook_name_out"), (name, entry)
            if release.conversion.startswith(("gemma", "qwen")):
                assert entry.width == config["d_sae"], (name, entry)
            compared += 1
    assert compared > 3_000


def test_the_papers_choice_is_made_without_sae_lens_or_a_network():
    code = """
import sys, saefeat as sf
saes = sf.load_saes("gemma-scope-2b-pt-res", sites="resid_post", width="65k", l0=100)
assert len(saes) == 26 and "not read yet" in repr(saes), saes
assert saes[12].name.endswith("layer_12/width_65k/average_l0_72"), saes[12]
assert saes[15].name.endswith("layer_15/width_65k/average_l0_127"), saes[15]
assert not {"sae_lens", "transformer_lens"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize(
    ("release", "choice", "sites"),
    [
        ("gemma-scope-2b-pt-res-canonical", {"width": "16k"}, 26),
        ("gemma-scope-2b-pt-mlp", {"width": 65536, "l0": 60}, 26),
        ("gemma-scope-2-1b-pt-res-all", {"width": "262k", "l0": 10}, 26),
        ("gemma-scope-9b-it-res", {"sites": ["resid_post.9", "resid_post.31"], "width": "16k",
                                   "l0": 90}, 2),
        ("gpt2-small-res-jb", {"sites": "resid_pre"}, 12),
        ("llama_scope_lxr_8x", {"width": "32k", "l0": 50}, 32),
        ("qwen-scope-3-1.7b-base-w32k-l50", {"width": "32k"}, 28),
        ("sae_bench_pythia70m_sweep_topk_ctx128_0730", {"ids": "*trainer_0"}, 2),
        ("gemma-2-2b-res-matryoshka-dc", {"width": 32768, "l0": 40}, 25),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", {}, 26),
    ],
)  # fmt: skip
def test_releases_are_chosen_from(release, choice, sites):
    assert len(sf.load_saes(release, **choice)) == sites


@pytest.mark.parametrize(
    ("release", "choice", "said"),
    [
        ("gemma-scope-2b-pt-rez", {}, "perhaps gemma-scope-2b-pt-res"),
        ("google/gemma-scope-2b-pt-res", {}, "gemma-scope-2b-pt-res-canonical"),
        ("gemma-scope-2b-pt-res", {"sites": "resid_pot"}, "perhaps resid_post"),
        ("gemma-scope-2b-pt-res", {"sites": "resid_post", "width": "66k"}, "65,536"),
        ("gemma-scope-2b-pt-res", {"sites": "resid_post"}, "`width`.*16,384"),
        ("gemma-scope-2b-pt-res", {"sites": "resid_post", "width": "65k"}, "`l0`"),
        ("gemma-scope-2b-pt-res", {"ids": ["layer_12/width_16k/average_l0_81"]}, "average_l0_82"),
        ("gemma-scope-2b-pt-res", {"width": "4k"}, "4 SAEs at embed"),
        ("gpt2-small-attn-out-v5-32k", {"l0": 30}, "no L0"),
        ("gemma-scope-2-4b-pt-res", {"width": "262k", "l0": 60}, r"medium_seed_1.*\*_big"),
        ("some/repository", {"ids": ["folder"]}, "ids={"),
    ],
)
def test_what_does_not_fit_is_said_with_what_is_there(release, choice, said):
    with pytest.raises(sf.SaefeatError, match=said):
        sf.load_saes(release, **choice)


def test_the_sparser_of_two_as_near_is_chosen():
    entries = directory.release("gemma-scope-2b-pt-res").entries
    pair = [e for e in entries if e.path.startswith("layer_12/width_65k")][:2]
    low, high = sorted(e.l0 for e in pair)
    (chosen,) = choose(pair, "x", l0=(low + high) / 2)
    assert chosen.l0 == low


@pytest.mark.parametrize(
    ("label", "width"),
    [("4k", 4096), ("16k", 16384), ("64k", 65536), ("65k", 65536), ("80k", 81920),
     ("131k", 131072), ("1m", 2**20), (512, 512), ("512", 512)],
)  # fmt: skip
def test_width_labels(label, width):
    assert width_of(label) == width


def test_widths_in_names():
    found = {
        "layer_5/width_1m/average_l0_9": 2**20, "blocks.8.hook_resid_pre_768": 768,
        "Llama3_1-8B-Base-L0A-32x ": 131072, "v5_128k_layer_0 ": 131072,
        "blocks.12.hook_resid_post__trainer_1_step_488": None,
    }  # fmt: skip
    assert {text: width_in(text) for text in found} == found


# ------------------------------------------------------------------ the same as sae-lens

NEW = {
    "architecture": "jumprelu", "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.3.hook_resid_post"},
}  # fmt: skip
JUMP = tensors() | {"threshold": threshold()}
CENTERED = tensors() | {"b_dec": tensors()["b_dec"] + 1.0}  # a mean that must stay
LOWER = {name.lower(): tensor for name, tensor in JUMP.items()}


def llama_norm(factor: float) -> dict:
    norm = math.sqrt(D) / factor
    return HYPER | {"dataset_average_activation_norm": {"in": norm, "out": norm}}


def factor_of(release: str, sae_id: str) -> float:
    return next(e.scale for e in directory.release(release).entries if e.id == sae_id)


RELEASED = {
    "flat native": ("gemma-2b-res-jb", "blocks.12.hook_resid_post", (
        flat(hook_name="blocks.12.hook_resid_post", normalize_activations=True), tensors())),
    "native factor": ("gpt2-small-mlp-tm", "blocks.6.hook_mlp_out", (
        flat(hook_name="blocks.6.hook_mlp_out", normalize_activations=True), CENTERED)),
    "norm override": ("mistral-7b-res-wg", "blocks.8.hook_resid_pre", (
        flat(hook_name="blocks.8.hook_resid_pre"), tensors())),
    "topk layer norm": ("gpt2-small-resid-post-v5-32k", "blocks.4.hook_resid_post", (
        flat(hook_name="blocks.4.hook_resid_post", normalize_activations="layer_norm",
             activation_fn_str="topk", activation_fn_kwargs={"k": 6}), tensors())),
    "new native": ("gemma-2-2b-res-matryoshka-dc", "blocks.3.hook_resid_post", (NEW, JUMP)),
    "gemma scope": ("gemma-scope-2b-pt-res", "layer_12/width_65k/average_l0_72", (JUMP,)),
    "gemma scope mlp": ("gemma-scope-2b-pt-mlp-canonical", "layer_3/width_16k/canonical", (JUMP,)),
    "gemma transcoder": (
        "gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76", (JUMP,)),
    "gemma scope 2": ("gemma-scope-2-1b-pt-res", "layer_13_width_16k_l0_big", (LOWER,)),
    "gemma scope 2 affine": (
        "gemma-scope-2-1b-pt-transcoders", "transcoder/layer_13_width_16k_l0_big_affine",
        (LOWER | {"affine_skip_connection": torch.randn(D, D)},)),
    "llama scope": ("llama_scope_lxr_8x", "l0r_8x", (
        llama_norm(factor_of("llama_scope_lxr_8x", "l0r_8x")), linear(tensors()))),
    "llama scope distilled": ("llama_scope_r1_distill", "l3r_800m_slimpajama", (
        {"d_model": D, "expansion_factor": 3, "hook_point_in": "blocks.3.hook_resid_post"},
        linear(tensors()) | {"log_jumprelu_threshold": threshold().log()})),
    "mwhanna": ("mwhanna-qwen3-4b-transcoders", "layer_7", (
        tensors() | {"W_enc": tensors()["W_enc"].T},)),
    "pickled gated": ("sae_bench_pythia70m_sweep_gated_ctx128_0730",
        "blocks.3.hook_resid_post__trainer_0",
        (trainer("GatedAutoEncoder"), state_of("GatedAutoEncoder"))),
    "pickled topk": ("sae_bench_pythia70m_sweep_topk_ctx128_0730",
        "blocks.3.hook_resid_post__trainer_1",
        (trainer("AutoEncoderTopK", k=7), state_of("AutoEncoderTopK"))),
    "pickled matryoshka": ("saebench_gemma-2-2b_width-2pow12_date-0108",
        "blocks.12.hook_resid_post__trainer_0",
        (trainer("MatryoshkaBatchTopKSAE", layer=12), state_of("MatryoshkaBatchTopKSAE"))),
    "pickled hook_z": ("gpt2-small-hook-z-kk", "blocks.1.hook_z", (
        {"act_size": D, "dict_size": N, "act_name": "blocks.1.attn.hook_z"}, tensors())),
}  # fmt: skip


@pytest.fixture
def local_shapes(cache, monkeypatch):
    """sae-lens asks the network for the shapes in Gemma Scope 2 files; answer from the cache."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def shapes(repo: str, name: str) -> dict:
        with safe_open(huggingface_hub.hf_hub_download(repo, name), framework="pt") as file:
            return {n: file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    shared = "wandb-config.yaml", "config.yaml"
    contents = (
        {key: {"value": n} for key, n in {"d_model": D, "d_feature": N, "batch_size": 1}.items()},
        {"model_name": "Qwen/Qwen3-4B"},
    )
    for name, content in zip(shared, contents, strict=True):
        cache.put("mwhanna/qwen3-4b-transcoders", name, content)


@pytest.mark.parametrize("case", RELEASED)
def test_a_release_reads_as_sae_lens_reads_it(cache, local_shapes, case):
    release, sae_id, contents = RELEASED[case]
    cache.fill(release, sae_id, *contents)
    hook = "resid_mid.7" if "transcoders" in release else None  # their own may be no site yet
    saes = sf.load_saes(release, ids={hook: sae_id} if hook else [sae_id])
    ours, theirs = next(iter(saes.values())), converted(release, sae_id)
    x = values() / (100 if factor_of(release, sae_id) else 1)
    if case == "native factor":  # trained on a model with centered writing weights
        agree(ours, theirs, x + 1.0, seen=x - x.mean(-1, keepdim=True))
    else:
        agree(ours, theirs, x)
    if hook:
        assert ours.write_site.kind == "mlp_out"
    assert ours.name == f"{release}/{sae_id}"
    assert (ours.origin.release, ours.origin.id) == (release, sae_id)
    assert ours.origin.revision == REVISION and ours.origin.repo in str(ours.origin)
    assert (ours.d_in, ours.d_sae) == (D, N)


def test_a_qwen_scope_pickle_goes_through_sae_lens(cache, monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders as loaders

    monkeypatch.setitem(loaders.QWEN_SCOPE_MODEL_INFO, "Qwen3-1.7B-Base", ("q", D))
    release, width = "qwen-scope-3-1.7b-base-w32k-l50", 32768
    t = tensors(d_sae=width)
    turned = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"].T}
    cache.fill(release, "layer4", t | turned)
    ours = one(release, "layer4")
    agree(ours, converted(release, "layer4"))
    assert (ours.k, str(ours.site)) == (50, "resid_post.4")


def test_a_pickle_sae_lens_cannot_convert_is_refused(cache):
    release = "sae_bench_pythia70m_sweep_standard_ctx128_0712"
    sae_id = "blocks.3.hook_resid_post__trainer_10"
    cache.fill(release, sae_id, trainer("AutoEncoderNew"), state_of("AutoEncoderNew"))
    with pytest.raises(sf.errors.DictionaryError, match="sae-lens cannot convert"):
        one(release, sae_id).sae  # noqa: B018


# ------------------------------------------------------------------ lazily, offline

SCOPE, SCOPE_ID = "gemma-scope-2b-pt-res", "layer_12/width_65k/average_l0_72"


def test_nothing_is_read_before_latents_are_selected(cache):
    saes = sf.load_saes(SCOPE, sites="resid_post", width="65k", l0=100)
    assert saes[12].site.layer == 12 and "not read yet" in repr(saes[12])
    with pytest.raises(
        sf.errors.DictionaryError, match=re.escape(f"{SCOPE_ID}/params.npz")
    ) as caught:
        saes.latents({12: [3]})
    assert f"hf download google/{SCOPE}" in str(caught.value)
    cache.fill(SCOPE, SCOPE_ID, JUMP)
    assert len(saes.latents({12: [3]})) == 1
    assert "not read yet" not in repr(saes[12]) and saes[12].excluded == ()
    with pytest.raises(sf.errors.LatentError, match=f"0..{N - 1}"):
        saes.latents({12: [N]})


def test_the_fingerprint_is_that_of_the_same_files_in_a_folder(cache):
    cache.fill(SCOPE, SCOPE_ID, JUMP)
    folder = cache.root / f"models--google--{SCOPE}" / "snapshots" / REVISION / SCOPE_ID
    assert one(SCOPE, SCOPE_ID).fingerprint() == sf.load_sae(folder).fingerprint()
    assert sf.load_sae(folder).site == sf.Site("resid_post", 12)


def test_a_file_at_another_site_than_its_name_is_refused_unless_named(cache):
    release, sae_id = "gemma-2-2b-res-matryoshka-dc", "blocks.5.hook_resid_post"
    cache.fill(release, sae_id, NEW, JUMP)  # the file says layer 3
    with pytest.raises(sf.errors.DictionaryError, match=r"resid_post\.5.*resid_post\.3"):
        one(release, sae_id).d_sae  # noqa: B018
    saes = sf.load_saes(release, ids={"resid_post.5": sae_id})
    assert saes[5].d_sae == N and saes[5].site == saes[5].sae.site


def test_any_repository_of_native_folders(cache):
    for layer, name in ((3, "first"), (4, "blocks.4.hook_resid_post")):
        meta = {"sae_lens_version": "6.0.0", "hook_name": f"blocks.{layer}.hook_resid_post"}
        cache.put("me/saes", f"{name}/cfg.json", NEW | {"metadata": meta})
        cache.put("me/saes", f"{name}/sae_weights.safetensors", JUMP)
    assert sf.load_saes("me/saes", ids=["blocks.4.hook_resid_post"])[4].d_sae == N
    assert sf.load_saes("me/saes", ids={"resid_post.3": "first"})[3].d_sae == N


@pytest.mark.slow
def test_a_filled_cache_is_enough_in_a_fresh_offline_process(cache):
    cache.fill(SCOPE, SCOPE_ID, JUMP)
    torch.save(values(), cache.root / "x.pt")
    code = f"""
import sys, torch, saefeat as sf
saes = sf.load_saes({SCOPE!r}, sites=["resid_post.12"], width="65k", l0=100)
latents = saes.latents({{12: [3, 1]}})
f = saes[12].encode(torch.load({str(cache.root / "x.pt")!r}), [3, 1])
assert f.shape == (3, 5, 2) and saes[12].origin.revision == {REVISION!r}
assert "sae_lens" not in sys.modules
print(f.sum().item())
"""
    environment = os.environ | {"HF_HOME": str(cache.root.parent), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=600,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = one(SCOPE, SCOPE_ID).encode(values(), [3, 1]).sum().item()
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-5)


def test_attribution_and_edits_take_a_release_as_they_take_a_folder(cache):
    cache.fill(SCOPE, SCOPE_ID, JUMP)
    saes = sf.load_saes(SCOPE, ids=SCOPE_ID)
    assert sf.Ablate(saes.latents({12: [3, 7]})) is not None
    torch.testing.assert_close(saes[12].directions([3]), JUMP["W_dec"][[3]])


def test_a_temporal_release_goes_through_sae_lens(cache):
    """Its two files are fetched, it is computed by sae-lens, and it looks back."""
    release, sae_id = "temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post"
    config = {
        "llm": {"dimin": D},
        "sae": {
            "exp_factor": 2, "n_heads": 2, "n_attn_layers": 1, "bottleneck_factor": 4,
            "sae_diff_type": "topk", "kval_topk": 4, "tied_weights": True, "scaling_factor": 0.5,
        },
        "data": {"dtype": "float32"},
    }  # fmt: skip
    wide, narrow = 2 * D, 2 * D // 4
    shapes = {
        "D": (wide, D), "b": (D,),
        **{f"attn_layers.0.{n}.weight": (narrow, wide) for n in ("k_ctx", "q_target")},
        **{f"attn_layers.0.{n}.bias": (narrow,) for n in ("k_ctx", "q_target")},
        **{f"attn_layers.0.{n}.weight": (wide, wide) for n in ("v_ctx", "c_proj")},
        **{f"attn_layers.0.{n}.bias": (wide,) for n in ("v_ctx", "c_proj")},
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    state = {n: torch.randn(*shape, generator=generator) for n, shape in shapes.items()}
    cache.fill(release, sae_id, config, state)
    from sae_lens import SAE

    ours, theirs = one(release, sae_id), SAE.from_pretrained(release, sae_id, device="cpu")
    assert "not read yet" in repr(ours) and str(ours.site) == "resid_post.12"
    x = torch.randn(2, 5, D, generator=generator)
    with torch.no_grad():
        wanted = theirs.encode(x)
    assert ours.prefix and (wanted > 0).any()
    torch.testing.assert_close(ours.encode(x), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.directions([3]), state["D"][[3]] / 0.5)
    assert ours.origin.release == release and ours.columns(torch.tensor([1]))["local"]


def test_what_a_release_declares_is_kept_for_verify(cache):
    cache.fill(SCOPE, SCOPE_ID, JUMP)
    said = one(SCOPE, SCOPE_ID).declared
    assert (said.model, said.width, said.l0) == ("gemma-2-2b", 65536, 72.0)
    release, sae_id = "gpt2-small-mlp-tm", "blocks.0.hook_mlp_out"
    config = flat(hook_name=sae_id, normalize_activations=True, prepend_bos=True)
    cache.fill(release, sae_id, config, tensors())
    said = one(release, sae_id).declared
    assert (said.model, said.l0, said.explained) == ("gpt2-small", 15.0, 0.999)
    assert said.prepend_bos is True


def layer_of_a_clt(n: int, layers: int) -> tuple[dict, dict, dict]:
    """A cross-layer transcoder's configuration, and the files of one layer."""
    g = torch.Generator().manual_seed(n)
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    config = {"model_name": "google/gemma-2-2b", "model_kind": "cross_layer_transcoder", **hooks}
    encoder = {
        f"W_enc_{n}": torch.randn(N, D, generator=g), f"b_enc_{n}": torch.randn(N, generator=g),
        f"b_dec_{n}": torch.randn(D, generator=g),
    }  # fmt: skip
    return config, encoder, {f"W_dec_{n}": torch.randn(N, layers - n, D, generator=g)}


def test_a_released_cross_layer_transcoder_writes_at_every_later_layer(cache):
    name = "mntss-gemma-2-2b-2.5m-clt-as-per-layer"
    config, encoder, decoder = layer_of_a_clt(1, 4)
    cache.fill(name, "layer_1", config, encoder, decoder)
    ours = one(name, "layer_1")
    assert [str(site) for site in ours.write_sites] == ["mlp_out.1", "mlp_out.2", "mlp_out.3"]
    assert str(ours.site) == "resid_mid.1" and ours.origin.revision == REVISION
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens.loading import pretrained_sae_loaders as loaders

        shapes = {key: list(tensor.shape) for key, tensor in encoder.items()}
        original, loaders.get_safetensors_tensor_shapes = (
            loaders.get_safetensors_tensor_shapes, lambda *_: shapes,
        )  # fmt: skip
        try:
            theirs = converted(name, "layer_1")
        finally:
            loaders.get_safetensors_tensor_shapes = original
    x = values()
    assert torch.allclose(ours.encode(x), theirs.encode(x), atol=1e-5)
    # what sae-lens sums over layers, which belongs to no site
    assert torch.allclose(sum(ours.writes().values()), theirs.W_dec, atol=1e-5)
    config |= {"feature_input_hook": "mlp.hook_in"}
    cache.put("mntss/clt-gemma-2-2b-2.5M", "config.yaml", config)
    with pytest.raises(sf.errors.DictionaryError, match=r"resid_mid\.1 by its name and at mlp_in"):
        one(name, "layer_1").columns(torch.tensor([0]))
