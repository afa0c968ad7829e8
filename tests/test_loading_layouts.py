"""Loading folders: every layout of the field, written as its library writes it, read lazily.

Oracles: sae-lens's own converters where they read local files, else the owning library's
formulas written out. Releases are in ``test_loading_releases.py``, which uses the writers here.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import saefeat as sf
from saefeat.dictionaries.weights import Npz

D, N = 16, 48  # widths of the site and of the dictionaries


def tensors(seed: int = 0, d_in: int = D, d_sae: int = N, d_out: int = D) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(d_in, d_sae, generator=g),
        "b_enc": torch.randn(d_sae, generator=g),
        "W_dec": torch.randn(d_sae, d_out, generator=g),
        "b_dec": torch.randn(d_out, generator=g),
    }


def values(seed: int = 9) -> torch.Tensor:
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(seed)) * 2 + 0.3


def threshold() -> torch.Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(4)) * 3


def save(state: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)


def dump(config: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def flat(**changes) -> dict:
    """A configuration as sae-lens 3 wrote it."""
    config = {
        "architecture": "standard", "d_in": D, "d_sae": N, "dtype": "torch.float32",
        "hook_name": "blocks.2.hook_resid_pre", "hook_layer": 2, "hook_head_index": None,
        "model_name": "gpt2-small", "activation_fn_str": "relu", "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "normalize_activations": "none", "device": "cpu",
        "sae_lens_training_version": None, "prepend_bos": True, "context_size": 128,
        "dataset_path": "x", "dataset_trust_remote_code": True,
    }  # fmt: skip
    return config | changes


def native(folder: Path, config: dict, **extra: torch.Tensor) -> Path:
    dump(config, folder / "cfg.json")
    save(tensors() | extra, folder / "sae_weights.safetensors")
    return folder


def npz(folder: Path, compressed: bool = False, **extra) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: t.numpy() for name, t in (tensors() | {"threshold": threshold()}).items()}
    write = np.savez_compressed if compressed else np.savez
    write(folder / "params.npz", **arrays, **extra)
    return folder


def linear(state: dict) -> dict:
    """torch's linear layers: weights the other way round."""
    return {
        "encoder.weight": state["W_enc"].T, "encoder.bias": state["b_enc"],
        "decoder.weight": state["W_dec"].T, "decoder.bias": state["b_dec"],
    }  # fmt: skip


HYPER = {
    "d_model": D, "d_sae": N, "hook_point_in": "blocks.0.hook_resid_post",
    "hook_point_out": "blocks.0.hook_resid_post", "act_fn": "jumprelu",
    "jump_relu_threshold": 0.05, "norm_activation": "dataset-wise", "top_k": 50,
    "apply_decoder_bias_to_pre_encoder": False, "use_decoder_bias": True,
}  # fmt: skip


def llama(folder: Path, norm: float, **changes) -> Path:
    norms = {"dataset_average_activation_norm": {"in": norm, "out": norm}}
    dump(HYPER | norms | changes, folder / "hyperparams.json")
    save(linear(tensors()), folder / "checkpoints" / "final.safetensors")
    return folder


def trainer(dict_class: str, **changes) -> dict:
    """dictionary_learning's config.json."""
    facts = {"dict_class": dict_class, "activation_dim": D, "dict_size": N, "layer": 3}
    facts |= {"lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3"}
    return {"trainer": facts | changes, "buffer": {"ctx_len": 128}}


def state_of(dict_class: str) -> dict:
    """A state dict with the names of dictionary_learning's class."""
    t = tensors()
    enc, dec = {"encoder.weight": t["W_enc"].T}, {"decoder.weight": t["W_dec"].T}
    bias = {"encoder.bias": t["b_enc"]}
    if dict_class == "AutoEncoder":
        return enc | bias | dec | {"bias": t["b_dec"]}
    if dict_class == "AutoEncoderNew":
        return enc | bias | dec | {"decoder.bias": t["b_dec"]}
    if dict_class == "GatedAutoEncoder":
        gates = {"r_mag": t["b_enc"] / 3, "gate_bias": t["b_enc"], "mag_bias": -t["b_enc"]}
        return enc | dec | gates | {"decoder_bias": t["b_dec"]}
    if dict_class == "JumpReluAutoEncoder":
        return t | {"threshold": threshold()}
    extra = {"k": torch.tensor(7), "threshold": torch.tensor(1.5)}
    if dict_class == "MatryoshkaBatchTopKSAE":
        return t | extra
    return enc | bias | dec | extra | {"b_dec": t["b_dec"]}


