"""Dictionaries against sae-lens's own encode and decode; lazy files; bad files; directions."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import saefeat as sf
from helpers import (
    ARCHITECTURES,
    RAGGED,
    TRANSCODERS,
    D,
    batch_of,
    blocks_of,
    build,
    forward,
    make_sae,
    tensors_for,
    unit,
    wrapped,
)
from saefeat.dictionaries.excerpt import Excerpt
from saefeat.dictionaries.weights import InMemory, OnDisk
from saefeat.kernel.encode import encode

D_IN, D_SAE, K = 16, 40, 5
ALL = [*ARCHITECTURES, *TRANSCODERS]


def lens_sae(architecture: str, **options):
    """A sae-lens SAE with every parameter random, thresholds and gates included."""
    import sae_lens
    from sae_lens.registry import get_sae_class

    kind, config_kind = get_sae_class(architecture)
    if "transcoder" in architecture:
        options = {"apply_b_dec_to_input": False, "d_out": D_IN, **options}
    if architecture in ("topk", "abstopk"):
        options = {"k": K, **options}
    metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}
    if "transcoder" in architecture:
        metadata["hook_name"] = "blocks.1.ln2.hook_normalized"
        metadata["hook_name_out"] = "blocks.1.hook_mlp_out"
    metadata |= options.pop("metadata", {})
    config = config_kind(
        d_in=D_IN, d_sae=D_SAE, metadata=sae_lens.saes.sae.SAEMetadata(**metadata), **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = kind(config)
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.4)
        if name == "threshold":
            parameter.data = parameter.data.abs()
    return sae


# the factor is folded in when sae-lens saves for inference; these random ones have none
pytestmark = pytest.mark.filterwarnings("ignore:.*expected_average_only_in")
NORMS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"]
CASES = [
    *(
        (architecture, {"normalize_activations": norm, "apply_b_dec_to_input": bias})
        for architecture in ARCHITECTURES
        for norm in NORMS
        for bias in (True, False)
    ),
    *(
        (architecture, {"normalize_activations": norm, "rescale_acts_by_decoder_norm": True})
        for architecture in ("topk", "abstopk")
        for norm in NORMS
    ),
    *((architecture, {}) for architecture in TRANSCODERS),
]


def name_of(case) -> str:
    return "-".join([case[0], *(str(v) for v in case[1].values())])


@pytest.fixture(params=CASES, ids=name_of)
def pair(request, tmp_path):
    """(sae-lens's module, ours from its file, ours from the object)."""
    theirs = lens_sae(request.param[0], **request.param[1])
    theirs.save_model(tmp_path / "one")
    if theirs.cfg.normalize_activations == "expected_average_only_in":
        with pytest.warns(UserWarning, match="does not say by how much"):
            return theirs, sf.load_sae(tmp_path / "one"), sf.load_sae(theirs)
    return theirs, sf.load_sae(tmp_path / "one"), sf.load_sae(theirs)


def values() -> torch.Tensor:
    return 2 * torch.randn(3, 7, D_IN) + 0.5


@torch.no_grad()
def test_encode_and_reconstruct_are_sae_lenses(pair):
    theirs, on_disk, in_memory = pair
    x = values()
    f = theirs.encode(x)
    assert 0 < (f != 0).float().mean() < 1
    recon = theirs(x)
    subsets = [torch.randperm(D_SAE)[:n].tolist() for n in (1, 4, 15, D_SAE)] + [[3, 4, 5]]
    for ours in (on_disk, in_memory):
        torch.testing.assert_close(ours.encode(x), f, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.reconstruct(x), recon, atol=1e-5, rtol=1e-5)
        for subset in subsets:
            found = ours.encode(x, subset)
            torch.testing.assert_close(found, f[..., subset], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_directions_are_what_decode_adds(pair):
    """decode(f + e_i) − decode(f), from sae-lens itself, for every latent in any order."""
    theirs, on_disk, in_memory = pair
    x = values()[:1, :1]
    scale = 1.0
    if theirs.cfg.normalize_activations == "layer_norm":
        scale = x.std(-1, keepdim=True)
    if theirs.cfg.normalize_activations == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / D_IN**0.5
    order = torch.randperm(D_SAE)[:9].tolist()
    f = theirs.encode(x)
    base = theirs.decode(f)
    for row, latent in enumerate(order):
        raised = theirs.encode(x)  # decode consumes the norm's state, so encode again
        raised[..., latent] += 1.0
        delta = (theirs.decode(raised) - base)[0, 0]
        for ours in (on_disk, in_memory):
            found = (ours.directions(order)[row] * scale).reshape(-1)
            torch.testing.assert_close(found, delta, atol=1e-5, rtol=1e-5)


def test_lazy_reading_equals_memory(pair):
    _, on_disk, in_memory = pair
    for indices in ([7], [30, 2, 11], [4, 5, 6], torch.randperm(D_SAE).tolist()):
        index = torch.tensor(indices)
        ours, theirs = on_disk.columns(index), in_memory.columns(index)
        assert set(ours) == set(theirs)
        for key, tensor in ours.items():
            if isinstance(tensor, torch.Tensor):
                torch.testing.assert_close(tensor, theirs[key], atol=1e-6, rtol=1e-6)
            else:
                assert tensor == theirs[key]


def owns_its_storage(columns: dict) -> None:
    """A view would drag its whole matrix over the wire."""
    for key, tensor in columns.items():
        if isinstance(tensor, torch.Tensor):
            held = tensor.untyped_storage().nbytes()
            assert held == tensor.numel() * tensor.element_size(), key


def test_slices_own_their_storage(pair):
    _, on_disk, in_memory = pair
    for indices in ([30, 2, 11], torch.randperm(D_SAE).tolist()):
        owns_its_storage(on_disk.columns(torch.tensor(indices)))
    for indices in ([30, 2, 11], [7], [4, 5, 6], torch.randperm(D_SAE).tolist()):
        owns_its_storage(in_memory.columns(torch.tensor(indices)))


@pytest.mark.parametrize("indices", [[7], [4, 5, 6]])
def test_neighboring_rows_from_a_file_own_their_storage(tmp_path, indices):
    lens_sae("jumprelu").save_model(tmp_path)
    owns_its_storage(sf.load_sae(tmp_path).columns(torch.tensor(indices)))


def test_site_and_name_come_from_the_file(pair):
    theirs, on_disk, _ = pair
    if "transcoder" in theirs.cfg.architecture():
        assert str(on_disk.site) == "mlp_norm.1" and str(on_disk.write_site) == "mlp_out.1"
    else:
        assert on_disk.site == on_disk.write_site == sf.Site("resid_post", 1)
    assert (on_disk.d_in, on_disk.d_sae, on_disk.d_out) == (D_IN, D_SAE, D_IN)
    assert on_disk.name == "one" and on_disk.architecture == theirs.cfg.architecture()


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_a_scale_kept_beside_the_weights_is_folded_in(tmp_path, architecture):
    """Normalization skipped, or half folded."""
    theirs = lens_sae(architecture, normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    ours, x = sf.load_sae(tmp_path), values()
    bare = theirs.encode(x)
    theirs.fold_activation_norm_scaling_factor(0.25)
    assert (theirs.encode(x) - bare).abs().max() > 0.1
    for subset in (None, [7, 2], [3, 4, 5]):
        wanted = theirs.encode(x) if subset is None else theirs.encode(x)[..., subset]
        torch.testing.assert_close(ours.encode(x, subset), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.reconstruct(x), theirs(x), atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_top_k_keeps_k(tmp_path):
    """TopK read as ReLU: L0 600 for k = 80."""
    theirs = lens_sae("topk")
    theirs.save_model(tmp_path)
    x = values()
    ours = sf.load_sae(tmp_path).encode(x)
    assert torch.equal((ours > 0).sum(-1), (theirs.encode(x) > 0).sum(-1))
    assert (ours > 0).sum(-1).max() == K


@torch.no_grad()
def test_a_saved_batchtopk_is_a_jumprelu(tmp_path):
    from sae_lens.registry import get_sae_training_class

    kind, config_kind = get_sae_training_class("batchtopk")
    theirs = kind(config_kind(d_in=D_IN, d_sae=D_SAE, k=K))
    theirs.W_enc.data, theirs.W_dec.data = torch.randn(D_IN, D_SAE), torch.randn(D_SAE, D_IN)
    theirs.topk_threshold.fill_(0.7)
    theirs.save_inference_model(tmp_path)
    ours = sf.load_sae(tmp_path, site="resid_post.0")
    assert ours.architecture == "jumprelu"
    from sae_lens import SAE

    x = values()
    wanted = SAE.load_from_disk(tmp_path).encode(x)
    assert wanted[wanted > 0].min() > 0
    torch.testing.assert_close(ours.encode(x), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_skip_connection_matters():
    theirs = lens_sae("skip_transcoder")
    ours = sf.load_sae(theirs)
    x = values()
    bare = ours.encode(x) @ ours.directions() + theirs.b_dec
    assert (ours.reconstruct(x) - bare).abs().max() > 0.1


@torch.no_grad()
def test_centered_models_subtract_the_mean_of_x_alone(tmp_path):
    """(x − mean(x) − b_dec) W: b_dec itself is not centered."""
    options = {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}}
    theirs = lens_sae("standard", **options)
    theirs.save_model(tmp_path)
    ours = sf.load_sae(tmp_path)
    assert ours.centered
    x = values()
    wanted = theirs.encode(x - x.mean(-1, keepdim=True))
    assert (wanted - theirs.encode(x)).abs().max() > 0.1
    torch.testing.assert_close(ours.encode(x), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_centering_subtracts_the_mean():
    tensors = tensors_for("standard")
    x = torch.randn(2, 5, D) + 3
    ours = sf.SAE(InMemory(tensors), site="resid_post.0", centered=True, subtract_bias=False)
    plain = sf.SAE(InMemory(tensors), site="resid_post.0", subtract_bias=False)
    torch.testing.assert_close(
        ours.encode(x), plain.encode(x - x.mean(-1, keepdim=True)), atol=1e-5, rtol=1e-5
    )
    assert (ours.encode(x) - plain.encode(x)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtract", [True, False])
def test_the_mean_goes_before_the_norm(tmp_path, architecture, norm, subtract):
    """As sae-lens computes on the centered stream: a length taken with the mean in it is another.

    Values with a mean of 3 have a length that is most of all the mean's.
    """
    theirs = lens_sae(
        architecture, normalize_activations=norm, apply_b_dec_to_input=subtract,
        metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}},
    )  # fmt: skip
    theirs.save_model(tmp_path)
    x = torch.randn(2, 5, D_IN) + 3
    mean = x.mean(-1, keepdim=True)
    with torch.no_grad():
        f, out = theirs.encode(x - mean), theirs(x - mean)
    sae = sf.load_sae(tmp_path)
    for one in (sae, Excerpt.of(sae, [tuple(range(D_SAE))])):
        torch.testing.assert_close(one.encode(x), f, atol=1e-4, rtol=1e-4)
    # the mean is in the stream, and no part of the SAE
    torch.testing.assert_close(sae.reconstruct(x), out + mean, atol=1e-4, rtol=1e-4)
    one, error = encode(sae.error().columns(torch.tensor([0])), x)
    torch.testing.assert_close(error, x - mean - out, atol=1e-4, rtol=1e-4)
    assert one.unique().item() == 1.0


def test_excluded_tokens_come_from_the_file(tmp_path):
    for n, (declared, wanted) in enumerate([([0, 2], (0, 2)), (True, "special"), (None, ())]):
        theirs = lens_sae("standard", metadata={"exclude_special_tokens": declared})
        theirs.save_model(tmp_path / str(n))
        assert sf.load_sae(tmp_path / str(n)).excluded == wanted


def test_loading_twice_gives_one_fingerprint_and_changes_show(tmp_path):
    theirs = lens_sae("standard")
    theirs.save_model(tmp_path / "a")
    theirs.save_model(tmp_path / "b")
    a, b = sf.load_sae(tmp_path / "a"), sf.load_sae(tmp_path / "b")
    assert a.fingerprint() == b.fingerprint()
    assert sf.load_sae(theirs).fingerprint() == a.fingerprint()
    before = sf.load_sae(theirs).fingerprint()
    theirs.W_dec.data[3, 2] += 1e-3
    theirs.save_model(tmp_path / "b")
    assert sf.load_sae(tmp_path / "b").fingerprint() != a.fingerprint()
    assert sf.load_sae(theirs).fingerprint() != before


def test_selecting_reads_only_what_is_selected(monkeypatch):
    """k latents cost k latents: no whole matrix is read."""
    sae = make_sae("jumprelu")
    asked = []
    monkeypatch.setattr(InMemory, "read", lambda self, name: asked.append(name) or torch.zeros(D))
    sae.columns(torch.tensor([3, 30]))
    assert set(asked) <= {"b_dec"}


# ---------------------------------------------------------------- bad files


@pytest.fixture
def folder(tmp_path):
    lens_sae("jumprelu").save_model(tmp_path / "sae")
    return tmp_path / "sae"


def refused(folder, *, names: str | None = None, **options) -> str:
    """The text of the DictionaryError that loading and reading everything raises."""
    with pytest.raises(sf.errors.DictionaryError) as caught:
        sf.load_sae(folder, **options).reconstruct(torch.randn(2, 3, D_IN))
    text = str(caught.value)
    assert "Try: " in text and "Likely cause: " in text
    if names is not None:
        assert names in text, text
    return text


def rewrite(folder, change) -> None:
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def retensor(folder, change) -> None:
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, names=name)
    refused(folder, names=str(folder))


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "nothing" / "here", names="nothing/here")


@settings(max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True))
def test_weights_truncated_anywhere(tmp_path_factory, share):
    source = tmp_path_factory.getbasetemp() / "whole"
    if not source.exists():
        lens_sae("jumprelu").save_model(source)
    folder = tmp_path_factory.mktemp("cut")
    data = (source / "sae_weights.safetensors").read_bytes()
    (folder / "cfg.json").write_text((source / "cfg.json").read_text())
    (folder / "sae_weights.safetensors").write_bytes(data[: int(share * len(data))])
    refused(folder, names="sae_weights.safetensors")


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 9, 100])
def test_weights_truncated_in_the_header(folder, offset):
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:offset])
    refused(folder, names=str(path))


