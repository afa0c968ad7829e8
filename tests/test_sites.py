"""Sites: every family's table gives the tensors that TransformerLens names so."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saefeat as sf
from helpers import (
    BOS,
    FAMILIES,
    LAYERS,
    VOCAB,
    D,
    batch_of,
    build,
    capture_inputs_outputs,
    make_sae,
    tokenizer,
    wrapped,
)
from saefeat.model.families import FAMILIES as TABLE
from saefeat.model.modules import blocks, check_ready, find, width_at
from saefeat.model.sites import HOOKS

PARALLEL = ("gpt_neox",)  # attention and MLP read the same stream


def kinds(family: str) -> list[str]:
    return list(TABLE[family][1])


def read_all(model, batch, layers=range(LAYERS)) -> dict[str, torch.Tensor]:
    """Every site's value as saefeat reads it: a Probe on the identity basis."""
    family = model.config.model_type
    sites = [f"{kind}.{layer}" for layer in layers for kind in kinds(family)]
    found = {}
    for site in sites:
        probe = sf.Probe(sf.Neurons(site, width_at(model, sf.Site.parse(site))))
        with torch.no_grad(), sf.hooked(model, probe) as log:
            model(**batch)
        found[site] = probe.readings(log)[0].values
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sites_add_up(family):
    """Streams are sums of what the blocks add; sandwich norms make the naive modules wrong."""
    model, batch = build(family), batch_of()
    x = read_all(model, batch)
    for layer in range(LAYERS):

        def at(kind, layer=layer):
            return x[f"{kind}.{layer}"]

        total = at("resid_pre") + at("attn_out") + at("mlp_out")
        torch.testing.assert_close(at("resid_post"), total, atol=1e-5, rtol=1e-5)
        if family not in PARALLEL:
            torch.testing.assert_close(
                at("resid_mid"), at("resid_pre") + at("attn_out"), atol=1e-5, rtol=1e-5
            )
        if layer + 1 < LAYERS:
            assert torch.equal(at("resid_post"), x[f"resid_pre.{layer + 1}"])
        assert at("mlp_out").std() > 1e-2 and at("attn_out").std() > 1e-2


