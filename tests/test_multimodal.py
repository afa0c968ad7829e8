"""Multimodal models given text: the sites lie under the language model, whatever its family."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import transformers

import saefeat as sf
from helpers import (
    _GEMMA,
    _GROUPED,
    _NO_HEAD_DIM,
    LAYERS,
    PAD,
    RAGGED,
    VOCAB,
    D,
    batch_of,
    capture_inputs_outputs,
    forward,
    make_sae,
    unit,
    wrapped,
)
from saefeat.model.families import NESTED
from saefeat.model.modules import blocks, family, find
from test_ways import every_way
from zoo import ZOO
from zoo_checks import (
    clamps,
    edit_by_hand,
    every_site,
    read_all,
    scores,
    scores_by_hand,
    text_by_hand,
)

SEES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_TEXT = {**_NO_HEAD_DIM, "rope_parameters": QWEN}
QWEN_EYE = {"depth": 1, "num_heads": 2, "patch_size": 4}
T = transformers


def _others(clip) -> dict:
    """Around text models that have a table of their own, under these paths."""
    image, token = {"image_token_index": 98}, {"image_token_id": 98}
    llama, wide = T.LlamaConfig(**_GROUPED), {"image_size": [8, 8], "patch_size": [4, 4]}
    eye = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    deep = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    deep |= {"out_hidden_size": D, "deepstack_visual_indexes": [0]}
    marks = {"video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    cohere = T.Cohere2Config(**_GROUPED, sliding_window=4)
    qwen2, gemma = T.Qwen2Config(**_NO_HEAD_DIM), T.GemmaConfig(**_GROUPED)
    llama4 = {**ZOO["llama4_text"][1], "num_hidden_layers": LAYERS}
    siglip = T.SiglipVisionConfig(**SEES)
    return {
        "LlavaNext": T.LlavaNextConfig(text_config=llama, vision_config=clip, **image),
        "LlavaOnevision": T.LlavaOnevisionConfig(
            text_config=qwen2, vision_config=siglip, video_token_index=97, **image
        ),
        "PaliGemma": T.PaliGemmaConfig(
            text_config=gemma.to_dict(), vision_config=SEES, projection_dim=D, **image
        ),
        "Idefics3": T.Idefics3Config(text_config=llama, vision_config=SEES, **token),
        "SmolVLM": T.SmolVLMConfig(text_config=llama, vision_config=SEES, **token),
        "InternVL": T.InternVLConfig(
            text_config=llama.to_dict(), vision_config={**SEES, **wide}, **token
        ),
        "AyaVision": T.AyaVisionConfig(text_config=cohere.to_dict(), vision_config=SEES, **image),
        "Llama4": T.Llama4Config(text_config=llama4, vision_config={**SEES, **eye}, **image),
        "Qwen3VL": T.Qwen3VLConfig(
            text_config=dict(_GROUPED), vision_config=deep, **token, **marks
        ),
    }


def _configs() -> dict:
    image = {"image_token_index": 98}
    token = {"image_token_id": 98, "video_token_id": 97}
    token |= {"vision_start_token_id": 96, "vision_end_token_id": 95}
    eye = {**QWEN_EYE, "embed_dim": 16, "hidden_size": D, "mlp_ratio": 2}
    eye_2_5 = {**QWEN_EYE, "hidden_size": 16, "out_hidden_size": D, "intermediate_size": 16}
    clip, pixtral = T.CLIPVisionConfig(**SEES), T.PixtralVisionConfig(**SEES)
    return {
        "Gemma3": T.Gemma3Config(
            text_config=T.Gemma3TextConfig(**_GEMMA).to_dict(),
            vision_config=SEES,
            mm_tokens_per_image=4,
            boi_token_index=96,
            eoi_token_index=97,
            **image,
        ),
        "Llava": T.LlavaConfig(text_config=T.LlamaConfig(**_GROUPED), vision_config=clip, **image),
        "Mistral3": T.Mistral3Config(
            text_config=T.MistralConfig(**_GROUPED), vision_config=pixtral, **image
        ),
        **_others(clip),
        "Qwen2VL": T.Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=eye, **token),
        "Qwen2_5_VL": T.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=eye_2_5, **token),
    }


MODELS = ["Gemma3", "Llava", "Mistral3", "Qwen2VL", "Qwen2_5_VL"]
MORE = ["LlavaNext", "LlavaOnevision", "PaliGemma", "Idefics3", "SmolVLM", "InternVL"]
MORE += ["AyaVision", "Llama4", "Qwen3VL"]


def test_every_multimodal_type_is_tried():
    types = {config.model_type for config in _configs().values()}
    assert types == {*NESTED, "gemma3"} and len(_configs()) == len(MODELS) + len(MORE)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_the_text_half_has_the_sites_of_its_own_type(name):
    """Sums of the stream, plain hooks at every site, generations, the gradient."""
    model, batch = sees(name), batch_of()
    real = batch["attention_mask"].bool()
    sites = every_site(model)
    x = {site: value[real] for site, value in read_all(model, batch, sites).items()}
    total = sum(x[f"{kind}.1"] for kind in ("resid_pre", "attn_out", "mlp_out"))
    torch.testing.assert_close(x["resid_post.1"], total, atol=1e-5, rtol=1e-5)
    places = {site: find(model, sf.Site.parse(site)) for site in sites}
    some = [s for s, place in places.items() if place.transform is None and s.endswith(".1")]
    chain = clamps(model, *some)
    out = sf.run(wrapped(model), RAGGED, chain, max_new_tokens=3)
    wanted = text_by_hand(model, batch, *some)[:, batch["input_ids"].shape[1] :]
    assert [list(c) for c in out.completions] == wanted.tolist()
    found = out.logits
    torch.testing.assert_close(found, edit_by_hand(model, batch, *some), atol=1e-5, rtol=1e-5)
    slopes = scores_by_hand(model, batch, some)
    torch.testing.assert_close(scores(model, RAGGED, some), slopes, atol=1e-5, rtol=1e-4)


@cache
def _template(name: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model = getattr(T, f"{name}ForConditionalGeneration")(_configs()[name]).eval()
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = VOCAB
    model.generation_config.pad_token_id = PAD
    return model


def sees(name: str) -> torch.nn.Module:
    return copy.deepcopy(_template(name))


def modules_of(model, layer: int = 1) -> dict[str, tuple[torch.nn.Module, str]]:
    """Each kind's module and end, written down by hand."""
    block = model.model.language_model.layers[layer]
    found = {
        "resid_pre": (block, "input"),
        "z": (block.self_attn.o_proj, "input"),
        "attn_out": (block.self_attn, "output"),
        "mlp_in": (block.mlp, "input"),
        "mlp_post": (block.mlp.down_proj, "input"),
        "mlp_out": (block.mlp, "output"),
        "resid_post": (block, "output"),
    }
    if hasattr(block, "post_feedforward_layernorm"):
        found["attn_out"] = (block.post_attention_layernorm, "output")
        found["mlp_out"] = (block.post_feedforward_layernorm, "output")
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_the_language_models(name):
    model, batch = sees(name), batch_of()
    parts = modules_of(model)
    seen = capture_inputs_outputs(model, {kind: m for kind, (m, _) in parts.items()}, batch)
    wanted = {kind: seen[kind][end] for kind, (_, end) in parts.items()}
    attention = model.model.language_model.layers[1].self_attn
    for kind in "qkv":
        part = {kind: getattr(attention, f"{kind}_proj")}
        wanted[kind] = capture_inputs_outputs(model, part, batch)[kind]["output"]
    pre = wanted["resid_pre"].double()
    wanted["resid_mid"] = wanted["resid_pre"] + wanted["attn_out"]
    mid = wanted["resid_mid"].double()
    norm = model.get_submodule(find(model, sf.Site("mlp_norm", 1)).path)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    wanted["attn_norm"] = (pre / (pre.pow(2).mean(-1, keepdim=True) + eps).sqrt()).float()
    wanted["mlp_norm"] = (mid / (mid.pow(2).mean(-1, keepdim=True) + eps).sqrt()).float()
    assert len(blocks(model)) == LAYERS and set(wanted) == set(family(model)[1])
    for kind, value in wanted.items():
        probe = sf.Probe(sf.Neurons(f"{kind}.1", value.shape[-1]))
        with torch.no_grad(), sf.hooked(model, probe) as log:
            model(**batch)
        read = probe.readings(log)[0].values
        torch.testing.assert_close(read, value, atol=1e-5, rtol=1e-5, msg=kind)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_running_agrees(name):
    model, batch = sees(name), batch_of()
    sae = make_sae("jumprelu", "resid_post.1")
    chain = sf.Clamp(sae.latents([3, 40]), 4.0) | sf.Clamp(
        sf.Direction(unit(), site="mlp_out.2"), add=3.0, where=sf.Tokens.last(2)
    )
    found = every_way(model, batch, chain)
    logits, tokens = found["hooked"]
    assert (logits - forward(model, batch)[:, -1]).abs().max() > 1e-2
    for way, (other, others) in found.items():
        torch.testing.assert_close(other, logits, atol=1e-4, rtol=1e-4, msg=way)
        assert torch.equal(others, tokens), way


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_is_the_hand_written_hooks(name):
    model, batch = sees(name), batch_of()
    v, real = 2.0 * unit(), batch["attention_mask"].bool().unsqueeze(-1)

    def hook(_, __, out):
        x = out[0] if isinstance(out, tuple) else out
        x = torch.where(real, x + v, x)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = modules_of(model)["resid_post"][0].register_forward_hook(hook)
    wanted = forward(model, batch)[:, -1]
    handle.remove()
    out = sf.run(wrapped(model), RAGGED, sf.Clamp(sf.Direction(v, site="resid_post.1"), add=2.0))
    torch.testing.assert_close(out.logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Gemma3", "Qwen2VL"])
def test_attribution_runs_and_paths_agree(name):
    nn = wrapped(sees(name))
    by_name = sf.Attribute(make_sae("standard", "resid_post.1"), sf.metrics.logit(7))(nn, RAGGED)
    path = "model.language_model.layers.1.output"
    by_path = sf.Attribute(make_sae("standard", path), sf.metrics.logit(7))(nn, RAGGED)
    assert len(by_name.score) > 20
    torch.testing.assert_close(by_name.score, by_path.score)


def test_a_text_model_outside_the_table_is_named():
    model = sees("Llava")
    model.config.text_config.model_type = "strange"
    with pytest.warns(sf.errors.InferredSitesWarning, match="strange"):
        path, table = family(model)
    known, whole = family(sees("Llava"))
    assert path == known and set(table) > {"resid_mid", "mlp_norm", "z"}
    assert all(whole[kind] == place for kind, place in table.items())
