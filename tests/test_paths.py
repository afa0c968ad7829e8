"""Sites by module path: any place of any model, in the order a pass really takes."""

from __future__ import annotations

import copy
from functools import cache, partial

import nnsight
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import saefeat as sf
from helpers import (
    BOS,
    EOS,
    PAD,
    RAGGED,
    VOCAB,
    D,
    batch_of,
    build,
    capture_inputs_outputs,
    forward,
    hook_count,
    make_sae,
    tokenizer,
    unit,
    wrapped,
)
from saefeat.dictionaries.weights import InMemory
from saefeat.model.route import route
from test_ways import every_way

OTHERS = {
    "OPT": {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": D},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "StableLm": {"intermediate_size": 64, "num_key_value_heads": 4},
    "Mixtral": {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4},
}
BLOCKS = {"OPT": "model.decoder.layers", "Bloom": "transformer.h", "StableLm": "model.layers"}
INSIDE = {"OPT": "fc1", "Bloom": "mlp.dense_h_to_4h", "StableLm": "mlp.gate_proj"}
"""A projection within each family's block, at its output."""
IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}


@cache
def _stranger(name: str) -> torch.nn.Module:
    shape = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "tie_word_embeddings": False}
    config = getattr(transformers, f"{name}Config")(**shape, **IDS, **OTHERS[name])
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = VOCAB
    model.generation_config.pad_token_id = PAD
    return model


def stranger(name: str) -> torch.nn.Module:
    """A tiny model of a family that is not in the table."""
    return copy.deepcopy(_stranger(name))


def paths_of(name: str) -> dict[str, int]:
    """Path sites of a stranger → their widths."""
    block, inner = f"{BLOCKS[name]}.1", INSIDE[name]
    wide = 64 if name != "Bloom" else 4 * D
    return {f"{block}.input": D, f"{block}.{inner}.output": wide, f"{block}.output": D}


# ---------------------------------------------------------------- names


@given(
    parts=st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), min_size=1, max_size=4),
    layer=st.integers(0, 200),
    end=st.sampled_from(["input", "output"]),
)
def test_a_path_prints_and_parses(parts, layer, end):
    name = ".".join([*parts, str(layer), end])
    site = sf.Site.parse(name)
    assert str(site) == name == site.hook and site.layer is None
    assert eval(repr(site), {"Site": sf.Site}) == site == sf.Site(name)
    assert {site: 1}[sf.Site.parse(name)] == 1


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp", "output", ".output", "model..output", "model.layers.3.outputs"]
)
def test_a_path_without_its_end_is_refused(name):
    with pytest.raises(sf.errors.SiteError, match=r"\.input or \.output"):
        sf.Site.parse(name)


def test_a_path_has_no_layer():
    with pytest.raises(sf.errors.SiteError, match="names its layer itself"):
        sf.Site("model.layers.3.output", 3)


def test_paths_list_after_kinds_and_by_number():
    names = ["model.layers.10.output", "resid_post.1", "model.layers.9.output", "resid_pre.0"]
    sites = sorted(map(sf.Site.parse, names), key=lambda site: site.order)
    assert [str(site) for site in sites] == [names[3], names[1], names[2], names[0]]


def test_a_mapping_holds_paths_and_kinds():
    sites = ["model.layers.1.mlp.output", "resid_post.1"]
    both = sf.Direction.at_sites(torch.ones(D), sites=sites)
    assert both["model.layers.1.mlp.output"].site == sf.Site(sites[0])
    assert both[1].site == sf.Site("resid_post", 1)
    assert str(both.latents().sites[1]) == sites[0]


# ---------------------------------------------------------------- any model, every way


@pytest.mark.parametrize("name", ["OPT", "Bloom", "StableLm"])
def test_a_probe_reads_what_a_plain_hook_sees(name):
    model, batch = stranger(name), batch_of()
    for path, width in paths_of(name).items():
        module, _, end = path.rpartition(".")
        seen = capture_inputs_outputs(model, {"m": model.get_submodule(module)}, batch)["m"][end]
        seen = seen.reshape(*batch["input_ids"].shape, width)  # OPT's MLP sees one row
        probe = sf.Probe(sf.Neurons(path, width))
        with torch.no_grad(), sf.hooked(model, probe) as log:
            model(**batch)
        assert torch.equal(probe.readings(log)[0].values, seen)


