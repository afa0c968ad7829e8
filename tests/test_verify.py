"""verify: a dictionary at a wrong site is found out, and the right site is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, make_sae, tokenizer, wrapped
from saefeat.loading.declaration import Declared, notes
from saefeat.studies.refusal import tiny

PROMPTS = [
    [{"role": "user", "content": request.instruction}]
    for request in (*tiny.splits()["harmless_train"][:12], *tiny.splits()["harmful_train"][:12])
]


@pytest.fixture(scope="module")
def model():
    return tiny.model("chat")


def folder(name: str):
    return tiny.saes_folder("chat") / name


def test_the_shipped_saes_are_where_they_say(model):
    saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
    found = sf.verify(model, saes, PROMPTS)
    assert found.right and len(found.checks) == len(saes)
    for check in found.checks:
        assert check.fvu < 0.1 and 5 < check.l0 < 30


@pytest.mark.parametrize("name", ["mlp_out_2", "transcoder_2"])
def test_an_mlp_sae_and_a_transcoder_are_right_too(model, name):
    found = sf.verify(model, sf.load_sae(folder(name)), PROMPTS)
    assert found.right and found.checks[0].fvu < 0.2


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("resid_post_2", "resid_post.1"),
        ("resid_post_1", "resid_post.2"),
        ("resid_post_2", "resid_pre.2"),
        ("mlp_out_2", "attn_out.2"),
        ("mlp_out_2", "resid_post.2"),
    ],
)
def test_a_wrong_site_is_refused_by_the_right_ones_name(model, name, site):
    right = sf.load_sae(folder(name)).site
    with pytest.raises(sf.errors.SiteError) as caught:
        sf.verify(model, sf.load_sae(folder(name), site=site), PROMPTS)
    best = str(caught.value).split('site="')[1].split('"')[0]
    # resid_post of one layer is resid_pre of the next: either name is right
    same = {str(right)} | (
        {f"resid_pre.{right.layer + 1}"} if right.kind == "resid_post" else set()
    )
    assert best in same and "WRONG" in str(caught.value)
    report = sf.verify(model, sf.load_sae(folder(name), site=site), PROMPTS, strict=False)
    assert not report.right and "WRONG" in repr(report)


def test_the_sae_of_another_model_is_refused(model):
    with pytest.raises(sf.errors.SiteError):
        sf.verify(model, make_sae("jumprelu"), PROMPTS)  # another width
    stranger = wrapped(build())
    with pytest.raises(sf.errors.SiteError, match="unexplained"):
        sf.verify(stranger, make_sae("jumprelu"), RAGGED)  # random: explains nothing anywhere


def test_what_cannot_reconstruct_is_named(model):
    v = sf.dictionaries.Dictionaries([sf.Direction(torch.ones(D), site="resid_post.1")])
    with pytest.raises(sf.errors.DictionaryError, match="Direction"):
        sf.verify(model, v, PROMPTS)


def test_fvu_is_the_unexplained_variance(model):
    """Against numbers worked out by hand from the captured values."""
    sae = sf.load_sae(folder("resid_post_2"))
    kept = ~sf.Tokens.ids(model.tokenizer.bos_token_id)
    probe = sf.Probe(sf.Neurons("resid_post.2", sae.d_in), where=kept)
    reading = sf.run(model, PROMPTS, probe).readings[0]
    x = reading.values[reading.mask[..., 0]]
    wanted = (x - sae.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    check = sf.verify(model, sae, PROMPTS).checks[0]
    assert check.fvu == pytest.approx(float(wanted), rel=1e-4)
    assert check.l0 == pytest.approx(float((sae.encode(x) > 0).sum(-1).float().mean()), rel=1e-4)


# ---------------------------------------------------------------- what the files declare


def rewritten(tmp_path, **metadata):
    """The shipped SAE of layer 1, declaring something else of its training."""
    shutil.copytree(folder("resid_post_1"), tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    config = json.loads(path.read_text())
    config["metadata"] |= metadata
    path.write_text(json.dumps(config))
    return sf.load_sae(tmp_path / "sae")


def test_the_declared_l0_is_in_the_table(model):
    found = sf.verify(model, sf.load_sae(folder("resid_post_1")), PROMPTS)
    assert found.checks[0].declared == 12.0 and not found.checks[0].notes
    assert "declared" in repr(found) and "note:" not in repr(found)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"l0": 80.0}, "declares an L0 of 80, and 1"),
        ({"l0": 2.0}, "declares an L0 of 2"),
        ({"prepend_bos": False}, "trained without BOS, and 24 of 24 prompts begin with it"),
        ({"l0": 13.0}, ""),
    ],
)
def test_what_differs_is_noted_and_is_no_error(model, tmp_path, metadata, said):
    found = sf.verify(model, rewritten(tmp_path, **metadata), PROMPTS)
    assert found.right
    assert any(said in note for note in found.checks[0].notes) or not (
        said or found.checks[0].notes
    )
    assert not said or f"note: sae: {found.checks[0].notes[0]}" in repr(found)


def noted(declared: Declared, *, name="", prompts=((2, 5), (2, 6)), l0=10.0, fvu=0.2):
    model, sae = build("llama"), make_sae()
    model.config.name_or_path, sae.declared = name, declared
    return notes(sae, model, prompts, 2, l0, fvu)


@pytest.mark.parametrize(
    ("trained", "here", "said"),
    [
        ("gemma-2-2b", "google/gemma-2-2b", None),
        ("gpt2-small", "openai-community/gpt2", None),
        ("meta-llama/Llama-3.1-8B", "unsloth/Llama-3.1-8B", None),
        ("gemma-2-2b", "google/gemma-2-2b-it", "tuned further"),
        ("google/gemma-3-4b-pt", "google/gemma-3-4b-it", "tuned further"),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", "tuned further"),
        ("gemma-2-2b", "google/gemma-2-9b", "this model is called google/gemma-2-9b"),
        ("gpt2-small", "openai-community/gpt2-medium", "is called"),
        ("gemma-2-2b", "", None),
        (None, "google/gemma-2-9b", None),
        ("gemma-2-2b", ".", None),  # a folder, which may be called anything
    ],
)
def test_the_models_name(trained, here, said):
    found = noted(Declared(model=trained), name=here)
    assert not found if said is None else said in found[0]


def test_width_variance_and_bos():
    assert noted(Declared(width=16384)) == ("declares 16,384 latents and holds 48",)
    assert noted(Declared(explained=0.9, width=48), fvu=0.2) == ()
    assert "explains 40% here" in noted(Declared(explained=0.9), fvu=0.6)[0]
    assert noted(Declared(prepend_bos=True)) == ()
    assert (
        "1 of 2 prompts have none" in noted(Declared(prepend_bos=True), prompts=((2, 5), (6,)))[0]
    )
    assert "two BOS" in noted(Declared(), prompts=((2, 2, 5), (2, 6)))[0]
    assert notes(make_sae(), build("llama"), (), 2, 1.0, 1.0) == ()  # nothing is declared


def test_a_gemma_scope_folder_says_its_model(tmp_path):
    from saefeat.loading.gemma_scope import _model

    assert _model("google/gemma-scope-2b-pt-res/layer_1") == "gemma-2-2b"
    assert _model("google/gemma-scope-9b-it-res/layer_9") == "gemma-2-9b-it"
    assert _model("google/gemma-scope-2-1b-pt/resid_post/layer_1") == "gemma-3-1b-pt"
    assert _model("elsewhere/layer_1") is None


def test_values_that_overflow_are_said_to():
    """A bfloat16 model in float16: infinities, which compare as nothing."""
    model = build("llama", torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e5
    with pytest.raises(sf.errors.ModelError, match=r"float16.*not finite.*bfloat16"):
        sf.verify(wrapped(model), make_sae(), RAGGED)


def test_train_mode_is_refused():
    nn = wrapped(build("gpt2"))
    nn._module.train()
    with pytest.raises(sf.errors.ModelError, match="train mode"):
        sf.verify(nn, make_sae(), RAGGED)


# ---------------------------------------------------------------- at a path, and looking back


def test_an_sae_at_a_path_is_held_against_the_layers_beside(model):
    right = sf.load_sae(folder("resid_post_2"), site="model.layers.2.output")
    found = sf.verify(model, right, PROMPTS)
    assert (
        found.right
        and found.checks[0].fvu
        == sf.verify(model, sf.load_sae(folder("resid_post_2")), PROMPTS).checks[0].fvu
    )
    wrong = sf.load_sae(folder("resid_post_2"), site="model.layers.1.output")
    with pytest.raises(
        sf.errors.SiteError, match=r'load_sae\(folder, site="model\.layers\.2\.output"'
    ):
        sf.verify(model, wrong, PROMPTS)


def test_a_path_on_a_model_outside_the_table():
    from test_paths import stranger

    path = "model.decoder.layers.1.output"
    found = sf.verify(wrapped(stranger("OPT")), make_sae("standard", path), RAGGED, strict=False)
    assert {str(found.checks[0].site), str(found.checks[0].best)} <= {path, path.replace("1", "0")}


@pytest.mark.parametrize("architecture", ["matching_pursuit", "temporal"])
def test_saes_that_are_read_whole_are_verified(architecture):
    """Against sae-lens's own forward, row by row without padding, less BOS."""
    from test_mixing import lens

    theirs, nn = lens(architecture), wrapped(build("llama"))
    prompts = [[2, *tokenizer()(text)["input_ids"]] for text in RAGGED]
    check = sf.verify(nn, sf.load_sae(theirs), prompts, strict=False).checks[0]
    reading = sf.run(nn, prompts, sf.Probe(sf.Neurons("resid_post.1", D))).readings[0]
    rows = [x[m] for x, m in zip(reading.values, reading.mask[..., 0], strict=True)]
    with torch.no_grad():
        f = torch.cat([theirs.encode(x.unsqueeze(0))[0, 1:] for x in rows])
        guess = torch.cat([theirs(x.unsqueeze(0))[0, 1:] for x in rows])
    target = torch.cat([x[1:] for x in rows])
    fvu = (target - guess).square().sum() / (target - target.mean(0)).square().sum()
    assert check.fvu == pytest.approx(float(fvu), rel=1e-4)
    assert check.l0 == pytest.approx(float((f != 0).sum(-1).float().mean()))
