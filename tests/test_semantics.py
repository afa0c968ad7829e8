"""How gradients flow: through_sae, RelP, GradDrop, each against a forward pass written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

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
    hook_count,
    make_sae,
    unit,
    wrapped,
)
from test_attribution import close, dense, grab, norm_input, run_with, score_metric

F64 = torch.float64
METRIC = sf.logit_diff([5, 9], 7)
BRANCHES = {"gpt2": ("attn", "mlp"), "gpt_neox": ("attention", "mlp")}


# ---------------------------------------------------------------- through the SAE


def spliced_in(model, batch, dictionaries) -> list[torch.Tensor]:
    """AtP with every SAE spliced into the model, its latents nodes, its error a constant.

    As SAELens does with use_error_term: reconstruction with graph, error without.
    """
    held, leaves, hooks = {}, {}, {}
    for n, d in enumerate(dictionaries):

        def node(x, n=n, d=d):
            z = norm_input(d.site, x, model)
            f = d.encode(z)
            f = f if f.requires_grad else f.requires_grad_()
            leaves[n] = f
            offset = d.reconstruct(z.detach()) - d.encode(z.detach()) @ d.directions().to(F64)
            held[n] = f @ d.directions().to(F64) + offset
            if "skip" in d.architecture:
                skip = d._weights.read("W_skip").to(F64)
                held[n] = held[n] + (z - z.detach()) @ skip.T
            return x

        def splice(x, n=n):
            return held[n] + (x - held[n]).detach()

        if d.site == d.write_site:
            hooks[d.site] = lambda x, node=node, splice=splice: splice(node(x))
        else:
            hooks[d.site], hooks[d.write_site] = node, splice
    total = score_metric(run_with(model, batch, hooks)).sum()
    slopes = torch.autograd.grad(total, [leaves[n] for n in range(len(leaves))])
    real = batch["attention_mask"].bool()[..., None]
    return [(-leaves[n] * slope * real).detach() for n, slope in enumerate(slopes)]


def attribute(model, batch, target, **how):
    return dense(sf.Attribute(target, METRIC, **how)(wrapped(model), batch), batch)


@pytest.mark.parametrize("layers", [[1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *TRANSCODERS])
def test_gradients_through_the_dictionary(architecture, layers):
    model, batch = build("gemma3_text", F64), batch_of()
    saes = sf.Dictionaries(
        make_sae(architecture, layer=layer, seed=layer, dtype=F64) for layer in layers
    )
    found = attribute(model, batch, saes, semantics="through_sae")
    close(found, spliced_in(model, batch, list(saes.values())))


def test_the_two_semantics_differ_only_behind_another_site():
    model, batch = build("llama", F64), batch_of()
    saes = sf.Dictionaries(make_sae(layer=layer, seed=layer, dtype=F64) for layer in (0, 2))
    passed = attribute(model, batch, saes)
    through = attribute(model, batch, saes, semantics="through_sae")
    torch.testing.assert_close(through[1], passed[1])
    assert (through[0] - passed[0]).abs().max() > 1e-3
    alone = attribute(model, batch, saes[0], semantics="through_sae")
    torch.testing.assert_close(alone, attribute(model, batch, saes[0]))


def test_input_norms_through_the_dictionary():
    model, batch = build("llama", F64), batch_of()
    early = make_sae(layer=0, dtype=F64)
    for norm in ("layer_norm", "constant_norm_rescale"):
        late = make_sae("jumprelu", layer=1, norm=norm, dtype=F64)
        found = attribute(model, batch, sf.Dictionaries([early, late]), semantics="through_sae")

        def splice(x, late=late):
            out = late.reconstruct(x)
            return out + (x - out).detach()

        x = grab(model, batch, [early.site])[early.site].requires_grad_()
        hooks = {early.site: lambda _, x=x: x, late.site: splice}
        (slope,) = torch.autograd.grad(score_metric(run_with(model, batch, hooks)).sum(), x)
        f = early.encode(x.detach())
        wanted = -f * (slope @ early.directions().to(F64).T) * batch["attention_mask"][..., None]
        close(found[:1], [wanted])


def test_resid_mid_through_the_dictionary():
    """Its value is a sum of which one part alone is written: the other must not pass around it."""
    model, batch = build("llama", F64), batch_of()
    early, mid = make_sae(layer=0, dtype=F64), make_sae(site="resid_mid.1", dtype=F64)
    found = attribute(model, batch, sf.Dictionaries([early, mid]), semantics="through_sae")
    block, x = model.model.layers[1], grab(model, batch, [early.site])[early.site].requires_grad_()
    held = {}

    def splice(module, args, out):
        whole = out[0] + held["x"]
        new = mid.reconstruct(whole)
        new = new + (whole - new).detach()
        return (new - held["x"], *out[1:])

    hooks = [
        model.model.layers[0].register_forward_hook(lambda *_: x),
        block.register_forward_pre_hook(lambda _, args: held.update(x=args[0])),
        block.self_attn.register_forward_hook(splice),
    ]
    try:
        total = score_metric(run_with(model, batch, {})).sum()
    finally:
        for hook in hooks:
            hook.remove()
    (slope,) = torch.autograd.grad(total, x)
    wanted = -early.encode(x.detach()) * (slope @ early.directions().to(F64).T)
    close(found[:1], [wanted * batch["attention_mask"][..., None]])


def test_through_a_direction_and_by_tokens(monkeypatch):
    import saefeat.attribution.semantics as module

    model, batch = build("llama", F64), batch_of()
    v = sf.Direction(torch.stack([unit(1), unit(2)]).to(F64), site="resid_post.1")
    both = sf.Dictionaries([make_sae(layer=0, dtype=F64), v])
    whole = attribute(model, batch, both, semantics="through_sae")
    monkeypatch.setattr(module, "_NUMBERS", 7)
    torch.testing.assert_close(attribute(model, batch, both, semantics="through_sae"), whole)
    span = v.vectors.T @ v.vectors
    x = grab(model, batch, [sf.Site("resid_post", 0)])[sf.Site("resid_post", 0)].requires_grad_()
    hooks = {
        sf.Site("resid_post", 0): lambda _: x,
        v.site: lambda y: y @ span + (y - y @ span).detach(),
    }
    (slope,) = torch.autograd.grad(score_metric(run_with(model, batch, hooks)).sum(), x)
    wanted = -both[0].encode(x.detach()) * (slope @ both[0].directions().to(F64).T)
    close(whole[:1], [wanted * batch["attention_mask"][..., None]])


def test_what_has_no_reconstruction_is_refused():
    sae, nn = make_sae(), wrapped(build("llama"))
    twice = sf.Dictionaries([make_sae("transcoder"), make_sae(site="mlp_out.1")])
    for target in (sae.error(), twice):
        with pytest.raises(sf.DictionaryError, match="through_sae"):
            sf.Attribute(target, METRIC, semantics="through_sae")(nn, RAGGED)
    with pytest.raises(sf.SaefeatError, match="pass_through or through_sae"):
        sf.Attribute(sae, METRIC, semantics="through")


# ---------------------------------------------------------------- RelP


def half(a, b):
    product = a * b
    return 0.5 * product + 0.5 * product.detach()


def share(function, x):
    """f(x) as x times a constant."""
    return x * (function(x) / x).detach()


def rms(norm, x):
    scale = (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    return norm.weight * x * scale.detach()


def layer_norm(norm, x):
    x = x - x.mean(-1, keepdim=True)
    scale = (x.var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()
    return norm.weight * x * scale.detach() + norm.bias


def causal(scores):
    t = scores.shape[-1]
    return scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def llama_by_hand(model, x, start):
    """Last logits from resid_post.start on, one prompt [1, t, d], with RelP's rules written out."""
    base, t = model.model, x.shape[1]
    cos, sin = base.rotary_emb(x, torch.arange(t)[None])
    for block in base.layers[start + 1 :]:
        attention, mlp, h = block.self_attn, block.mlp, rms(block.input_layernorm, x)
        q, k, v = (
            p(h).view(1, t, -1, 8).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        pattern = causal(q @ k.transpose(-1, -2) / 8**0.5).detach()
        z = (pattern @ v).transpose(1, 2).reshape(1, t, -1)
        x = x + attention.o_proj(z)
        h = rms(block.post_attention_layernorm, x)
        gate = share(torch.nn.functional.silu, mlp.gate_proj(h))
        x = x + mlp.down_proj(half(gate, mlp.up_proj(h)))
    return model.lm_head(rms(base.norm, x))[:, -1]


def gpt2_by_hand(model, x, start):
    base, t = model.transformer, x.shape[1]
    for block in base.h[start + 1 :]:
        qkv = block.attn.c_attn(layer_norm(block.ln_1, x)).split(D, dim=2)
        q, k, v = (z.view(1, t, 4, 8).transpose(1, 2) for z in qkv)
        pattern = causal(q @ k.transpose(-1, -2) / 8**0.5).detach()
        x = x + block.attn.c_proj((pattern @ v).transpose(1, 2).reshape(1, t, D))
        h = block.mlp.c_fc(layer_norm(block.ln_2, x))
        x = x + block.mlp.c_proj(share(block.mlp.act, h))
    return model.lm_head(layer_norm(base.ln_f, x))[:, -1]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_relp_against_a_forward_pass_written_by_hand(family, start):
    model, batch = build(family, F64), batch_of()
    by_hand = {"llama": llama_by_hand, "gpt2": gpt2_by_hand}[family]
    neurons = sf.Neurons(f"resid_post.{start}", D)
    found = attribute(model, batch, neurons, backward=sf.RelP())[0]
    plain = attribute(model, batch, neurons)[0]
    values = grab(model, batch, [neurons.site])[neurons.site]
    for row, length in enumerate([3, 6, 4]):
        x = values[row : row + 1, -length:].clone().requires_grad_()
        logits = by_hand(model, x, start)
        torch.testing.assert_close(logits[0], forward(model, batch)[row, -1], atol=1e-6, rtol=1e-4)
        (slope,) = torch.autograd.grad(score_metric(logits).sum(), x)
        wanted = -(x.detach() * slope)[0]
        torch.testing.assert_close(found[row, -length:], wanted, atol=1e-6, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3", "olmo2", "qwen2"])
def test_relp_changes_no_value_and_is_gone_afterwards(family):
    model = build(family)
    hooks, before = hook_count(model), forward(model, batch_of())
    job = sf.Attribute(sf.Neurons("resid_post.0", D), METRIC, backward=sf.RelP())
    scores = job(wrapped(model), RAGGED)
    torch.testing.assert_close(scores.clean, score_metric(before[:, -1]), atol=1e-5, rtol=1e-5)
    assert hook_count(model) == hooks and torch.equal(forward(model, batch_of()), before)
    assert scores.score.abs().max() > 1e-4


@pytest.mark.parametrize("backward", [sf.RelP(), sf.GradDrop()], ids=repr)
def test_rules_are_gone_after_an_error_and_ctrl_c(backward):
    model = build("llama")
    hooks, before = hook_count(model), forward(model, batch_of())

    def broken(error):
        def run(*_):
            raise error

        return run

    job = sf.Attribute(make_sae(), METRIC, backward=backward)
    for error in (RuntimeError("broken"), KeyboardInterrupt()):
        handle = model.model.layers[2].register_forward_hook(broken(error))
        with pytest.raises(BaseException) as caught:
            job(wrapped(model), RAGGED)
        handle.remove()
        assert "broken" in str(caught.value) or isinstance(caught.value, KeyboardInterrupt)
        assert hook_count(model) == hooks and torch.equal(forward(model, batch_of()), before)
    plain = sf.Attribute(make_sae(), METRIC)(wrapped(model), RAGGED)
    again = sf.Attribute(make_sae(), METRIC)(wrapped(build("llama")), RAGGED)
    assert torch.equal(plain.score, again.score)


def test_relp_at_sites_that_lie_at_norms():
    """gemma's attn_out is a norm's output: the node must stay in the graph, and see all behind."""
    model, batch = build("gemma3_text", F64), batch_of()
    out = sf.Neurons("attn_out.1", D)
    found = attribute(model, batch, out, backward=sf.RelP())[0]
    # The stream behind the attention is block input plus attn_out, so slopes agree with
    # those of resid_mid, which is written at the same place.
    mid = attribute(model, batch, sf.Neurons("resid_mid.1", D), backward=sf.RelP())[0]
    values = grab(model, batch, [sf.Site("attn_out", 1), sf.Site("resid_pre", 1)])
    attn, before = values[sf.Site("attn_out", 1)], values[sf.Site("resid_pre", 1)]
    real = batch["attention_mask"].bool()[..., None]
    torch.testing.assert_close(
        torch.where(real, found / attn, 0.0),
        torch.where(real, mid / (attn + before), 0.0),
        atol=1e-6,
        rtol=1e-5,
    )
    assert found.abs().max() > 1e-3


def test_relp_where_it_is_not_defined():
    with pytest.raises(sf.ModelError, match="gpt_neox"):
        sf.Attribute(make_sae(), METRIC, backward=sf.RelP())(wrapped(build("gpt_neox")), RAGGED)
    with pytest.raises(sf.SaefeatError, match="one of the two"):
        sf.Attribute(make_sae(), METRIC, backward=sf.RelP(), semantics="through_sae")


# ---------------------------------------------------------------- GradDrop


@pytest.mark.parametrize("site", ["resid_post.0", "resid_pre.1", "mlp_out.1", "attn_out.0"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_graddrop_is_the_mean_over_layers_left_out(family, site):
    model, batch = build(family, F64), batch_of()
    neurons = sf.Neurons(site, D)
    found = attribute(model, batch, neurons, backward=sf.GradDrop())[0]
    place = sf.Site.parse(site)
    x = grab(model, batch, [place])[place]
    inside = place.kind in ("mlp_out", "attn_out")
    layers = [layer for layer in range(3) if not (inside and layer == place.layer)]
    total = torch.zeros_like(x)

    def closed(_, __, out):
        return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()

    for layer in layers:
        leaf = x.clone().requires_grad_()
        handles = [
            getattr(blocks_of(model)[layer], name).register_forward_hook(closed)
            for name in BRANCHES.get(family, ("self_attn", "mlp"))
        ]
        try:
            value = score_metric(run_with(model, batch, {place: lambda _, leaf=leaf: leaf})).sum()
        finally:
            for handle in handles:
                handle.remove()
        total += torch.autograd.grad(value, leaf)[0] / len(layers)
    close([found], [-x * total * batch["attention_mask"][..., None]])


# ---------------------------------------------------------------- where all of them agree


def linear_model():
    """A llama without a nonlinearity: no norms, even attention, MLPs that write nothing."""
    model = copy.deepcopy(build("llama", F64))
    model.model.norm = torch.nn.Identity()
    for block in model.model.layers:
        block.input_layernorm = block.post_attention_layernorm = torch.nn.Identity()
        block.self_attn.q_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"method": sf.IG(3)},
        {"method": sf.IG(2, "gauss"), "one_site": True},
        {"backward": sf.RelP()},
        {"method": sf.FiniteDifference(0.5)},
        {"method": sf.Exact(per="token")},
    ],
    ids=str,
)
def test_on_a_linear_model_every_method_is_exact_ablation(how):
    model, metric = linear_model(), sf.metric(lambda logits: logits[:, 5] - logits[:, 7])
    saes = sf.Dictionaries([make_sae(layer=0, dtype=F64), make_sae("topk", layer=1, dtype=F64)])
    chosen = saes.latents({0: range(0, 48, 3), 1: range(0, 48, 4)})
    exact = sf.Attribute(chosen, metric, method=sf.Exact())(wrapped(model), RAGGED)
    other = sf.Attribute(chosen, metric, **how)(wrapped(model), RAGGED)
    torch.testing.assert_close(
        other.scores_of(chosen), exact.scores_of(chosen), atol=1e-6, rtol=1e-5
    )
    assert exact.scores_of(chosen).abs().max() > 1e-3
