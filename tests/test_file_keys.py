"""Files say what is computed: every key and every tensor is used, known to be harmless, or refused.

A key is put into a configuration that loads, so that the refusal is the key's and nothing else's.
"""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch

import saefeat as sf
from saefeat.loading import native
from test_loading_layouts import (
    HYPER,
    D,
    N,
    coder,
    dump,
    flat,
    linear,
    llama,
    npz,
    save,
    state_of,
    tensors,
    threshold,
    trainer,
    values,
)  # fmt: skip
from test_loading_layouts import native as native_folder

REFUSED = sf.errors.DictionaryError


def new(architecture: str = "standard", metadata: dict | None = None, **changes) -> dict:
    """A configuration as sae-lens 6 writes it."""
    config = {
        "architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.2.hook_resid_pre"} | (metadata or {}),
    }  # fmt: skip
    return config | changes


# ---------------------------------------------------------------- keys of sae-lens


@pytest.mark.parametrize("config", [flat(), new()], ids=["flat", "with metadata"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("jumprelu_threshold", 0.5),
        ("log_threshold", True),
        ("use_bias", False),
        ("input_mean", [0.0]),
        ("decoder_norm", "unit"),
        ("n_ista_steps", 3),
        ("dataset_average_activation_norm", 3.0),
        ("reshape_activations", "heads"),
        ("tied_weights", True),
        ("tied_weights", 0),
        ("is_sparse_connection", True),
        ("use_error_term", True),
        ("kval_topk", 3),
        ("finetuning_scaling_factor", True),
        ("normalize_activations", "covariance_whitening"),
        ("normalize_activations", "constant_scalar_rescale"),
        ("normalize_activations", "by a new rule"),
        ("k", 3),
        ("rescale_acts_by_decoder_norm", True),
        ("activation_fn_kwargs", {"k": 3}),
        ("activation_fn_kwargs", {"beta": 2.0}),
        ("hook_head_index", 3),
        ("hook_head_index_out", 3),
        ("d_in", D + 1),
        ("d_sae", 2 * N),
        ("d_in", float("nan")),
        ("model_from_pretrained_kwargs", {"center_everything": True}),
        ("apply_b_dec_to_input", "no"),
        ("apply_b_dec_to_input", None),
    ],
)
def test_a_key_that_is_not_computed_with_is_refused_by_name(tmp_path, config, key, value):
    sf.load_sae(native_folder(tmp_path / "as it is", config))
    said = {"activation_fn_kwargs": "k = 3|kwargs", "model_from_pretrained_kwargs": "everything"}
    with pytest.raises(REFUSED, match=said.get(key, key.split("_")[0])) as caught:
        sf.load_sae(native_folder(tmp_path / "with it", config | {key: value}))
    assert "Try:" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_ghost_grads", True),
        ("l1_coefficient", float("nan")),
        ("expansion_factor", 32),
        ("hook_point_layer", 2),
        ("wandb_project", "x"),
        ("reshape_activations", "hook_z"),
        ("neuronpedia_id", "gpt2-small/2-res-jb"),
        ("what_it_means_nobody_knows", None),
        ("model_from_pretrained_kwargs", {"center_writing_weights": False, "fold_ln": True}),
        ("dtype", "bfloat16"),
    ],
)
def test_a_harmless_key_changes_nothing(tmp_path, key, value):
    plain = sf.load_sae(native_folder(tmp_path / "a", flat()))
    more = sf.load_sae(native_folder(tmp_path / "b", flat(**{key: value})))
    assert more.fingerprint() == plain.fingerprint()


def test_whatever_stands_under_metadata_is_no_setting(tmp_path):
    """sae-lens reads it for provenance alone, so it cannot overrule what is computed."""
    more = {"k": 3, "architecture": "topk", "apply_b_dec_to_input": False, "anything": [1]}
    plain = sf.load_sae(native_folder(tmp_path / "a", new()))
    assert sf.load_sae(native_folder(tmp_path / "b", new(metadata=more))).fingerprint() == (
        plain.fingerprint()
    )


def test_every_key_that_sae_lens_writes_is_known():
    from sae_lens.config import LanguageModelSAERunnerConfig
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    written = {field.name for field in dataclasses.fields(LanguageModelSAERunnerConfig)} - {"sae"}
    for name, (_, config) in (SAE_CLASS_REGISTRY | SAE_TRAINING_CLASS_REGISTRY).items():
        written |= {f.name for f in dataclasses.fields(config)} - set(native._WHOLE.get(name, ()))
    known = native._KNOWN
    unknown = {k for k in written if k not in known.used and k not in known.fixed}
    assert {key for key in unknown if not known._is_harmless(key)} == set()