@pytest.mark.parametrize("name", ["OPT", "Bloom", "StableLm"])
def test_every_way_of_running_gives_the_hand_written_edit(name):
    """x + 2v at three paths at once, listed against the order in which they are reached."""
    model, batch = stranger(name), batch_of()
    directions = {
        path: sf.Direction(
            torch.randn(width, generator=torch.Generator().manual_seed(n)), site=path
        )
        for n, (path, width) in enumerate(paths_of(name).items())
    }
    chain = sf.verbs.base.Chain(tuple(sf.Clamp(d, add=2.0) for d in reversed(directions.values())))
    real = batch["attention_mask"].bool().unsqueeze(-1)
    handles = []
    for path, direction in directions.items():
        module, _, end = path.rpartition(".")
        step = 2.0 * direction.vectors[0]

        def before(_, args, step=step):
            return (torch.where(real, args[0] + step, args[0]), *args[1:])

        def after(_, args, out, step=step):
            x = out[0] if isinstance(out, tuple) else out
            new = torch.where(real if x.ndim == 3 else real.reshape(-1, 1), x + step, x)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        target = model.get_submodule(module)
        hook = target.register_forward_pre_hook if end == "input" else target.register_forward_hook
        handles.append(hook(before if end == "input" else after))
    wanted = forward(model, batch)[:, -1]
    for handle in handles:
        handle.remove()
    assert (wanted - forward(model, batch)[:, -1]).abs().max() > 0.1
    found = every_way(model, batch, chain)
    first = found["hooked"][1]
    for way, (logits, tokens) in found.items():
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4, msg=way)
        assert torch.equal(tokens, first), way
    assert hook_count(model) == 0


def dictionaries_at(path: str) -> dict[str, sf.dictionaries.Dictionary]:
    sae = make_sae("jumprelu", path)
    return {
        "SAE": sae,
        "topk": make_sae("topk", path),
        "error": sae.error(),
        "subspace": sf.Direction(torch.randn(3, D), site=path),
        "neurons": sf.Neurons(path, D),
        "generic": sf.dictionaries.Function(torch.square, torch.eye(D), site=path, width=D),
        "transcoder": make_sae("transcoder", path, write_site="model.layers.1.mlp.output"),
    }


@pytest.mark.parametrize("kind", list(dictionaries_at("model.layers.1.output")))
def test_every_dictionary_may_lie_at_a_path(kind):
    """It gives what the same dictionary gives at the table's site for that place."""
    nn = wrapped(build("llama"))
    path, named = "model.layers.1.self_attn.output", "attn_out.1"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        by_path = dictionaries_at(path)[kind]
        torch.manual_seed(0)
        by_name = dictionaries_at(named)[kind]
    outs = []
    for dictionary in (by_path, by_name):
        some = dictionary.latents(range(min(5, dictionary.d_sae)))
        chain = sf.Clamp(some, 1.5) | sf.Probe(some)
        if dictionary.site != dictionary.write_site:
            chain = sf.Probe(some) | sf.Clamp(some, 1.5)
        outs.append(sf.run(nn, RAGGED, chain, max_new_tokens=3))
    assert torch.equal(outs[0].logits, outs[1].logits)
    assert outs[0].completions == outs[1].completions
    assert torch.equal(outs[0].readings[0].values, outs[1].readings[0].values)
    assert (outs[0].logits - sf.run(nn, RAGGED).logits).abs().max() > 1e-3


