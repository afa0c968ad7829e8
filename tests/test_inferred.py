"""Models of a type that no table has: what is inferred is right, or is not offered."""

from __future__ import annotations

import warnings

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import RAGGED, batch_of, wrapped
from saefeat.model.modules import blocks, family, find, has_site
from saefeat.model.sites import HOOKS
from saefeat.results.provenance import model_identity
from zoo import ZOO, model_of
from zoo_checks import edit_by_hand, read_all, unit_of

FEW = ["llama", "gpt2", "bloom", "falcon", "qwen3_moe", "glm4"]
ALL = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
NONE = ("gemma3n_text",)  # several streams
LEAST = {"resid_pre", "resid_post"}
MOST = LEAST | {"attn_norm", "z", "attn_out", "mlp_in", "mlp_out"}
FEWER = ("opt", "opt post-norm", "bloom post-norm", "granite", "granitemoe", "falcon_h1")
FEWER += ("recurrent_gemma", "zamba2", "mamba", "mamba2", "olmo2", "olmo3", "exaone4")


def hidden(name: str):
    """A model whose type says nothing."""
    model = model_of(name)
    model.config.model_type = "strange"
    return model


def table_of(model) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sf.errors.InferredSitesWarning)
        return family(model)[1]


@pytest.mark.parametrize("name", ALL)
def test_what_is_inferred_is_what_the_table_says(name):
    known, model, batch = model_of(name), hidden(name), batch_of()
    if name in NONE:
        with pytest.raises(sf.errors.ModelError, match="no blocks that add up"):
            family(model)
        return
    kinds = set(table_of(model))
    assert kinds >= (LEAST if name in FEWER else MOST)
    sites = [sf.Site(k, n) for n in range(len(blocks(known))) for k in HOOKS if k in kinds]
    for site in (site for site in sites if has_site(model, site)):
        here, there = find(model, site), find(known, site)  # which the table must have, too
        if here == there:
            continue
        mine, wanted = (read_all(m, batch, [str(site)])[str(site)] for m in (model, known))
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(mine[real], wanted[real], atol=1e-5, rtol=1e-5, msg=str(site))
        if here.transform is None:
            pair = (edit_by_hand(m, batch, str(site)) for m in (model, known))
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5, msg=str(site))


def test_it_is_said_once_a_model_and_in_provenance():
    model = hidden("llama")
    edit = sf.Clamp(sf.Direction(unit_of(32), site="attn_out.1"), 3.0)
    with pytest.warns(sf.errors.InferredSitesWarning, match=r"type 'strange'.*mlp_out") as said:
        out = sf.run(wrapped(model), RAGGED, edit)
    assert len(said) == 1
    wanted = edit_by_hand(model_of("llama"), batch_of(), "attn_out.1")
    torch.testing.assert_close(out.logits, wanted, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        basis = sf.Direction(unit_of(32), site="attn_out.1").latents()
        scores = sf.Attribute(basis, sf.logit_diff(5, 6))(wrapped(model), RAGGED)
    assert scores.provenance.settings["sites"] == "inferred from the modules"


def test_it_can_be_inferred_within_a_trace():
    nn, batch = wrapped(hidden("llama")), batch_of()
    edit = sf.Clamp(sf.Direction(unit_of(32), site="mlp_out.1"), 3.0)
    with pytest.warns(sf.errors.InferredSitesWarning), torch.no_grad(), nn.trace(batch):
        edit(nn)
        logits = nnsight.save(nn.output.logits[:, -1])
    wanted = edit_by_hand(model_of("llama"), batch, "mlp_out.1")
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


def test_hooks_of_others_see_nothing_of_it():
    model, calls = hidden("llama"), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    table_of(model)
    assert not calls and len(model.model.layers[0]._forward_hooks) == 1


def test_without_weights_it_is_refused():
    model = hidden("llama").to("meta")
    with pytest.raises(sf.errors.ModelError, match="dispatch=True"):
        family(model)


def test_what_does_not_add_up_is_not_offered():
    """Granite adds a part of what its modules return; and a norm times its input is no norm."""
    kinds = set(table_of(hidden("granite")))
    assert not kinds & {"attn_out", "resid_mid", "mlp_out", "z", "mlp_post"}
    model = hidden("llama")
    for block in model.model.layers:
        inner = block.post_attention_layernorm.forward
        block.post_attention_layernorm.forward = lambda x, inner=inner: inner(x) * x[..., :1]
    kinds = set(table_of(model))
    assert "mlp_norm" not in kinds and {"attn_norm", "attn_out", "mlp_out"} <= kinds


def test_sites_without_a_layer_are_refused_there():
    model = hidden("granite")
    table_of(model)
    for kind in ("embed", "final_norm", "logits"):
        with pytest.raises(sf.errors.SiteError, match="was not inferred"):
            find(model, sf.Site(kind))


def test_two_lists_of_blocks_are_none():
    model = hidden("llama")
    model.model.others = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    with pytest.raises(sf.errors.ModelError, match="no blocks that add up"):
        family(model)


def test_in_train_mode_with_dropout_it_is_refused():
    """Two passes differ there; in eval mode the same model shows all it has."""
    model = hidden("gpt2").train()
    with pytest.raises(sf.errors.ModelError, match=r"no two passes.*model\.eval\(\)"):
        family(model)
    model.eval()
    assert set(table_of(model)) == set(table_of(hidden("gpt2"))) > {"attn_out"}


def test_a_model_is_the_same_before_and_after():
    """A checkpoint goes on in a process that has inferred nothing yet."""
    model = wrapped(hidden("llama"))
    before = model_identity(model)
    table_of(model._module)
    assert model_identity(model) == before
