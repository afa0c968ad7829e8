"""Paths with ``~``, a folder of one SAE, and folders that a training left."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import saefeat as sf
from helpers import batch_of, build, make_sae, wrapped
from saefeat.files.paths import expanded
from test_loading_layouts import flat, save, state_of, tensors, trainer
from test_loading_layouts import native as native_folder

REFUSED = sf.errors.DictionaryError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(elsewhere)
    yield tmp_path / "home"
    assert list(elsewhere.iterdir()) == []  # no folder that is called ~


def test_a_home_folder_is_meant_wherever_a_path_is_taken(home):
    native_folder(home / "saes" / "one", flat())
    assert sf.load_sae("~/saes/one").d_sae == sf.load_saes("~/saes")[2].d_sae
    nn, sae = wrapped(build("llama")), make_sae()
    edit = sf.Ablate(sae.latents([1]))
    sf.save(edit, "~/edit.safetensors")
    assert sf.load("~/edit.safetensors").latents.to_dict() == edit.latents.to_dict()
    sf.run(nn, batch_of(), edit, checkpoint="~/job")
    assert (home / "job" / "identity.json").is_file()
    again = sf.run(nn, batch_of(), edit, checkpoint="~/job")
    assert again.receipt == sf.run(nn, batch_of(), edit).receipt
    scores = sf.Attribute(sae, sf.metrics.logit_diff([5], [6]))(nn, [[2, 10, 11]])
    scores.save("~/scores.safetensors")
    assert (
        sf.attribution.Attribution.load("~/scores.safetensors", saes=[sae]).metric == scores.metric
    )
    adds = sf.Clamp(sf.Direction(torch.ones(32), site="resid_post.1"), add=2.0)
    sf.hub.steering_vector(adds, path="~/steer.safetensors")
    assert {path.name for path in home.iterdir()} == {
        "saes", "edit.safetensors", "job", "scores.safetensors", "steer.safetensors",
    }  # fmt: skip


def test_a_home_that_nobody_has_is_refused():
    with pytest.raises(REFUSED, match=r"load_sae: `folder` is '~nobody-at-all/x'.*Try:"):
        sf.load_sae("~nobody-at-all/x")
    with pytest.raises(sf.errors.FileError, match="home folder"):
        sf.load("~nobody-at-all/x")
    assert str(expanded("a/~b", "x")) == "a/~b"


def test_a_folder_of_one_sae_is_one_dictionary(tmp_path):
    """Said to be wanted, and refused for being exactly that."""
    folder = native_folder(tmp_path / "resid_2", flat())
    saes = sf.load_saes(folder)
    assert [str(site) for site in saes] == ["resid_pre.2"] and saes[2].name == "resid_2"
    assert saes[2].fingerprint() == sf.load_sae(folder).fingerprint()
    assert len(sf.load_saes(folder, sites="resid_pre", width=48, ids="resid_*")) == 1
    (folder / "notes").mkdir()
    assert len(sf.load_saes(folder)) == len(sf.load_saes(tmp_path)) == 1


# ---------------------------------------------------------------- what trainings leave


@pytest.mark.parametrize("name", ["optimizer.state.0.exp_avg", "optim.step", "exp_avg_sq.W_enc",
                                  "n_forward_passes_since_fired"])  # fmt: skip
def test_weights_with_a_training_state_are_named_as_such(tmp_path, name):
    native_folder(tmp_path / "a", flat(), **{name: torch.ones(3)})
    save(tensors() | {name: torch.ones(3)}, tmp_path / "b" / "ae.safetensors")
    (tmp_path / "b" / "config.json").write_text(json.dumps(trainer("JumpReluAutoEncoder")))
    for folder in ("a", "b"):
        with pytest.raises(REFUSED, match="training checkpoint") as caught:
            sf.load_sae(tmp_path / folder)
        assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "lr_scheduler_0.pt",
                                  "training_args.bin", "ae_5000.pt", "state.pt"])  # fmt: skip
def test_a_folder_of_a_trainer_is_named_as_such(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    torch.save(state_of("AutoEncoder"), tmp_path / "model.pt")
    for load in (sf.load_sae, sf.load_saes):
        with pytest.raises(REFUSED, match=f"training checkpoint: {name}"):
            load(tmp_path)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
def test_a_training_checkpoint_of_sae_lens_says_how_to_save_it(tmp_path, kind):
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    cls, config = get_sae_training_class(kind)
    widths = {"matryoshka_widths": [8, 48]} if "matryoshka" in kind else {}
    hook = SAEMetadata(hook_name="blocks.1.hook_resid_post")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = cls(config(d_in=16, d_sae=48, k=4, metadata=hook, **widths))
    made.save_model(tmp_path / "training")
    with pytest.raises(REFUSED, match=r"training checkpoint.*save_inference_model"):
        sf.load_sae(tmp_path / "training")
    made.save_inference_model(tmp_path / "final")
    assert sf.load_sae(tmp_path / "final").architecture == "jumprelu"