def test_an_embedding_and_the_last_norm_are_sites_too():
    model = build("llama")
    ends = sf.Direction.at_sites(unit(), sites=["model.norm.output", "model.embed_tokens.output"])
    out = sf.run(wrapped(model), RAGGED, sf.Clamp(ends, add=1.0))
    batch = batch_of()
    module = {"n": model.model.norm, "e": model.model.embed_tokens}
    handle = module["e"].register_forward_hook(lambda _, __, x: x + unit())
    again = module["n"].register_forward_hook(lambda _, __, x: x + unit())
    wanted = forward(model, batch)[:, -1]
    handle.remove()
    again.remove()
    torch.testing.assert_close(out.logits, wanted, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_the_order_is_that_of_a_real_pass(family):
    model, batch = build(family), batch_of()
    parts = [name for name, m in model.named_modules() if ".1." in name and not list(m.children())]
    parts = [name for name in parts if not name.endswith(("dropout", "rotary_emb"))]
    names = [f"{name}.{end}" for name in reversed(parts) for end in ("output", "input")]
    sites = []
    for name in names:
        try:
            route(model, [sf.Site(name)])
            sites.append(sf.Site(name))
        except sf.errors.SiteError:  # dropout that is no module, a mask
            continue
    assert len(sites) > 10
    reached, handles = [], []
    for site in sites:
        module, _, end = site.kind.rpartition(".")
        target = model.get_submodule(module)
        hook = target.register_forward_pre_hook if end == "input" else target.register_forward_hook
        handles.append(hook(lambda *_, site=site: reached.append(site)))
    forward(model, batch)
    for handle in handles:
        handle.remove()
    orders = route(model, sites).orders
    assert sorted(sites, key=lambda site: orders[site]) == reached


def test_paths_and_kinds_in_one_chain_act_in_the_order_they_are_reached():
    """The last probe must see what every earlier place was changed to, whatever the listing."""
    nn = wrapped(build("gemma2"))
    post = sf.Probe(sf.Neurons("resid_post.1", D))
    norm = sf.Clamp(
        sf.Direction(unit(1), site="model.layers.1.post_feedforward_layernorm.output"), add=3.0
    )
    mid = sf.Clamp(sf.Direction(unit(2), site="resid_mid.1"), add=2.0)
    some = sf.run(nn, RAGGED, norm | post | mid)
    other = sf.run(nn, RAGGED, mid | norm | post)
    assert torch.equal(some.readings[0].values, other.readings[0].values)
    assert torch.equal(some.logits, other.logits)
    clean = sf.run(nn, RAGGED, mid | post).readings[0].values
    mask = some.readings[0].mask
    moved = (some.readings[0].values - clean)[mask.expand_as(clean)].reshape(-1, D)
    torch.testing.assert_close(moved, (3.0 * unit(1)).expand_as(moved), atol=1e-4, rtol=0)


def test_at_one_place_the_second_reads_what_the_first_left():
    nn = wrapped(build("llama"))
    by_path = sf.Direction(unit(), site="model.layers.1.output")
    by_name = sf.Direction(unit(), site="resid_post.1")
    chain = sf.Clamp(by_path, 4.0) | sf.Probe(by_name) | sf.Clamp(by_name, -1.0) | sf.Probe(by_path)
    first, second = sf.run(nn, RAGGED, chain).readings
    assert torch.allclose(first.values[first.mask], torch.tensor(4.0), atol=1e-5)
    assert torch.allclose(second.values[second.mask], torch.tensor(-1.0), atol=1e-5)


def test_a_condition_behind_the_edit_is_refused():
    nn = wrapped(stranger("OPT"))
    late = sf.Direction(unit(), site="model.decoder.layers.1.output")
    early = sf.Direction(torch.ones(64), site="model.decoder.layers.1.fc1.output")
    with pytest.raises(sf.errors.SiteError, match="reaches the condition after"):
        sf.run(nn, RAGGED, sf.Ablate(early, when=sf.When(late)))
    sf.run(nn, RAGGED, sf.Ablate(late, when=sf.When(early, above=-1e9)))


def test_written_before_it_is_read_is_refused():
    at = "model.decoder.layers.{}.output"
    back = sf.dictionaries.Function(
        torch.relu, torch.eye(D), site=at.format(1), write_site=at.format(0), width=D
    )
    with pytest.raises(sf.errors.SiteError, match="no earlier than the read site"):
        sf.run(wrapped(stranger("OPT")), RAGGED, sf.Ablate(back.latents([0])))


# ---------------------------------------------------------------- attribution


def test_attribution_at_a_path_is_gradient_times_activation():
    """Against autograd through a hook, at a projection inside an OPT's block."""
    model, batch = stranger("OPT"), batch_of()
    path = "model.decoder.layers.1.fc1"
    kept = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, __, out: kept.append(out.requires_grad_()) or out
    )
    positions = batch["attention_mask"].cumsum(1).sub(1).clamp(min=0)
    logits = model(**batch, position_ids=positions).logits[:, -1, 7]
    gradient = torch.autograd.grad(logits.sum(), kept[0])[0]
    handle.remove()
    wanted = (-kept[0] * gradient).detach().reshape(*batch["input_ids"].shape, 64)
    found = sf.Attribute(sf.Neurons(f"{path}.output", 64), sf.metrics.logit(7))(
        wrapped(model), RAGGED
    )
    got = torch.zeros_like(wanted)
    columns = found.position + (batch["attention_mask"] == 0).sum(1)[found.prompt]
    got[found.prompt, columns, found.latent] = found.score
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real], atol=1e-5, rtol=1e-4)