@pytest.mark.parametrize("family", [f for f in FAMILIES if "mlp_norm" in TABLE[f][1]])
def test_mlp_in_is_the_norm_without_its_weight(family):
    """The module behind the norm sees mlp_norm times the weight (plus the bias, or 1 + weight)."""
    model, batch = build(family), batch_of()
    for layer in range(LAYERS):
        place = find(model, sf.Site("mlp_norm", layer))
        norm = model.get_submodule(place.path)
        seen = capture_inputs_outputs(model, {"norm": norm}, batch)["norm"]
        raw, out = seen["input"].double(), seen["output"]
        if place.transform == "layer":
            wanted = (raw - raw.mean(-1, keepdim=True)) / (
                raw.var(-1, keepdim=True, unbiased=False) + norm.eps
            ).sqrt()
            full = wanted * norm.weight + norm.bias
        else:
            eps = getattr(norm, "variance_epsilon", None) or norm.eps
            wanted = raw / (raw.pow(2).mean(-1, keepdim=True) + eps).sqrt()
            full = wanted * (norm.weight + (1 if "gemma" in family else 0))
        torch.testing.assert_close(out.double(), full.double(), atol=1e-4, rtol=1e-4)
        got = read_all(model, batch, [layer])[f"mlp_norm.{layer}"]
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in PARALLEL])
def test_mlp_in_reads_resid_mid(family):
    if "mlp_norm" not in TABLE[family][1]:
        with pytest.raises(sf.errors.SiteError):
            find(build(family), sf.Site("mlp_norm", 1))
        return
    model, batch = build(family), batch_of()
    place = find(model, sf.Site("mlp_norm", 1))
    norm = {"norm": model.get_submodule(place.path)}
    raw = capture_inputs_outputs(model, norm, batch)["norm"]["input"]
    mid = read_all(model, batch, [1])["resid_mid.1"]
    torch.testing.assert_close(mid, raw, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_sandwich_norms_are_not_the_modules_of_their_name(family):
    """FVU 9.8 instead of .26, and no error: the trap of the field."""
    model, batch = build(family), batch_of()
    block = model.model.layers[1]
    naive = capture_inputs_outputs(model, {"a": block.self_attn, "m": block.mlp}, batch)
    x = read_all(model, batch, [1])
    assert (x["attn_out.1"] - naive["a"]["output"]).abs().max() > 0.1
    assert (x["mlp_out.1"] - naive["m"]["output"]).abs().max() > 0.1


@pytest.fixture
def bridge(monkeypatch):
    """TransformerLens's own view of a copy of a tiny model (a bridge mutates what it is given)."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources import transformers as source

    monkeypatch.setattr(source, "setup_tokenizer", lambda tokens, **_: tokens)  # would download

    def boot(model):
        model = copy.deepcopy(model)
        model.config.architectures = [type(model).__name__]
        options = {"hf_model": model, "tokenizer": tokenizer(), "device": "cpu"}
        return TransformerBridge.boot_transformers("tiny", **options)

    return boot


@pytest.mark.parametrize("family", FAMILIES)
def test_transformer_lens_names_the_same_tensors(family, bridge):
    model = build(family)
    ids = torch.randint(4, VOCAB, (2, 6))
    ids[:, 0] = BOS
    with torch.no_grad():
        logits, cache = bridge(model).run_with_cache(ids, prepend_bos=False)
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    x = read_all(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    compared = set()
    for name, value in x.items():
        hook = sf.Site.parse(name).hook
        if hook in cache:
            theirs = cache[hook].reshape(value.shape)  # hook_z has a dimension for the heads
            compared.add(sf.Site.parse(name).kind)
            if hook.endswith("hook_normalized") and not same(value, theirs):
                # some adapters give the norm with its weight under this name
                norm = model.get_submodule(find(model, sf.Site.parse(name)).path)
                value = value * (norm.weight + (1 if "gemma" in family else 0))
                value = value + (norm.bias if getattr(norm, "bias", None) is not None else 0)
            torch.testing.assert_close(value, theirs, atol=1e-5, rtol=1e-5, msg=name)
    missing = set(kinds(family)) - compared
    assert not missing, f"transformer-lens has no {missing}"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def precision(family: str) -> tuple[torch.dtype, float]:
    """float64, except that transformers' eager Gemma-2 is NaN there on padded batches."""
    return (torch.float32, 2e-6) if family == "gemma2" else (torch.float64, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_moves_the_site_and_what_is_downstream(family):
    """Write at every site: the reread value moved by exactly the direction, on every row."""
    dtype, atol = precision(family)
    model, batch = build(family, dtype), batch_of()
    real = batch["attention_mask"].bool()
    for kind in kinds(family):
        if kind in ("attn_norm", "mlp_norm"):  # see the next test
            continue
        width = width_at(model, sf.Site(kind, 1))
        v = torch.randn(width, dtype=dtype)
        where = sf.Direction(v, site=f"{kind}.1")
        # GPT-2's keys have no position: the same step at all of them changes no attention
        step = sf.Clamp(where, add=0.75, where=sf.Tokens.last(1) if kind == "k" else None)
        before, after = sf.Neurons(f"{kind}.1", width), sf.Neurons(f"{kind}.1", width)
        chain = sf.Probe(before) | step | sf.Probe(after)
        with torch.no_grad():
            clean = model(**batch).logits
            with sf.hooked(model, chain) as log:
                edited = model(**batch).logits
        old, new = (reading.values for reading in chain.readings(log))
        wanted = old + 0.75 * v / v.norm()
        if kind == "k":
            wanted[:, :-1] = old[:, :-1]
        torch.testing.assert_close(new[real], wanted[real], atol=atol, rtol=0)
        assert torch.equal(new[~real], old[~real])
        moved = (edited - clean)[:, -1].abs().amax(-1)
        assert (moved > 1e-6).all(), f"{kind}: an edit of row {moved.argmin()} did nothing"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_edit_at_mlp_in_moves_what_the_mlp_reads(family):
    """No transcoder: the site itself is edited. It has no module, so: exact, or refused."""
    dtype, atol = precision(family)
    model, batch = build(family, dtype), batch_of()
    norm = model.get_submodule(find(model, sf.Site("mlp_norm", 1)).path)
    real = batch["attention_mask"].bool()
    v = torch.randn(D, dtype=dtype)
    clean = capture_inputs_outputs(model, {"n": norm}, batch)["n"]["output"]
    try:
        with sf.hooked(model, sf.Clamp(sf.Direction(v, site="mlp_norm.1"), add=0.75)):
            edited = capture_inputs_outputs(model, {"n": norm}, batch)["n"]["output"]
    except sf.SaefeatError as refused:
        assert "mlp_norm" in str(refused)
        return
    weight = norm.weight + (1 if "gemma" in family else 0)
    wanted = clean + 0.75 * v / v.norm() * weight
    torch.testing.assert_close(edited[real], wanted[real], atol=10 * atol, rtol=0)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("use", ["hooked", "edit", "run", "inline", "attribute"])
def test_a_layer_the_model_lacks(use):
    model = build("llama")
    nn = wrapped(model)
    ablate = sf.Ablate(make_sae(layer=LAYERS).latents([0]))
    with pytest.raises(Exception) as caught:
        use_somehow(use, model, nn, ablate, batch_of())
    error = sf_error(caught.value)
    assert isinstance(error, sf.errors.SiteError)
    text = str(error)
    assert f"resid_post.{LAYERS}" in text and f"0..{LAYERS - 1}" in text and "Try: " in text


@pytest.mark.parametrize("use", ["hooked", "edit", "run", "attribute"])
def test_a_dictionary_of_another_width(use):
    model = build("llama")
    ablate = sf.Ablate(sf.Direction(torch.ones(D + 4), site="resid_post.1"))
    with pytest.raises(sf.errors.SiteError) as caught:
        use_somehow(use, model, wrapped(model), ablate, batch_of())
    text = str(caught.value)
    assert str(D + 4) in text and str(D) in text and "load the release" in text


@pytest.mark.parametrize("use", ["hooked", "edit", "run", "attribute"])
def test_train_mode_with_dropout(use):
    """Two identical runs would differ."""
    model = build("gpt2").train()
    ablate = sf.Ablate(make_sae().latents([0]))
    nn = wrapped(model)
    nn.train()  # gives back the module, not the nnsight model
    with pytest.raises(sf.errors.ModelError) as caught:
        use_somehow(use, model, nn, ablate, batch_of())
    assert "train mode" in str(caught.value) and "model.eval()" in str(caught.value)
    assert "drop" in str(caught.value)


def test_train_mode_without_dropout_is_harmless():
    check_ready(build("llama").train(), "test")


def test_dropout_only_in_the_configuration_counts():
    """Attention dropout is functional: no nn.Dropout module has it."""
    model = build("llama").train()
    model.config.attention_dropout = 0.1
    with pytest.raises(sf.errors.ModelError, match="attention_dropout"):
        check_ready(model, "test")


def test_an_unknown_family():
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, is_decoder=True
    )
    model = transformers.BertLMHeadModel(config).eval()
    model.others = torch.nn.ModuleList(
        [torch.nn.Linear(2, 2) for _ in range(2)]
    )  # are they blocks?
    with pytest.raises(sf.errors.ModelError) as caught, sf.hooked(model, sf.Ablate(make_sae())):
        pass
    assert "'bert'" in str(caught.value) and "gemma2" in str(caught.value)


def test_something_that_is_no_model():
    for thing in (tokenizer(), "gpt2", None):
        with (
            pytest.raises(sf.errors.ModelError, match="tokenizer, a name or a pipeline"),
            sf.hooked(thing, sf.Ablate(make_sae())),
        ):
            pass


def test_a_parallel_block_has_no_resid_mid():
    with pytest.raises(sf.errors.SiteError, match=r"resid_mid\.1"):
        find(build("gpt_neox"), sf.Site("resid_mid", 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_count(family):
    assert len(blocks(build(family))) == LAYERS


def use_somehow(use, model, nn, intervention, batch):
    if use == "hooked":
        with sf.hooked(model, intervention):
            model(**batch)
    elif use == "edit":
        sf.edit(nn, intervention)
    elif use == "run":
        sf.run(nn, batch, intervention)
    elif use == "attribute":
        sf.Attribute(intervention.latents, sf.metrics.logit(5))(nn, batch)
    else:
        with nn.trace(batch):
            intervention(nn)


def sf_error(error: BaseException | None) -> BaseException | None:
    """The saefeat error in a chain: nnsight may wrap what a block raises."""
    while error is not None and not isinstance(error, sf.SaefeatError):
        error = error.__cause__ or error.__context__
    return error


# ---------------------------------------------------------------- names


@given(kind=st.sampled_from(list(HOOKS)), layer=st.integers(0, 99))
def test_parse_round_trip(kind, layer):
    site = sf.Site(kind, layer)
    assert sf.Site.parse(str(site)) == site == sf.Site.parse(site.hook) == sf.Site.parse(site)
    assert eval(repr(site), {"Site": sf.Site}) == site


@pytest.mark.parametrize(
    "name",
    [
        "blocks.3.hook_nothing",
        "blocks.x.hook_resid_post",
        "blocks.-1.hook_resid_post",
        "resid_post",
        "resid_post.-1",
        "resid_post.3.",
        "blocks.3.resid_post",
        "3.resid_post",
        "",
    ],
)
def test_names_that_mean_nothing(name):
    with pytest.raises(sf.errors.SiteError, match="hook_resid_post"):
        sf.Site.parse(name)


@pytest.mark.parametrize("layer", [-1, 1.0, "1", None])
def test_layers_that_mean_nothing(layer):
    with pytest.raises(sf.errors.SiteError, match="integer from 0"):
        sf.Site("resid_post", layer)


def test_sites_sort_in_forward_order():
    model, batch = build("gemma2"), batch_of()
    reached = []
    places = {
        (layer, kind): find(model, sf.Site(kind, layer))
        for layer in range(2)
        for kind in kinds("gemma2")
        if kind != "resid_mid"  # shares attn_out's place
    }
    for key, place in places.items():
        module = model.get_submodule(place.path)

        def note(*_, key=key):
            reached.append(sf.Site(key[1], key[0]))

        if place.end == "input":
            module.register_forward_pre_hook(note)
        else:
            module.register_forward_hook(note)
    with torch.no_grad():
        model(**batch)
    assert reached == sorted(reached, key=lambda site: site.order) and len(reached) == len(places)


def test_a_part_in_train_mode_counts():
    """Train mode: two identical traces differ."""
    model = build("gpt2")
    model.transformer.h[0].train()
    with pytest.raises(sf.errors.ModelError, match="eval"):
        check_ready(model, "test")