def built(config: dict, state: dict, factor: float | None = None):
    """A sae-lens object as its loader makes it, at whatever width the tensors have."""
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
    from sae_lens.registry import get_sae_class

    config = handle_config_defaulting(dict(config))
    config |= {"dtype": "float32", "device": "cpu"}
    config["d_in"], config["d_sae"] = state["W_enc"].shape
    if "transcoder" in config["architecture"]:
        config["d_out"] = state["W_dec"].shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_class, config_class = get_sae_class(config["architecture"])
        sae = sae_class(config_class.from_dict(config))
    sae.load_state_dict({name: tensor.float().clone() for name, tensor in state.items()})
    if factor is not None and config["normalize_activations"] == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(factor)
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae


@torch.no_grad()
def agree(ours, theirs, x: torch.Tensor | None = None, seen: torch.Tensor | None = None) -> None:
    """The same latents and reconstruction; ``seen`` is what theirs gets where it differs."""
    x = values() if x is None else x
    seen = x if seen is None else seen
    wanted = theirs.encode(seen)
    assert 0 < (wanted != 0).float().mean() < 1, "an oracle that never or always fires"
    torch.testing.assert_close(ours.encode(x), wanted, atol=1e-4, rtol=1e-4)
    some = [5, 0, 33]
    torch.testing.assert_close(ours.encode(x, some), wanted[..., some], atol=1e-4, rtol=1e-4)
    if seen is x:  # centering also leaves its mean to the error term
        torch.testing.assert_close(ours.reconstruct(x), theirs(x), atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------ sae-lens native

NATIVE = {
    "flat": flat(),
    "flat, old names": {
        **{k: v for k, v in flat().items() if k != "hook_name"},
        "hook_point": "blocks.2.hook_resid_pre",
        "hook_point_head_index": None,
    },
    "flat topk": flat(activation_fn_str="topk", activation_fn_kwargs={"k": 6}),
    "flat layer norm": flat(normalize_activations="layer_norm"),
    "flat norm rescale": flat(normalize_activations="constant_norm_rescale"),
    "flat without b_dec": flat(apply_b_dec_to_input=False),
    "flat false norm": flat(normalize_activations=False),
    "new": {
        "architecture": "topk", "k": 6, "d_in": D, "d_sae": N, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none", "rescale_acts_by_decoder_norm": True,
        "metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.2.hook_resid_pre"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_native_configurations_old_and_new(tmp_path, name):
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader

    folder = native(tmp_path / "sae", NATIVE[name], scaling_factor=torch.ones(N))
    sae = sf.load_sae(folder)
    assert (str(sae.site), sae.d_in, sae.d_sae, sae.name) == ("resid_pre.2", D, N, "sae")
    agree(sae, built(*sae_lens_disk_loader(folder)))


def test_a_saved_inference_model_is_read_as_sae_lens_reads_it(tmp_path):
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    config = JumpReLUSAEConfig(D, N, metadata=SAEMetadata(hook_name="blocks.1.hook_mlp_out"))
    theirs = JumpReLUSAE(config)
    theirs.load_state_dict(tensors() | {"threshold": threshold()})
    theirs.save_model(tmp_path)
    agree(sf.load_sae(tmp_path), theirs)
    agree(sf.load_sae(theirs), theirs)
    assert sf.load_sae(tmp_path, site="resid_post.3").site == sf.Site("resid_post", 3)


def test_a_fine_tuned_sae_decodes_with_its_factor(tmp_path):
    factor = torch.rand(N) + 0.5
    folder = native(tmp_path, flat(finetuning_scaling_factor=True), scaling_factor=factor)
    plain, tuned = (
        sf.SAE.from_tensors(tensors(), site="resid_pre.2", subtract_bias=True),
        sf.load_sae(folder),
    )
    x = values()
    torch.testing.assert_close(tuned.encode(x), plain.encode(x))
    wanted = (plain.encode(x) * factor) @ tensors()["W_dec"] + tensors()["b_dec"]
    torch.testing.assert_close(tuned.reconstruct(x), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tuned.directions([7]), factor[7] * plain.directions([7]))
    assert plain.fingerprint() != tuned.fingerprint()
    undeclared = native(tmp_path / "b", flat(), scaling_factor=factor)
    with pytest.raises(sf.errors.DictionaryError, match="finetuning_scaling_factor"):
        sf.load_sae(undeclared)


def test_an_activation_factor_beside_the_file_is_folded_in(tmp_path):
    config = flat(normalize_activations=True)
    folder = native(tmp_path / "known", config)
    dump({"scaling_factor": 0.5, "has_whitening": False}, folder / "activation_scaler.json")
    state = {name: tensor.clone() for name, tensor in tensors().items()}
    agree(sf.load_sae(folder), built(config, state, factor=0.5))
    unknown = native(tmp_path / "unknown", config)
    with pytest.warns(UserWarning, match="check its L0"):
        agree(sf.load_sae(unknown), built(config, state))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (flat(activation_fn_str="tanh-relu"), "tanh-relu"),
        (flat(hook_head_index=3), "head 3"),
        (flat(architecture="temporal"), "temporal"),
        (flat(architecture="matching_pursuit"), "matching_pursuit"),
        (flat(normalize_activations="covariance_whitening"), "covariance_whitening"),
        (flat(hook_name=None), "site="),
    ],
)
def test_what_cannot_be_computed_is_refused(tmp_path, config, said):
    with pytest.raises(sf.errors.DictionaryError, match=said):
        sf.load_sae(native(tmp_path, config))


# ------------------------------------------------------------------ Gemma Scope


@pytest.mark.parametrize("compressed", [False, True])
def test_gemma_scope_npz(tmp_path, compressed):
    place = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    sae = sf.load_sae(npz(place, compressed))
    assert (sae.site.hook, sae.d_sae) == ("blocks.12.hook_resid_post", N)
    assert sae.name == "layer_12/width_16k/average_l0_82"
    config = flat(architecture="jumprelu", apply_b_dec_to_input=False)
    agree(sae, built(config, tensors() | {"threshold": threshold()}))


@pytest.mark.parametrize(
    ("repo", "read", "write"),
    [
        ("gemma-scope-9b-pt-mlp", "mlp_out", None),
        ("models--google--gemma-scope-2b-pt-transcoders/snapshots/abc", "mlp_norm", "mlp_out"),
    ],
)
def test_gemma_scope_sites_come_from_the_path(tmp_path, repo, read, write):
    sae = sf.load_sae(npz(tmp_path / repo / "layer_3" / "width_16k" / "average_l0_5"))
    assert sae.site == sf.Site(read, 3) and sae.write_site == sf.Site(write or read, 3)


def test_gemma_scope_needs_a_site_away_from_its_repository(tmp_path):
    folder = npz(tmp_path / "layer_12" / "width_16k" / "average_l0_82")
    with pytest.raises(sf.errors.DictionaryError, match="site="):
        sf.load_sae(folder)
    assert sf.load_sae(folder, site="mlp_out.12").site == sf.Site("mlp_out", 12)
    with pytest.raises(sf.errors.DictionaryError, match="ids="):
        sf.load_saes(tmp_path)
    saes = sf.load_saes(tmp_path, ids={"mlp_out.12": "layer_12/*"})
    assert saes["mlp_out.12"].name == "layer_12/width_16k/average_l0_82"


def test_gemma_scope_two(tmp_path):
    folder = tmp_path / "transcoder_all" / "layer_5_width_16k_l0_big_affine"
    state = tensors()
    skip = torch.randn(D, D)
    lower = {name.lower(): tensor for name, tensor in state.items()}
    save(lower | {"threshold": threshold(), "affine_skip_connection": skip},
         folder / "params.safetensors")  # fmt: skip
    sae = sf.load_sae(folder, site="resid_mid.5", write_site="mlp_out.5")
    config = flat(architecture="jumprelu_skip_transcoder", apply_b_dec_to_input=False)
    agree(sae, built(config, state | {"threshold": threshold(), "W_skip": skip.T}))


# ------------------------------------------------------------------ Llama Scope


def test_llama_scope_folds_its_norm(tmp_path):
    norm = 2.5
    sae = sf.load_sae(llama(tmp_path, norm))
    s, t, x = math.sqrt(D) / norm, tensors(), values()
    pre = (x * s) @ t["W_enc"] + t["b_enc"]
    f = torch.relu(pre) * (pre > HYPER["jump_relu_threshold"] * s)
    torch.testing.assert_close(sae.encode(x), f, atol=1e-4, rtol=1e-4)
    out = (f @ t["W_dec"] + t["b_dec"]) / s
    torch.testing.assert_close(sae.reconstruct(x), out, atol=1e-3, rtol=1e-3)
    assert str(sae.site) == "resid_post.0"


def test_a_llama_scope_transcoder_has_two_norms(tmp_path):
    changes = {
        "hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out",
        "dataset_average_activation_norm": {"in": math.sqrt(D), "out": 0.5},
    }  # fmt: skip
    sae = sf.load_sae(llama(tmp_path, 1.0, **changes))
    assert (str(sae.site), str(sae.write_site)) == ("mlp_norm.8", "mlp_out.8")
    torch.testing.assert_close(sae.directions([3]), tensors()["W_dec"][[3]] * 0.5 / math.sqrt(D))


def test_llama_scope_before_conversion_is_refused(tmp_path):
    with pytest.raises(sf.errors.DictionaryError, match="topk"):
        sf.load_sae(llama(tmp_path, 1.0, act_fn="topk"))


@pytest.mark.parametrize("log", [threshold().log(), torch.tensor(0.3)])
def test_llama_scope_distilled(tmp_path, log):
    config = {"d_model": D, "expansion_factor": 3, "hook_point_in": "blocks.4.hook_resid_post",
              "hook_point_out": "blocks.4.hook_resid_post", "act_fn": "jumprelu",
              "norm_activation": "dataset-wise"}  # fmt: skip
    dump(config, tmp_path / "config.json")
    state = linear(tensors()) | {"log_jumprelu_threshold": log}
    weights = tmp_path / "sae_weights.safetensors"
    save(state, weights)
    with pytest.raises(sf.errors.DictionaryError, match="dataset_average_activation_norm"):
        sf.load_sae(tmp_path)
    save(state | {"dataset_average_activation_norm.blocks.4.hook_resid_post": torch.tensor(2.0)},
         weights)  # fmt: skip
    config = flat(architecture="jumprelu", apply_b_dec_to_input=False, normalize_activations=True)
    threshold = log.exp().expand(N)
    agree(sf.load_sae(tmp_path), built(config, tensors() | {"threshold": threshold}, factor=2.0))


# ------------------------------------------------------------------ dictionary_learning


def computed(dict_class: str, t: dict, x: torch.Tensor) -> torch.Tensor:
    """Latents as dictionary_learning's classes compute them, in sae-lens's unit of a latent."""
    inner = x - t["b_dec"] if dict_class not in ("AutoEncoderNew", "JumpReluAutoEncoder") else x
    pre = inner @ t["W_enc"] + t["b_enc"]
    if dict_class == "GatedAutoEncoder":
        pre = inner @ t["W_enc"]
        return ((pre + t["b_enc"]) > 0) * torch.relu((t["b_enc"] / 3).exp() * pre - t["b_enc"])
    if dict_class == "AutoEncoderTopK":
        kept = torch.relu(pre).topk(7, dim=-1)
        return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values)
    bar = {"JumpReluAutoEncoder": threshold(), "AutoEncoder": 0.0, "AutoEncoderNew": 0.0}
    return torch.relu(pre) * (pre > bar.get(dict_class, 1.5))


