"""Every family of the table: each of its sites is the value it is named for, and acts as one."""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import BOS, RAGGED, VOCAB, batch_of, wrapped
from saefeat.model.families import FAMILIES, VARIANTS
from saefeat.model.modules import blocks, find, width_at
from test_sites import bridge  # noqa: F401
from zoo import ZOO, model_of
from zoo_checks import (
    basis_at,
    clamps,
    edit_by_hand,
    every_site,
    logits_of,
    place_of,
    read_all,
    scores,
    scores_by_hand,
    seen_by_hand,
    sites_of,
    text_by_hand,
    whole_of,
)

FEW = ["falcon", "granite", "qwen3_moe", "gemma3n_text"]
"""Built unlike each other, for the default suite; the slow one has all."""
ALL = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
ALIBI = ("bloom", "bloom post-norm", "mpt", "falcon in turn")
JOINT_NORMS = ("olmo2", "olmo3", "olmoe")
"""One norm for the queries of all heads."""
NOT_SUMS = ("gemma3n_text", "falcon_h1")
"""Something else is added to the stream too."""


def close(a, b, **how):
    torch.testing.assert_close(a, b, **{"atol": 1e-5, "rtol": 1e-5, **how})


def test_the_zoo_holds_every_family_and_variant():
    names = [name.split()[0] for name in ZOO]
    assert set(names) == set(FAMILIES) - {"gemma3"}  # gemma3_text within
    for kind, variants in VARIANTS.items():
        assert names.count(kind) == 1 + len(variants)


@pytest.mark.parametrize("name", ALL)
def test_the_sites_add_up(name):
    model, batch = model_of(name), batch_of()
    real = batch["attention_mask"].bool()
    x = {site: value[real] for site, value in read_all(model, batch, every_site(model)).items()}
    for layer in range(len(blocks(model))):
        own = {kind: x[f"{kind}.{layer}"] for kind, _ in map(_split, sites_of(model, layer))}
        if layer:
            assert torch.equal(own["resid_pre"], x[f"resid_post.{layer - 1}"])
        if "resid_mid" in own and "attn_out" in own:
            close(own["resid_mid"], own["resid_pre"] + own["attn_out"])
        if "resid_mid" in own:
            close(own["resid_post"], own["resid_mid"] + own["mlp_out"])
        elif {"attn_out", "mlp_out"} <= set(own) and name not in NOT_SUMS:
            close(own["resid_post"], own["resid_pre"] + own["attn_out"] + own["mlp_out"])


def _split(site: str) -> tuple[str, str]:
    kind, _, layer = site.partition(".")
    return kind, layer