def test_a_git_lfs_pointer(folder):
    path = folder / "sae_weights.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    refused(folder, names="Git LFS pointer")


@pytest.mark.parametrize("text", ["", "{", '{"d_in": 16,', "not json"])
def test_a_configuration_that_is_not_json(folder, text):
    (folder / "cfg.json").write_text(text)
    refused(folder, names=str(folder / "cfg.json"))


@pytest.mark.parametrize("text", ["[]", "null", "3", '"standard"'])
def test_a_configuration_that_is_no_object(folder, text):
    (folder / "cfg.json").write_text(text)
    refused(folder, names=str(folder / "cfg.json"))


def test_a_configuration_of_bytes(folder):
    (folder / "cfg.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, names=str(folder / "cfg.json"))


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_a_missing_tensor(folder, name):
    retensor(folder, lambda tensors: tensors.pop(name))
    refused(folder, names=name)


def test_a_skip_transcoder_without_its_skip(tmp_path):
    lens_sae("skip_transcoder").save_model(tmp_path)
    retensor(tmp_path, lambda tensors: tensors.pop("W_skip"))
    refused(tmp_path, names="W_skip")


SHAPES = {
    "W_dec": (D_SAE + 1, D_IN),
    "b_enc": (D_SAE - 1,),
    "b_dec": (D_IN + 1,),
    "threshold": (1,),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_tensor_of_another_shape(folder, name):
    retensor(folder, lambda tensors: tensors.update({name: torch.zeros(SHAPES[name])}))
    text = refused(folder, names=name)
    assert str(SHAPES[name]) in text


def test_transposed_matrices(folder):
    def transpose(tensors):
        for name in ("W_enc", "W_dec"):
            tensors[name] = tensors[name].T.contiguous()

    retensor(folder, transpose)
    refused(folder, names="transposed")


def test_encoder_and_decoder_swapped(folder):
    def swap(tensors):
        tensors["W_enc"], tensors["W_dec"] = tensors["W_dec"], tensors["W_enc"]

    retensor(folder, swap)
    refused(folder)


def test_an_encoder_that_is_no_matrix(folder):
    retensor(folder, lambda tensors: tensors.update(W_enc=torch.zeros(D_SAE)))
    refused(folder, names="W_enc")


@pytest.mark.parametrize("architecture", ["batchtopk", "new_thing"])
def test_an_unknown_architecture(folder, architecture):
    rewrite(folder, lambda config: config.update(architecture=architecture))
    assert "jumprelu" in refused(folder, names=repr(architecture))


@pytest.mark.parametrize("norm", ["covariance_whitening", "something"])
def test_an_unknown_norm(folder, norm):
    rewrite(folder, lambda config: config.update(normalize_activations=norm))
    refused(folder, names=repr(norm))


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_a_transcoder_with_an_input_norm_is_refused(tmp_path, norm):
    """Its scale belongs to the input, its directions to the output."""
    lens_sae("transcoder", normalize_activations=norm).save_model(tmp_path)
    refused(tmp_path, names=norm)


def test_top_k_without_its_k(tmp_path):
    lens_sae("topk").save_model(tmp_path)
    rewrite(tmp_path, lambda config: config.pop("k"))
    refused(tmp_path, names="`k`")


def test_no_hook_name(folder):
    rewrite(folder, lambda config: config["metadata"].pop("hook_name"))
    assert 'site="resid_post.3"' in refused(folder, names="hook_name")
    assert sf.load_sae(folder, site="resid_post.2").site == sf.Site("resid_post", 2)


def test_a_hook_without_a_place(folder):
    rewrite(folder, lambda config: config["metadata"].update(hook_name="blocks.0.attn.hook_rot_q"))
    with pytest.raises(sf.errors.SiteError, match="hook_rot_q"):
        sf.load_sae(folder)


def test_a_transcoder_that_does_not_say_where_it_writes(tmp_path):
    """Writing its output's directions at its input would be silently wrong."""
    lens_sae("transcoder").save_model(tmp_path)
    rewrite(tmp_path, lambda config: config["metadata"].pop("hook_name_out"))
    refused(tmp_path, names="write_site")


def test_a_mixed_up_pair_of_files(folder, tmp_path):
    """cfg.json of one SAE, weights of another."""
    lens_sae("gated").save_model(tmp_path / "gated")
    weights = (tmp_path / "gated" / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(weights)
    refused(folder, names="threshold")


def test_load_saes_reads_a_folder_of_folders(tmp_path):
    for layer in (2, 0):
        hook = {"hook_name": f"blocks.{layer}.hook_resid_post"}
        lens_sae("standard", metadata=hook).save_model(tmp_path / f"x{layer}")
    lens_sae("transcoder").save_model(tmp_path / "t")
    saes = sf.load_saes(tmp_path)
    assert [str(site) for site in saes] == ["resid_post.0", "mlp_norm.1", "resid_post.2"]
    assert [str(site) for site in sf.load_saes(tmp_path, sites="resid_post")] == [
        "resid_post.0",
        "resid_post.2",
    ]
    assert list(sf.load_saes(tmp_path, sites=["blocks.2.hook_resid_post"])) == [
        sf.Site("resid_post", 2)
    ]
    with pytest.raises(sf.errors.DictionaryError, match="attn_out"):
        sf.load_saes(tmp_path, sites="attn_out")


def test_load_saes_of_nothing(tmp_path):
    with pytest.raises(sf.errors.DictionaryError, match="typo"):
        sf.load_saes(tmp_path / "typo")


def test_two_at_one_site_are_refused(tmp_path):
    """Two SAEs at one site overwrite each other."""
    for name in "ab":
        lens_sae("standard").save_model(tmp_path / name)
    with pytest.raises(sf.SaefeatError, match=r"resid_post\.1"):
        sf.load_saes(tmp_path)
    with pytest.raises(sf.errors.SiteError, match=r"two at resid_post\.1"):
        sf.dictionaries.Dictionaries([make_sae(seed=1), make_sae(seed=2)])


@pytest.mark.parametrize("index", [-1, D_SAE, [0, D_SAE + 3]])
def test_bad_indices_of_encode_and_directions(folder, index):
    """Latent index negative, out of range, or from another width."""
    sae = sf.load_sae(folder)
    chosen = index if isinstance(index, list) else [index]
    with pytest.raises(sf.errors.LatentError):
        sae.directions(chosen)
    with pytest.raises(sf.errors.LatentError):
        sae.encode(torch.randn(2, 3, D_IN), chosen)


def test_truncation_after_opening_is_reported_too(folder):
    """The file is opened anew for each read."""
    sae = sf.load_sae(folder)
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Exception):  # noqa: B017  (any error, but never numbers)
        sae.encode(torch.randn(2, 3, D_IN))


# ---------------------------------------------------------------- directions


def test_a_direction_is_normalized_and_projects():
    v = 7 * unit(1)
    d = sf.Direction(v, site="resid_post.1")
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(d.encode(x)[..., 0], x @ (v / v.norm()))
    torch.testing.assert_close(d.vectors, (v / v.norm())[None])
    assert d.d_sae == 1 and d.d_in == d.d_out == D


@pytest.mark.parametrize("k", [2, 3, 6])
def test_ablating_a_subspace_removes_exactly_its_span(k):
    rows = torch.randn(k, D, dtype=torch.float64) * torch.logspace(0, 2, k)[:, None]
    rows[1] += 0.9 * rows[0]  # far from orthogonal
    model = build("llama").double()
    space = sf.Direction(rows, site="resid_post.1")
    probe = sf.Probe(sf.Neurons("resid_post.1", D))
    chain = probe | sf.Ablate(space) | probe
    ids = torch.randint(4, 90, (2, 5))
    with torch.no_grad(), sf.hooked(model, chain) as log:
        model(ids)
    before, after = (reading.values for reading in chain.readings(log))
    projector = torch.linalg.pinv(rows) @ rows  # onto the span
    eye = torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(after, before @ (eye - projector), atol=1e-10, rtol=0)
    torch.testing.assert_close(after @ rows.T, torch.zeros(2, 5, k).double(), atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    "vector",
    [
        torch.zeros(4),
        torch.tensor([1.0, torch.nan]),
        torch.tensor([1.0, torch.inf]),
        torch.ones(2, 2, 2),
        torch.stack([torch.ones(4), torch.zeros(4)]),
        torch.stack([torch.ones(4), torch.ones(4)]),
        torch.stack([torch.arange(4.0), 1 + torch.arange(4.0), torch.ones(4)]),
    ],
    ids=["zero", "nan", "inf", "3d", "zero-row", "repeated", "dependent"],
)
def test_directions_that_mean_nothing(vector):
    with pytest.raises(sf.errors.DictionaryError, match="Direction"):
        sf.Direction(vector, site="resid_post.1")


@pytest.mark.parametrize("shape", [(6, 4), (0, 4)])
def test_more_rows_than_a_space_can_hold(shape):
    with pytest.raises(sf.errors.DictionaryError):
        sf.Direction(torch.randn(shape), site="resid_post.1")


def test_direction_at_many_sites():
    v = torch.randn(D)
    everywhere = sf.Direction.at_sites(
        v, sites=["resid_post.2", sf.Site("resid_post", 0), "mlp_out.1"]
    )
    assert [str(site) for site in everywhere] == ["resid_post.0", "mlp_out.1", "resid_post.2"]
    for dictionary in everywhere.values():
        torch.testing.assert_close(dictionary.vectors[0], v / v.norm())
    assert everywhere[1].site.kind == "mlp_out"


def test_a_direction_does_not_follow_its_vector():
    v = unit(3)
    d = sf.Direction(v, site="resid_post.1")
    before = d.vectors
    v.zero_()
    d.vectors.zero_()
    assert torch.equal(d.vectors, before) and before.norm() > 0.9


def test_neurons_are_coordinates():
    x = torch.randn(2, 5, D)
    neurons = sf.Neurons("resid_post.1", D)
    assert torch.equal(neurons.encode(x), x)
    assert torch.equal(neurons.encode(x, [9, 4]), x[..., [9, 4]])
    assert torch.equal(neurons.directions([9, 4]), torch.eye(D)[[9, 4]])


# ---------------------------------------------------------------- the mapping


def test_the_mapping_finds_sites_by_any_name():
    saes = sf.dictionaries.Dictionaries(
        [make_sae(layer=2), make_sae(layer=0), make_sae("transcoder", layer=2)]
    )
    assert saes["resid_post.0"] is saes[0] is saes[sf.Site("resid_post", 0)]
    assert saes["blocks.2.hook_resid_post"].site.layer == 2
    with pytest.raises(sf.errors.SiteError, match="several sites lie in that layer"):
        saes[2]
    with pytest.raises(sf.errors.SiteError, match="no dictionary there"):
        saes[1]
    assert [str(s) for s in saes.at("resid_post")] == ["resid_post.0", "resid_post.2"]
    assert len(saes.latents()) == sum(d.d_sae for d in saes.values())
    assert list(saes.latents({"resid_post.2": [5], 0: [1, 0]})) == [
        (sf.Site("resid_post", 2), 5),
        (sf.Site("resid_post", 0), 1),
        (sf.Site("resid_post", 0), 0),
    ]


def test_in_agrees_with_getitem():
    saes = sf.dictionaries.Dictionaries([make_sae(layer=2)])
    assert saes["resid_post.2"] is saes[2]
    assert "resid_post.2" in saes and 2 in saes


def test_get_of_a_missing_site_is_none():
    assert sf.dictionaries.Dictionaries([make_sae(layer=2)]).get("resid_post.0") is None


def test_on_disk_rows_and_columns_in_any_order(tmp_path):
    tensors = {"A": torch.randn(9, 11), "v": torch.randn(11)}
    save_file(tensors, tmp_path / "x.safetensors")
    disk = OnDisk(tmp_path / "x.safetensors")
    for indices in ([0], [8], [3, 4, 5], [5, 4, 3], [8, 0], [1, 2, 3, 4, 6], list(range(9))):
        index = torch.tensor(indices)
        assert torch.equal(disk.take("A", index), tensors["A"][indices])
        assert torch.equal(disk.take("A", index, axis=1), tensors["A"][:, indices])
        assert torch.equal(disk.take("v", index), tensors["v"][indices])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_dtypes_are_computed_in_float32_at_least(tmp_path, dtype):
    tensors = {n: t.to(dtype) for n, t in tensors_for("jumprelu").items()}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "metadata": {"hook_name": "blocks.0.hook_resid_post"}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae = sf.load_sae(tmp_path)
    wide = torch.promote_types(dtype, torch.float32)
    assert sae.columns(torch.tensor([3, 1]))["encoder"].dtype == wide
    x = torch.randn(2, 4, D, dtype=torch.float64)
    h = (x - tensors["b_dec"].double()) @ tensors["W_enc"].double() + tensors["b_enc"].double()
    wanted = torch.where(h > tensors["threshold"].double(), h.clamp(min=0), 0.0)
    assert sae.encode(x).dtype == torch.float64
    torch.testing.assert_close(sae.encode(x), wanted, atol=1e-5, rtol=1e-5)


def test_a_value_of_zero_is_encoded_to_numbers():
    x = torch.randn(2, 3, D)
    x[0, 1] = 0
    assert torch.isfinite(make_sae(norm="constant_norm_rescale").encode(x)).all()


# ---------------------------------------------------------------- hook_z


def lens_z(architecture: str = "standard", heads: int = 4, **options):
    """A sae-lens SAE of all heads' z, which it is given as [batch, tokens, heads, d_head]."""
    metadata = {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": None}
    sae = lens_sae(architecture, metadata=metadata, reshape_activations="hook_z", **options)
    assert sae.hook_z_reshaping_mode
    return sae


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_an_sae_of_z_reads_the_heads_side_by_side(tmp_path, architecture):
    """The flat value of Hugging Face's o_proj input is the heads in their order."""
    theirs = lens_z(architecture)
    theirs.save_model(tmp_path)
    x = torch.randn(2, 5, 4, D_IN // 4)
    wanted = theirs.encode(x)
    for ours in (sf.load_sae(tmp_path), sf.load_sae(theirs)):
        assert str(ours.site) == "z.1" and ours.d_in == D_IN
        torch.testing.assert_close(ours.encode(x.flatten(-2)), wanted, atol=1e-5, rtol=1e-5)
        theirs.encode(x)  # its decode reshapes by what encode saw last
        rebuilt = ours.reconstruct(x.flatten(-2)).unflatten(-1, (4, -1))
        torch.testing.assert_close(rebuilt, theirs.decode(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_ablating_latents_of_z_is_the_hand_written_edit(family, tmp_path, monkeypatch):
    """Against sae-lens's own encode of the heads' [b, t, h, d_head], at each model's projection."""
    monkeypatch.setattr("test_dictionaries.D_IN", D)
    theirs = lens_z()
    theirs.save_model(tmp_path)
    model, batch, picked = build(family), batch_of(), [3, 11, 29]
    block = blocks_of(model)[1]
    projection = block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj
    real = batch["attention_mask"].bool().unsqueeze(-1)

    def hook(_, args):
        f = theirs.encode(args[0].unflatten(-1, (4, -1)))[..., picked]
        return (torch.where(real, args[0] - f @ theirs.W_dec[picked], args[0]),)

    handle = projection.register_forward_pre_hook(hook)
    wanted = forward(model, batch)[:, -1]
    handle.remove()
    out = sf.run(wrapped(model), RAGGED, sf.Ablate(sf.load_sae(tmp_path).latents(picked)))
    torch.testing.assert_close(out.logits, wanted.detach(), atol=1e-5, rtol=1e-5)
    assert (wanted - forward(model, batch)[:, -1]).abs().max() > 1e-3


def test_a_head_of_what_has_none_is_refused(folder):
    for hook in ("blocks.1.attn.x", "blocks.1.hook_resid_post"):
        rewrite(folder, lambda c, h=hook: c["metadata"].update(hook_head_index=3, hook_name=h))
        assert "hook_q, hook_k, hook_v or hook_z" in refused(folder, names="head 3")


@pytest.mark.parametrize("named", [True, False])
def test_an_sae_of_one_head_reads_and_writes_that_head(tmp_path, named):
    """sae-lens names the head beside the hook, or in it."""
    model, batch, width = build("llama"), batch_of(RAGGED), D // 4
    g = torch.Generator().manual_seed(3)
    tensors = {
        "W_enc": torch.randn(width, 24, generator=g), "b_enc": torch.randn(24, generator=g),
        "W_dec": torch.randn(24, width, generator=g), "b_dec": torch.randn(width, generator=g),
    }  # fmt: skip
    hook = {"hook_name": "blocks.1:2.attn.hook_z"} if named else {
        "hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2,
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(
        {"architecture": "standard", "d_in": width, "d_sae": 24, "metadata": hook}
    ))  # fmt: skip
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    sae = sf.load_sae(tmp_path)
    assert sae.site == sf.Site("z", 1, head=2)

    def changed(_, args):
        x = args[0].clone()
        own = x[..., 2 * width : 3 * width]
        f = ((own - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
        own -= f[..., [1, 5, 8]] @ tensors["W_dec"][[1, 5, 8]]
        return (x,)

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(changed)
    wanted = forward(model, batch)[:, -1]
    handle.remove()
    out = sf.run(wrapped(model), RAGGED, sf.Ablate(sae.latents([1, 5, 8])))
    assert torch.allclose(out.logits, wanted, atol=1e-5)
    assert not torch.allclose(forward(model, batch)[:, -1], wanted, atol=1e-3)


# ---------------------------------------------------------------- centered writing weights


def centered_copy(model):
    """GPT-2 as TransformerLens's center_writing_weights leaves it: what is written has mean zero.

    Its logits are those of the model itself, since every LayerNorm takes the mean out.
    """
    import copy

    model = copy.deepcopy(model)
    body = model.transformer
    written = [body.wte.weight, body.wpe.weight]
    for block in body.h:
        written += [block.attn.c_proj.weight, block.attn.c_proj.bias]
        written += [block.mlp.c_proj.weight, block.mlp.c_proj.bias]
    for weight in written:
        weight.data -= weight.data.mean(-1, keepdim=True)
    return model


@torch.no_grad()
@pytest.mark.parametrize("site", ["resid_pre.1", "resid_mid.1", "resid_post.1", "mlp_out.1"])
def test_a_centered_sae_is_exact_on_a_model_with_layer_norm(site):
    """Read and ablate on the raw model as the plain SAE does on the centered one."""
    raw = build("gpt2", torch.float64)
    centered, batch = centered_copy(raw), batch_of()
    torch.testing.assert_close(forward(raw, batch), forward(centered, batch))
    tensors = tensors_for("jumprelu", dtype=torch.float64)
    plain = sf.SAE(InMemory(tensors), architecture="jumprelu", site=site)
    ours = sf.SAE(InMemory(tensors), architecture="jumprelu", site=site, centered=True)
    for edit in (sf.Ablate, lambda d: sf.Clamp(d.latents([3, 9]), 4.0)):
        results = []
        for model, sae in ((centered, plain), (raw, ours)):
            chain = sf.Probe(sae) | edit(sae)
            with sf.hooked(model, chain) as log:
                logits = forward(model, batch)
            results.append((logits, chain.readings(log)[0].values))
        assert (results[0][0] - forward(raw, batch)).abs().max() > 0.05
        real = batch["attention_mask"].bool()
        for wanted, got in zip(*results, strict=True):
            torch.testing.assert_close(got[real], wanted[real], atol=1e-9, rtol=1e-7)


@torch.no_grad()
def test_a_centered_sae_reconstructs_the_raw_value():
    """The mean it was not shown is no error of its."""
    x = torch.randn(2, 5, D, dtype=torch.float64) + 3
    tensors = tensors_for("standard", dtype=torch.float64)
    plain = sf.SAE(InMemory(tensors), site="resid_post.1")
    ours = sf.SAE(InMemory(tensors), site="resid_post.1", centered=True)
    mean = x.mean(-1, keepdim=True)
    torch.testing.assert_close(ours.reconstruct(x) - mean, plain.reconstruct(x - mean))
    probe = sf.Probe(sf.Neurons("resid_post.1", D))
    chain = probe | sf.Ablate(ours.error()) | probe
    model, batch = build("gpt2", torch.float64), batch_of()
    with sf.hooked(model, chain) as log:
        forward(model, batch)
    before, after = (r.values[batch["attention_mask"].bool()] for r in chain.readings(log))
    torch.testing.assert_close(after, ours.reconstruct(before))


@pytest.mark.parametrize("use", ["run", "hooked", "attribute", "error", "verify"])
def test_a_centered_sae_is_refused_on_a_model_with_rms_norm(use):
    model = build("llama")
    sae = sf.SAE(InMemory(tensors_for("standard")), site="resid_post.1", centered=True)
    with pytest.raises(sf.errors.ModelError, match=r"center_writing_weights.*RMSNorm"):
        if use == "hooked":
            with sf.hooked(model, sf.Ablate(sae)):
                pass
        elif use == "attribute":
            sf.Attribute(sae, sf.metrics.logit(3))(wrapped(model), RAGGED)
        elif use == "verify":
            sf.verify(wrapped(model), sae, RAGGED)
        else:
            sf.run(wrapped(model), RAGGED, sf.Ablate(sae if use == "run" else sae.error()))


@pytest.mark.parametrize(
    ("hook", "centered"),
    [
        ("hook_resid_pre", True),
        ("hook_mlp_out", True),
        ("hook_attn_out", True),
        ("attn.hook_z", False),
        ("mlp.hook_post", False),
    ],
)
def test_only_what_is_written_to_the_stream_is_centered(tmp_path, hook, centered):
    metadata = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    lens_sae("standard", metadata={"hook_name": f"blocks.1.{hook}", **metadata}).save_model(
        tmp_path
    )
    assert sf.load_sae(tmp_path).centered is centered


# ---------------------------------------------------------------- tokens it was not trained on


@pytest.mark.parametrize(
    ("where", "selected"),
    [
        (sf.Tokens.prompt(), 8),  # 12 tokens, of which 4 are special
        (sf.Tokens.first(2), 3),
        (~sf.Tokens.last(1), 5),
        (sf.Tokens.prompt() | sf.Tokens.last(1), 8),
        (sf.Tokens.where(lambda ids, position: position == 1), 2),
        (~sf.Tokens.special(), 8),
        (sf.Tokens.all(), 12),  # these two mean what they name
        (sf.Tokens.special(), 4),
        (sf.Tokens.ids(2) | sf.Tokens.last(1), 5),
    ],
    ids=repr,
)
def test_a_rule_is_narrowed_by_the_dictionarys_own_exclusion(where, selected):
    prompts = [[2, 10, 11, 12], [2, 3, 10, 1, 13, 14], [20, 21]]
    sae, nn = make_sae(excluded="special"), wrapped(build("llama"))
    out = sf.run(nn, prompts, sf.Ablate(sae, where=where) | sf.Probe(sae, where=where))
    assert out.receipt.rows[0].tokens == selected
    assert out.readings[0].mask[..., 0].sum() == selected
    scored = sf.Attribute(sae, sf.metrics.logit(5), where=where)(nn, prompts)
    assert int(scored.tokens.sum()) == selected
    free = sf.run(nn, prompts, sf.Probe(make_sae(), where=where)).readings[0]
    assert free.mask[..., 0].sum() >= selected