@pytest.mark.parametrize(
    "dict_class",
    ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder",
     "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"],
)  # fmt: skip
def test_dictionary_learning(tmp_path, dict_class):
    dump(trainer(dict_class, k=7), tmp_path / "config.json")
    save(state_of(dict_class), tmp_path / "ae.safetensors")
    sae, x = sf.load_sae(tmp_path), values()
    assert str(sae.site) == "resid_post.3"
    wanted = computed(dict_class, tensors(), x)
    torch.testing.assert_close(sae.encode(x), wanted, atol=1e-4, rtol=1e-4)
    out = wanted @ tensors()["W_dec"] + tensors()["b_dec"]
    torch.testing.assert_close(sae.reconstruct(x), out, atol=1e-3, rtol=1e-3)


def test_a_pickle_is_refused_with_the_lines_that_convert_it(tmp_path):
    folder = tmp_path / "resid_post_layer_3" / "trainer_0"
    dump(trainer("AutoEncoderTopK", k=7), folder / "config.json")
    torch.save(state_of("AutoEncoderTopK"), folder / "ae.pt")
    with pytest.raises(sf.errors.DictionaryError, match="pickle") as caught:
        sf.load_sae(folder)
    lines = str(caught.value).split("Try: ")[1]
    exec(lines.replace("'ae.", f"'{folder}/ae."), {"torch": torch})
    assert sf.load_sae(folder).k == 7
    assert sf.load_saes(tmp_path, width=N, l0=7)[3].k == 7