@pytest.mark.parametrize("training", [False, True])
def test_what_sae_lens_saves_of_every_architecture_loads(tmp_path, training):
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.sae import SAEMetadata

    registry = SAE_TRAINING_CLASS_REGISTRY if training else SAE_CLASS_REGISTRY
    for name, (cls, config) in registry.items():
        options: dict = {"k": 4} if "k" in {f.name for f in dataclasses.fields(config)} else {}
        options |= {"d_out": D, "apply_b_dec_to_input": False} if "transcoder" in name else {}
        options |= (
            {"n_heads": 4, "bottleneck_factor": 2, "kval_topk": 3} if "temporal" in name else {}
        )
        options |= {"matryoshka_widths": [8, N]} if "matryoshka" in name else {}
        hooks = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
        if "transcoder" not in name:
            hooks = {"hook_name": "blocks.1.hook_resid_post", "seqpos_slice": (None,)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = cls(config(d_in=D, d_sae=N, metadata=SAEMetadata(**hooks), **options))
            saved = made.save_inference_model if training else made.save_model
            saved(tmp_path / name)
        assert sf.load_sae(tmp_path / name).d_sae == N, name


# ---------------------------------------------------------------- transcoders of old files


@pytest.mark.parametrize(
    "changes",
    [
        {"is_transcoder": True, "hook_name_out": "blocks.2.hook_mlp_out"},
        {"hook_name_out": "blocks.2.hook_mlp_out"},
        {"hook_point_out": "blocks.2.hook_mlp_out", "is_transcoder": True},
        {"out_hook_point": "blocks.2.hook_mlp_out", "out_hook_point_layer": 2},
    ],
)
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_an_old_transcoder_writes_where_it_says(tmp_path, changes, architecture):
    """Read as an SAE it would write at the MLP's input, and subtract b_dec from it."""
    config = flat(architecture=architecture, hook_name="blocks.2.ln2.hook_normalized", **changes)
    more = {"threshold": threshold()} if architecture == "jumprelu" else {}
    sae, t, x = sf.load_sae(native_folder(tmp_path, config, **more)), tensors(), values()
    assert (sae.site.kind, str(sae.write_site)) == ("mlp_norm", "mlp_out.2")
    pre = x @ t["W_enc"] + t["b_enc"]
    wanted = torch.relu(pre) * (pre > more["threshold"]) if more else torch.relu(pre)
    torch.testing.assert_close(sae.encode(x), wanted, atol=1e-4, rtol=1e-4)


def test_an_old_transcoder_that_does_not_say_where_it_writes_is_refused(tmp_path):
    with pytest.raises(REFUSED, match="write_site="):
        sf.load_sae(native_folder(tmp_path, flat(is_transcoder=True)))
    with pytest.raises(REFUSED, match="gated"):
        gated = flat(
            is_transcoder=True, architecture="gated", hook_name_out="blocks.2.hook_mlp_out"
        )
        sf.load_sae(native_folder(tmp_path, gated))
    same = flat(hook_name_out="blocks.2.hook_resid_pre")
    assert str(sf.load_sae(native_folder(tmp_path, same)).write_site) == "resid_pre.2"


def test_two_ks_are_refused(tmp_path):
    config = flat(activation_fn_str="topk", activation_fn_kwargs={"k": 4})
    assert sf.load_sae(native_folder(tmp_path, config)).k == 4
    with pytest.raises(REFUSED, match=r"k = 5 and 4"):
        sf.load_sae(native_folder(tmp_path, config | {"k": 5}))
    with pytest.raises(REFUSED, match="gated"):
        sf.load_sae(native_folder(tmp_path, config | {"architecture": "gated"}))


# ---------------------------------------------------------------- tensors


UNKNOWN = ["b_dec_out", "input_mean", "log_threshold", "scale", "optimizer.state.W_enc", "b_gate"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tensor_that_nothing_computes_with_is_refused_by_name(tmp_path, name):
    extra = {name: torch.ones(D)}
    native_folder(tmp_path / "native", flat(), **extra)
    with pytest.raises(REFUSED, match=name):
        sf.load_sae(tmp_path / "native")
    native_folder(tmp_path / "scaled", flat(finetuning_scaling_factor=True), **extra,
                  scaling_factor=torch.full((N,), 2.0))  # fmt: skip
    with pytest.raises(REFUSED, match=name):
        sf.load_sae(tmp_path / "scaled")
    npz(tmp_path / "npz", **{name: torch.ones(D).numpy()})
    with pytest.raises(REFUSED, match=name):
        sf.load_sae(tmp_path / "npz", site="resid_post.1")
    llama(tmp_path / "llama", 1.0)
    save(linear(tensors()) | extra, tmp_path / "llama" / "checkpoints" / "final.safetensors")
    with pytest.raises(REFUSED, match=name):
        sf.load_sae(tmp_path / "llama")
    dump(trainer("AutoEncoder"), tmp_path / "dl" / "config.json")
    save(state_of("AutoEncoder") | extra, tmp_path / "dl" / "ae.safetensors")
    with pytest.raises(REFUSED, match=name):
        sf.load_sae(tmp_path / "dl")
    state = {"encoder.weight": tensors()["W_enc"].T, "encoder.bias": tensors()["b_enc"]}
    state |= {"W_dec": tensors()["W_dec"], "b_dec": tensors()["b_dec"]}
    save(state | extra, coder(tmp_path / "layers.2") / "sae.safetensors")
    with pytest.raises(REFUSED, match=name):
        sf.load_sae(tmp_path / "layers.2")
    with pytest.raises(REFUSED, match=name):
        sf.SAE.from_tensors(tensors() | extra, site="resid_post.1")


def test_two_factors_for_one_sae_are_refused(tmp_path):
    factors = {n: torch.full((N,), 2.0) for n in ("scaling_factor", "finetuning_scaling_factor")}
    with pytest.raises(REFUSED, match="scaling_factor and"):
        sf.load_sae(native_folder(tmp_path, flat(finetuning_scaling_factor=True), **factors))


# ---------------------------------------------------------------- dictionary_learning


def learned(folder, name: str = "BatchTopKSAE", state: dict | None = None, io=None, **changes):
    config = trainer(name, **{"k": 7} | changes)
    config["buffer"] |= {} if io is None else {"io": io}
    dump(config, folder / "config.json")
    save(state_of(name) | (state or {}), folder / "ae.safetensors")
    return folder


@pytest.mark.parametrize("bad", [-1.0, -0.5, float("nan"), float("inf")])
def test_a_threshold_that_was_never_set_is_refused(tmp_path, bad):
    """-1 stands for "not set": an L0 of half the latents in place of k."""
    sf.load_sae(learned(tmp_path / "a"))
    with pytest.raises(REFUSED, match="threshold"):
        sf.load_sae(learned(tmp_path / "b", state={"threshold": torch.tensor(bad)}))
    unused = learned(tmp_path / "c", "AutoEncoderTopK", state={"threshold": torch.tensor(bad)})
    assert sf.load_sae(unused).k == 7


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_a_k_that_the_configuration_contradicts_is_refused(tmp_path, name):
    with pytest.raises(REFUSED, match=r"k = 12"):
        sf.load_sae(learned(tmp_path, name, state={"k": torch.tensor(12)}))


@pytest.mark.parametrize(
    ("submodule", "io", "hook"),
    [
        ("resid_post_layer_3", None, "blocks.3.hook_resid_post"),
        ("resid_post_layer_3", "out", "blocks.3.hook_resid_post"),
        ("resid_pre_layer_3", "out", "blocks.3.hook_resid_pre"),
        ("resid_pre_3", None, "blocks.3.hook_resid_pre"),
        ("resid_post_layer_4", "out", None),
        ("resid_post_layer_3", "in", None),
        ("my_resid_thing", "out", None),
        ("resid_mid_layer_3", "out", None),
        (None, "out", None),
    ],
)
def test_a_submodule_is_what_it_says_or_needs_a_site(tmp_path, submodule, io, hook):
    learned(tmp_path, io=io, submodule_name=submodule)
    if hook is None:
        with pytest.raises(REFUSED, match="site="):
            sf.load_sae(tmp_path)
    else:
        assert sf.load_sae(tmp_path).site.hook == hook
    assert str(sf.load_sae(tmp_path, site="mlp_out.3").site) == "mlp_out.3"


def test_one_that_reads_in_and_writes_out_is_a_transcoder(tmp_path):
    learned(tmp_path, "AutoEncoder", io="in_and_out")
    with pytest.raises(REFUSED, match="write_site="):
        sf.load_sae(tmp_path, site="mlp_in.3")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dict_class", None, "dict_class"),
        ("pre_bias_scale", 2.0, "pre_bias_scale"),
        ("activation_dim", D + 1, "d_in = 17"),
        ("dict_size", 2, "d_sae = 2"),
    ],
)
def test_a_trainer_that_says_something_else_is_refused(tmp_path, key, value, said):
    folder = learned(tmp_path, "AutoEncoder")
    config = json.loads((folder / "config.json").read_text())
    config["trainer"][key] = value
    dump(config, folder / "config.json")
    with pytest.raises(REFUSED, match=said):
        sf.load_sae(folder)