def test_attribution_over_paths_kinds_and_a_baseline_by_path():
    """The same places under the table's names give the same scores."""
    nn = wrapped(build("llama"))
    sae = partial(make_sae, "jumprelu")
    targets = (
        sf.dictionaries.Dictionaries([sae("model.layers.1.output"), sae("resid_mid.1")]),
        sf.dictionaries.Dictionaries([sae("resid_post.1"), sae("resid_mid.1")]),
    )
    bases = (
        sf.Ablate(sf.Direction(unit(), site="model.layers.0.output")),
        sf.Ablate(sf.Direction(unit(), site="resid_post.0")),
    )
    method = sf.IG(steps=3)
    scores = []
    for target, base in ((targets[0], bases[1]), (targets[1], bases[0]), (targets[1], bases[1])):
        found = sf.Attribute(target, sf.metrics.logit(7), baseline=base, method=method)(nn, RAGGED)
        order = ["resid_mid.1" if "mid" in str(d.site) else "post" for d in found.dictionaries]
        rows = torch.stack(
            [found.prompt, found.dictionary, found.position, found.latent, found.score], 1
        ).tolist()
        scores.append({(int(p), order[int(d)], int(t), int(i)): float(s) for p, d, t, i, s in rows})
    assert scores[0].keys() == scores[1].keys() == scores[2].keys() and len(scores[0]) > 50
    for other in scores[1:]:
        assert all(abs(other[key] - score) < 1e-5 for key, score in scores[0].items())


# ---------------------------------------------------------------- what is refused


def refused(model, *paths: str) -> str:
    with pytest.raises(sf.errors.SiteError) as caught:
        route(model, map(sf.Site, paths))
    return str(caught.value)


def test_a_misspelt_module_is_answered_with_near_ones():
    text = refused(build("llama"), "model.layers.1.mlp.gate_porj.output")
    assert "model.layers.1.mlp.gate_proj" in text
    assert "has no module" in refused(build("llama"), "model.layers.7.output")


def test_what_a_pass_never_reaches():
    assert "reached 0 times" in refused(build("llama"), "model.layers.output")


def test_what_a_pass_reaches_more_than_once():
    model = build("llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    text = refused(model, "model.layers.1.mlp.output")
    assert "reached 2 times" in text and "share" in text


def test_values_that_are_not_batch_tokens_width():
    assert "(1, 3, 8)" in refused(build("llama"), "model.rotary_emb.output")
    assert "no tensor" in refused(build("llama"), "model.embed_tokens.input")  # token ids
    assert "(6, 2)" not in refused(stranger("Mixtral"), "model.layers.1.mlp.experts.act_fn.output")


def test_another_width():
    wrong = sf.Direction(torch.ones(D), site="model.layers.1.mlp.gate_proj.output")
    with pytest.raises(sf.errors.SiteError, match=r"32 wide at model\.layers\.1.*wanted 64"):
        sf.run(wrapped(build("llama")), RAGGED, sf.Ablate(wrong))


def test_a_kind_of_site_on_a_model_outside_the_table_points_to_paths():
    model = stranger("OPT")
    model.config.model_type = "strange"
    model.model.others = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])  # or these?
    with pytest.raises(sf.errors.ModelError) as caught:
        sf.run(wrapped(model), RAGGED, sf.Ablate(make_sae().latents([0])))
    path = str(caught.value).split('such as "')[1].split('"')[0]
    sf.run(wrapped(model), RAGGED, sf.Ablate(make_sae("standard", path).latents([0])))


def test_a_module_that_sees_part_of_the_tokens_is_refused_when_it_does():
    """generate asks the unembedding for the last token alone: a mask of all would broadcast."""
    nn = wrapped(build("llama"))
    edit = sf.Clamp(sf.Neurons("lm_head.output", VOCAB).latents([5]), add=100.0)
    with pytest.raises(ValueError, match="sees only part"):
        sf.run(nn, RAGGED, edit, max_new_tokens=2)
    out = sf.run(nn, RAGGED, edit)
    assert (out.logits.argmax(-1) == 5).all()