def test_dictionary_learning_elsewhere_than_in_the_stream_needs_a_site(tmp_path):
    dump(trainer("AutoEncoder", submodule_name="mlp_layer_3"), tmp_path / "config.json")
    save(state_of("AutoEncoder"), tmp_path / "ae.safetensors")
    with pytest.raises(sf.errors.DictionaryError, match="site="):
        sf.load_sae(tmp_path)
    assert sf.load_sae(tmp_path, site="mlp_out.3").site == sf.Site("mlp_out", 3)
    dump(trainer("CrossCoder"), tmp_path / "config.json")
    with pytest.raises(sf.errors.DictionaryError, match="CrossCoder"):
        sf.load_sae(tmp_path)


# ------------------------------------------------------------------ sparsify


def coder(folder: Path, **changes) -> Path:
    config = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True,
              "num_latents": 0, "k": 5, "multi_topk": False, "skip_connection": False,
              "transcode": False, "d_in": D}  # fmt: skip
    t = tensors()
    state = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"]}
    dump(config | changes, folder / "cfg.json")
    save(state | {"W_dec": t["W_dec"], "b_dec": t["b_dec"]}, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("normalized", [True, False])
def test_sparsify(tmp_path, normalized):
    sae = sf.load_sae(coder(tmp_path / "layers.6", normalize_decoder=normalized))
    assert (str(sae.site), sae.k) == ("resid_post.6", 5)
    t, x = tensors(), values()
    kept = torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).topk(5, dim=-1)
    f = torch.zeros(3, 5, N).scatter(-1, kept.indices, kept.values)
    torch.testing.assert_close(sae.encode(x), f, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        sae.reconstruct(x), f @ t["W_dec"] + t["b_dec"], atol=1e-3, rtol=1e-3
    )