# ---------------------------------------------------------------- sparsify, Llama Scope


def test_a_skip_connection_is_used_where_it_is_declared(tmp_path):
    folder = coder(tmp_path / "layers.2", skip_connection=True)
    with pytest.raises(REFUSED, match="W_skip"):
        sf.load_sae(folder)
    state = {"encoder.weight": tensors()["W_enc"].T, "encoder.bias": tensors()["b_enc"]}
    state |= {"W_dec": tensors()["W_dec"], "b_dec": tensors()["b_dec"]}
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    plain = sf.load_sae(coder(tmp_path / "a" / "layers.2"))
    save(state | {"W_skip": skip}, folder / "sae.safetensors")
    sae, x = sf.load_sae(folder), values()
    torch.testing.assert_close(sae.reconstruct(x), plain.reconstruct(x) + x @ skip.T)
    assert sae.fingerprint() != plain.fingerprint()
    with pytest.raises(REFUSED, match="W_skip"):
        sae.error()
    save(state | {"W_skip": skip[:3]}, folder / "sae.safetensors")
    with pytest.raises(REFUSED, match="W_skip"):
        sf.load_sae(folder)
    coder(folder)
    save(state | {"W_skip": skip}, folder / "sae.safetensors")
    with pytest.raises(REFUSED, match="skip_connection = false"):
        sf.load_sae(folder)