@pytest.mark.parametrize("name", ALL)
def test_reads_are_what_plain_hooks_see(name):
    model, batch = model_of(name), batch_of()
    real = batch["attention_mask"].bool()
    sites = [site for site in every_site(model) if place_of(model, site).transform is None]
    sites += whole_of(model)
    for site, value in read_all(model, batch, sites).items():
        close(value[real], seen_by_hand(model, batch, site)[real].float(), atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_norms_are_their_modules_without_weight(name):
    """The module's output is the value, times one weight a column, plus one bias."""
    model, batch = model_of(name), batch_of()
    for site in every_site(model):
        place = place_of(model, site)
        if place.transform is None:
            continue
        outs: list[torch.Tensor] = []
        norm = model.get_submodule(place.path)
        handle = norm.register_forward_hook(lambda _, __, out, outs=outs: outs.append(out))
        x = read_all(model, batch, [site])[site].double()
        handle.remove()
        out = outs[0].detach().reshape(x.shape).double()
        x, out = x.flatten(0, 1), out.flatten(0, 1)
        center = x - x.mean(0), out - out.mean(0)
        weight = (center[0] * center[1]).sum(0) / center[0].square().sum(0)
        close(center[1], center[0] * weight, atol=1e-4)
        assert (x.square().mean(-1) - 1).abs().max() < 0.05  # what is normalized has this size


def editable(model, layer: int) -> list[str]:
    """Sites that are passed on."""
    places = {site: place_of(model, site) for site in sites_of(model, layer)}
    return [s for s, place in places.items() if place.transform is None and not place.aside]


def written(model) -> list[str]:
    """Those of the first and the last layer."""
    return [site for layer in {0, len(blocks(model)) - 1} for site in editable(model, layer)]


def moved(model) -> list[str]:
    """And those of the model itself, but logits, which are computed for the last token alone."""
    sites = [site for site in [*written(model), *whole_of(model)] if site != "logits"]
    return sorted(sites, key=lambda site: sf.Site.parse(site).order)


@pytest.mark.parametrize("name", ALL)
def test_an_edit_is_a_plain_hooks(name):
    """At each site; what is before the edited token stays as it is."""
    model, batch = model_of(name), batch_of()
    for site in [*written(model), *whole_of(model)]:
        with torch.no_grad(), sf.hooked(model, clamps(model, site)):
            found = logits_of(model, batch)
        close(found, edit_by_hand(model, batch, site), msg=site)
    with torch.no_grad():
        bare = model(**batch, use_cache=False).logits
        last = sf.Clamp(basis_at(model, "resid_pre.1"), 3.0, where=sf.Tokens.last(1))
        with sf.hooked(model, last):
            found = model(**batch, use_cache=False).logits
    real = batch["attention_mask"][:, :-1].bool()
    close(found[:, :-1][real], bare[:, :-1][real])
    assert (found - bare)[:, -1].abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_edits_act_at_every_token_of_a_generation(name):
    """All sites of the first and the last layer at once: by nnsight, and by hooks uncached."""
    model, batch = model_of(name), batch_of()
    sites = moved(model)
    chain = clamps(model, *sites)
    out = sf.run(wrapped(model), RAGGED, chain, max_new_tokens=3)
    wanted = text_by_hand(model, batch, *sites)[:, batch["input_ids"].shape[1] :]
    assert [list(c) for c in out.completions] == wanted.tolist()
    close(out.logits, edit_by_hand(model, batch, *sites))
    with sf.hooked(model, chain):
        found = model.generate(**batch, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(found, text_by_hand(model, batch, *sites, use_cache=False))


@pytest.mark.parametrize("name", ALL)
def test_scores_are_the_gradient(name):
    model = model_of(name)
    sites = moved(model)
    wanted = scores_by_hand(model, batch_of(), sites)
    close(scores(model, RAGGED, sites), wanted, atol=1e-5, rtol=1e-4)
    assert (wanted.abs().amax(1) > 1e-5).all()


@pytest.mark.parametrize("name", ALL)
def test_logits_are_the_models(name):
    model, batch = model_of(name), batch_of()
    if "logits" not in whole_of(model):
        with pytest.raises(sf.errors.SiteError, match="caps them"):
            find(model, sf.Site("logits"))
        return
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**batch, use_cache=False).logits
    close(read_all(model, batch, ["logits"])["logits"][real], wanted[real].float())


def test_what_the_table_lacks_is_refused_by_name():
    """A layer without such a module, and a router's logits, which nothing reads again."""
    model = model_of("qwen3_moe")
    with pytest.raises(sf.errors.SiteError, match=r"mlp_post\.1, wanted a layer .*: 0 of"):
        find(model, sf.Site("mlp_post", 1))
    experts = sf.Direction(torch.ones(4), site="router.1")
    assert sf.run(wrapped(model), RAGGED, sf.Probe(experts)).readings[0].values.abs().max() > 0
    for act in (
        lambda: sf.run(wrapped(model), RAGGED, sf.Ablate(experts)),
        lambda: sf.Attribute(experts.latents(), sf.logit_diff(5, 6))(wrapped(model), RAGGED),
    ):
        with pytest.raises(sf.errors.SiteError, match=r"router\.1, .*Try: mlp_out, or Probe"):
            act()


def test_a_multiplied_value_that_is_left_alone_keeps_its_bits():
    """Granite's attention is multiplied where it is added: x * s / s is not always x."""
    model, batch = model_of("granite"), batch_of()
    last = sf.Clamp(basis_at(model, "attn_out.0"), 3.0, where=sf.Tokens.last(1))
    real = batch["attention_mask"][:, :-1].bool()
    with torch.no_grad():
        bare = model(**batch, use_cache=False).logits[:, :-1][real]
        with sf.hooked(model, last):
            assert torch.equal(model(**batch, use_cache=False).logits[:, :-1][real], bare)


def test_names_of_sites_without_a_layer():
    for kind, hook in (("embed", "hook_embed"), ("final_norm", "ln_final.hook_out")):
        site = sf.Site(kind)
        assert sf.Site.parse(kind) == sf.Site.parse(hook) == site and str(site) == kind
    assert sf.Site("embed").order < sf.Site("resid_pre", 0).order
    assert sf.Site("resid_post", 99).order < sf.Site("final_norm").order < sf.Site("logits").order
    with pytest.raises(sf.errors.SiteError, match=r"Try: Site\('embed'\)"):
        sf.Site("embed", 0)


def zeroed(model, batch, sites: list[str], read: str) -> torch.Tensor:
    """The value at one site with others set to zero."""
    width = width_at(model, sf.Site.parse(read))
    chain = sf.Probe(sf.Neurons(read, width))
    for site in sites:
        here = sf.Neurons(site, width_at(model, sf.Site.parse(site)))
        chain = sf.Clamp(here.latents(), 0.0) | chain
    with torch.no_grad(), sf.hooked(model, chain) as log:
        model(**batch)
    return chain.readings(log)[0].values


@pytest.mark.parametrize("name", ALL)
def test_heads_are_what_attention_makes_of_them(name):
    """Without queries, or keys, a head takes the mean of its values; no other head moves."""
    model, batch = model_of(name), {"input_ids": torch.tensor([[5, 6, 7], [9, 8, 4]])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    layer = next((n for n in range(len(blocks(model))) if f"k.{n}" in sites_of(model, n)), None)
    if layer is None:
        pytest.skip(f"{name} has no keys of its own")
    z = find(model, sf.Site("z", layer, head=3))
    size = z.part[1] if z.part is not None else None
    values = read_all(model, batch, [f"z.{layer}", f"v.{layer}"])
    heads = values[f"z.{layer}"].unflatten(-1, (-1, size))
    kinds = {s.split(".")[0]: width_at(model, sf.Site.parse(s)) for s in sites_of(model, layer)}
    shared = kinds["q"] // kinds["k"]
    own = range(3 // shared * shared, 3 // shared * shared + shared)  # heads of head 3's key
    without_q = zeroed(model, batch, [f"q.{layer}:3"], f"z.{layer}").unflatten(-1, (-1, size))
    key = f"k.{layer}:{3 // shared}"
    without_k = zeroed(model, batch, [key], f"z.{layer}").unflatten(-1, (-1, size))
    close(without_q[..., 3, :], without_k[..., 3, :])
    rest = [n for n in range(heads.shape[-2]) if n != 3]
    others = [n for n in range(heads.shape[-2]) if n not in own]
    if name not in JOINT_NORMS:
        assert torch.equal(without_q[..., rest, :], heads[..., rest, :])
        assert torch.equal(without_k[..., others, :], heads[..., others, :])
    v = values[f"v.{layer}"].unflatten(-1, (kinds["k"] // size, size))[..., 3 // shared, :]
    if name in ALIBI or name in ("gpt_oss", "qwen3_next", "gemma3n_text"):
        return  # distances, sinks, gates and norms of values come between
    mean = v.cumsum(1) / torch.arange(1, 4)[:, None]
    close(without_q[..., 3, :], mean)


ANOTHER = ("falcon in turn", "cohere", "cohere2", "hunyuan_v1_dense", "deepseek_v2")
ANOTHER += ("deepseek_v2 without q_lora", "deepseek_v3")
"""TransformerLens 3.9 computes other logits than the model."""
NO_BRIDGE = ("gpt_bigcode multi_query=False", "opt post-norm", "falcon two norms", "ministral")
NO_BRIDGE += ("gemma3n_text", "hunyuan_v1_moe")
OTHERWISE = {  # a name that TransformerLens has for another value
    "bloom": {"embed"},  # behind the norm of the embeddings
    "bloom post-norm": {"embed"},
    "granite": {"logits"},  # before they are divided
    "qwen3_next": {"q"},  # with the gates
    "falcon_h1": {"attn_out"},  # before it is multiplied
}


@pytest.mark.parametrize("name", ALL)
def test_transformer_lens_names_the_same_values(name, request):
    if name in NO_BRIDGE:
        pytest.skip("TransformerLens has no adapter for it")
    model, boot = model_of(name), request.getfixturevalue("bridge")
    ids = torch.randint(4, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits, cache = boot(model).run_with_cache(ids, prepend_bos=False)
        alike = torch.allclose(logits, model(ids).logits, atol=1e-4)
    assert alike == (name not in ANOTHER)
    if not alike:
        return
    compared = 0
    for site, value in read_all(model, batch, every_site(model) + whole_of(model)).items():
        hook, kind = sf.Site.parse(site).hook, sf.Site.parse(site).kind
        if hook in cache and kind not in (*OTHERWISE.get(name, ()), "router"):
            theirs = cache[hook].reshape(value.shape).float()
            close(value, theirs, atol=1e-4, rtol=1e-4, msg=site)
            compared += 1
    assert compared >= 4