def test_sparsify_sites_are_named_where_they_depend_on_the_model(tmp_path):
    with pytest.raises(sf.errors.DictionaryError, match="site="):
        sf.load_sae(coder(tmp_path / "layers.6.mlp"))
    transcoder = coder(tmp_path / "h.6.mlp", transcode=True)
    with pytest.raises(sf.errors.DictionaryError, match="write_site="):
        sf.load_sae(transcoder, site="resid_mid.6")
    sae = sf.load_sae(transcoder, site="resid_mid.6", write_site="mlp_out.6")
    pre = values() @ tensors()["W_enc"] + tensors()["b_enc"]
    assert torch.equal(sae.encode(values()) > 0, pre >= pre.topk(5, dim=-1).values[..., -1:])
    with pytest.raises(sf.errors.DictionaryError, match="groupmax"):
        sf.load_sae(coder(tmp_path / "layers.7", activation="groupmax"))


# ------------------------------------------------------------------ folders of folders


@pytest.fixture
def tree(tmp_path) -> Path:
    for layer, l0 in ((1, 20), (1, 90), (2, 120)):
        npz(tmp_path / "gemma-scope-2b-pt-res" / f"layer_{layer}/width_16k/average_l0_{l0}")
    return tmp_path / "gemma-scope-2b-pt-res"


def test_a_tree_is_chosen_from_as_a_release_is(tree):
    saes = sf.load_saes(tree, sites="resid_post", width="16k", l0=100)
    assert [sae.name.split("/")[-1] for sae in saes.values()] == ["average_l0_90", "average_l0_120"]
    assert saes[1].origin.layout == "gemma_scope" and "average_l0_90" in str(saes[1].origin)
    assert list(sf.load_saes(tree, sites=["resid_post.2"])) == [sf.Site("resid_post", 2)]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({}, "20, 90"),
        ({"sites": "resid_pst"}, "perhaps resid_post"),
        ({"sites": ["resid_post.2", "resid_post.7"]}, "resid_post.7"),
        ({"width": "65k"}, "16,384"),
        ({"width": "wide"}, "label"),
        ({"ids": "layer_1/width_16k/average_l0_91"}, "perhaps layer_1/width_16k/average_l0_90"),
    ],
)
def test_a_choice_that_does_not_fit_lists_what_is_there(tree, choice, said):
    error = sf.errors.DictionaryError if choice else sf.errors.SiteError
    with pytest.raises(error, match=said):
        sf.load_saes(tree, **choice)