@pytest.mark.parametrize(
    "changes",
    [{"embed_skip": True}, {"gram_lookup": True}, {"coalesce_topk": "concat"}, {"d_in": D + 1},
     {"num_latents": 7}, {"k": 0}],
)  # fmt: skip
def test_a_sparsify_option_of_another_computation_is_refused(tmp_path, changes):
    said = {"num_latents": "d_sae = 7"}.get(next(iter(changes)), next(iter(changes)))
    with pytest.raises(REFUSED, match=said):
        sf.load_sae(coder(tmp_path / "layers.2", **changes), site="resid_post.2")


@pytest.mark.parametrize(
    "changes",
    [{"use_glu_encoder": True}, {"use_decoder_bias": False}, {"sae_type": "lorsa"},
     {"encoder_rank": 4}, {"d_model": D + 1}, {"d_sae": 2 * N},
     {"jump_relu_threshold": float("nan")}],
)  # fmt: skip
def test_a_llama_scope_option_of_another_computation_is_refused(tmp_path, changes):
    key = "d_in" if "d_model" in changes else next(iter(changes))
    with pytest.raises(REFUSED, match=key):
        sf.load_sae(llama(tmp_path, 2.0, **changes))


def test_a_published_llama_scope_file_loads(tmp_path):
    """Its keys as they are in the published files of the 32x release."""
    published = {
        "device": "cuda:0", "seed": 42, "dtype": "torch.bfloat16", "expansion_factor": 3,
        "bias_init_method": "all_zero", "decoder_exactly_fixed_norm": False,
        "sparsity_include_decoder_norm": True, "use_glu_encoder": False,
        "init_decoder_norm": 0.5, "init_encoder_norm": None,
        "init_encoder_with_decoder_transpose": True, "lp": 1, "l1_coefficient": 8e-5,
        "l1_coefficient_warmup_steps": 78125, "k_warmup_steps": 78125,
        "use_batch_norm_mse": True, "use_ghost_grads": False, "tp_size": 1, "ddp_size": 1,
    }  # fmt: skip
    plain = sf.load_sae(llama(tmp_path / "a", 2.0))
    assert sf.load_sae(llama(tmp_path / "b", 2.0, **published)).fingerprint() == plain.fingerprint()
    assert json.dumps(HYPER)