# ---------------------------------------------------------------- the dry run


def test_the_dry_run_leaves_no_trace():
    model, batch = build("llama"), batch_of()
    calls = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    outer = sf.Probe(sf.Neurons("resid_post.0", D))
    before = torch.get_rng_state()
    inner = sf.Probe(sf.Neurons("model.layers.1.output", D))
    with torch.no_grad(), sf.hooked(model, outer) as log, sf.hooked(model, inner):
        assert log.passes == 0 and not calls
        model(**batch)
    assert log.passes == 1 and calls == [1]
    assert torch.equal(before, torch.get_rng_state())
    handle.remove()
    assert hook_count(model) == 0
    assert all(not m._forward_pre_hooks_with_kwargs for m in model.modules())


def test_hooks_come_back_when_the_dry_run_fails():
    model = build("llama")
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    model.model.embed_tokens.weight.data = torch.zeros(VOCAB, D + 1)
    with pytest.raises(sf.errors.ModelError, match="cannot be run on 2 rows of 3 tokens"):
        route(model, [sf.Site("model.layers.1.output")])
    assert hook_count(model) == 1
    handle.remove()


def test_sites_of_the_table_need_no_dry_run():
    model = build("llama")
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.forward = lambda **_: calls.append(2)
    route(model, [sf.Site("resid_post", 1), sf.Site("resid_mid", 2)])
    assert not calls


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_model_without_weights_is_run_on_shapes(family):
    model = build(family)
    block = "transformer.h" if family == "gpt2" else "model.layers"
    sites = [sf.Site(f"{block}.{n}.{end}") for n in (1, 0) for end in ("output", "input")]
    sites.append(sf.Site("mlp_out", 1))
    loaded, bare = route(model, sites), route(copy.deepcopy(model).to("meta"), sites)
    assert loaded == bare


def test_experts_without_weights_cannot_be_run():
    model = stranger("Mixtral").to("meta")
    with pytest.raises(sf.errors.ModelError, match="dispatch=True"):
        route(model, [sf.Site("model.layers.1.output")])


def test_inside_a_trace_the_model_is_not_disturbed():
    model, batch = stranger("Bloom"), batch_of()
    nn = wrapped(model)
    probe = sf.Probe(sf.Neurons("transformer.h.1.mlp.output", D))
    with torch.no_grad(), nn.trace(batch):
        log = nnsight.save(probe(nn))
        logits = nnsight.save(nn.output.logits)
    torch.testing.assert_close(logits, forward(model, batch), atol=1e-6, rtol=0)
    seen = capture_inputs_outputs(model, {"m": model.transformer.h[1].mlp}, batch)["m"]["output"]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(probe.readings(log)[0].values[real], seen[real], atol=1e-5, rtol=0)


def test_a_model_of_no_hugging_face_configuration():
    """Any causal module will do, so long as it takes input_ids."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.unembed = torch.nn.Embedding(9, D), torch.nn.Linear(D, 9)

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            return self.unembed(self.embed(input_ids))

    plain, v = Plain().eval(), sf.Direction(unit(), site="embed.output")
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad(), sf.hooked(plain, sf.Clamp(v, add=2.0)):
        logits = plain(ids)
    wanted = plain.unembed(plain.embed(ids) + 2.0 * unit())
    torch.testing.assert_close(logits, wanted)


def test_tokens_of_the_dry_run_are_not_special():
    model, ids = build("llama"), []
    model.model.embed_tokens.forward = lambda x: ids.append(x) or torch.zeros(*x.shape, D)
    route(model, [sf.Site("model.layers.1.output")])
    assert not set(ids[0].flatten().tolist()) & set(tokenizer().all_special_ids)


@pytest.mark.parametrize("memory", [InMemory])
def test_an_sae_may_be_declared_at_a_path(memory, tmp_path):
    """As Gemma Scope 2's hf_hook_name writes it."""
    from helpers import tensors_for

    sae = sf.SAE(memory(tensors_for("standard")), site="model.layers.1.mlp.output", name="x")
    assert str(sae.site) == "model.layers.1.mlp.output"
    assert "model.layers.1.mlp.output" in repr(sae.latents([1]))