def test_two_layouts_may_lie_side_by_side(tmp_path):
    native(tmp_path / "a", flat())
    coder(tmp_path / "layers.6")
    assert [str(site) for site in sf.load_saes(tmp_path)] == ["resid_pre.2", "resid_post.6"]
    assert sf.load_saes(tmp_path, sites="resid_pre")[2].name == "a"


def test_a_broken_neighbor_is_named(tmp_path):
    native(tmp_path / "good", flat())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cfg.json").write_text("{")
    with pytest.raises(sf.errors.DictionaryError, match=r"bad.*not JSON"):
        sf.load_saes(tmp_path)
    assert len(sf.load_saes(tmp_path, sites="resid_pre")) == 1


# ------------------------------------------------------------------ broken files


@pytest.mark.parametrize(
    ("make", "file"),
    [
        (lambda folder: native(folder, flat()), "sae_weights.safetensors"),
        (npz, "params.npz"),
        (lambda folder: llama(folder, 1.0), "checkpoints/final.safetensors"),
        (coder, "sae.safetensors"),
    ],
)
def test_truncated_files_are_refused_by_name(tmp_path, make, file):
    path = make(tmp_path) / file
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"version https://git-lfs.github.com/spec/v1\n", b""):
        path.write_bytes(content)
        with pytest.raises(sf.errors.DictionaryError, match=path.name):
            sf.load_sae(tmp_path, site="resid_post.1")


def test_an_archive_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"code": 1}], dtype=object))
    with pytest.raises(sf.errors.DictionaryError, match=r"params\.npz"):
        sf.load_sae(tmp_path, site="resid_post.1")


def test_a_file_in_place_of_its_folder_is_said_to_be_one(tmp_path):
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(b"{}")
    with pytest.raises(sf.errors.DictionaryError, match=r"is a file.*beside"):
        sf.load_sae(path)


def test_missing_files_and_tensors_are_named(tmp_path):
    with pytest.raises(sf.errors.DictionaryError, match="sae_weights"):
        dump(flat(), tmp_path / "a" / "cfg.json")
        sf.load_sae(tmp_path / "a")
    with pytest.raises(sf.errors.DictionaryError, match="nowhere"):
        sf.load_sae(tmp_path / "nowhere")
    llama(tmp_path / "b", 1.0)
    save({"encoder.weight": torch.ones(N, D)}, tmp_path / "b/checkpoints/final.safetensors")
    with pytest.raises(sf.errors.DictionaryError, match=r"decoder\.weight"):
        sf.load_sae(tmp_path / "b")
    dump({"d_in": D, "activation": "topk"}, coder(tmp_path / "layers.3") / "cfg.json")
    with pytest.raises(sf.errors.DictionaryError, match="'k'"):
        sf.load_sae(tmp_path / "layers.3")


# ------------------------------------------------------------------ lazily


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_slices_equal_the_whole(tmp_path, order, compressed):
    arrays = {"a": np.arange(60, dtype=np.float32).reshape(6, 10, order=order), "b": np.ones(3)}
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", **arrays)
    file, whole = Npz(tmp_path / "x.npz"), torch.from_numpy(arrays["a"])
    assert file.names() == {"a", "b"} and file.shape("a") == (6, 10)
    index = torch.tensor([5, 0, 2])
    assert torch.equal(file.read("a"), whole)
    assert torch.equal(file.take("a", index), whole[index])
    assert torch.equal(file.take("a", index, axis=1), whole[:, index])
    assert file.read("b").dtype == torch.float64


def test_the_fingerprint_follows_the_content(tmp_path):
    first, second = npz(tmp_path / "a"), npz(tmp_path / "b")
    same = {sf.load_sae(folder, site="resid_post.1").fingerprint() for folder in (first, second)}
    assert len(same) == 1
    with np.load(second / "params.npz") as file:
        arrays = dict(file)
    arrays["W_dec"][3, 1] += 1e-3
    np.savez(second / "params.npz", **arrays)
    assert sf.load_sae(second, site="resid_post.1").fingerprint() not in same
    scaled = {sf.load_sae(llama(tmp_path / str(n), n)).fingerprint() for n in (1.0, 2.0)}
    assert len(scaled) == 2
