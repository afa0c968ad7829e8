"""How gradients flow: through_sae, RelP, GradDrop, each against a forward pass written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as rotate_part
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import saefeat as sf
from helpers import (
    ARCHITECTURES,
    FAMILIES,
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
    saes = sf.dictionaries.Dictionaries(
        make_sae(architecture, layer=layer, seed=layer, dtype=F64) for layer in layers
    )
    found = attribute(model, batch, saes, semantics="through_sae")
    close(found, spliced_in(model, batch, list(saes.values())))


def test_the_two_semantics_differ_only_behind_another_site():
    model, batch = build("llama", F64), batch_of()
    saes = sf.dictionaries.Dictionaries(
        make_sae(layer=layer, seed=layer, dtype=F64) for layer in (0, 2)
    )
    passed = attribute(model, batch, saes)
    through = attribute(model, batch, saes, semantics="through_sae")
    torch.testing.assert_close(through[1], passed[1])
    assert (through[0] - passed[0]).abs().max() > 1e-3
    alone = attribute(model, batch, saes[0], semantics="through_sae")
    torch.testing.assert_close(alone, attribute(model, batch, saes[0]))


@pytest.mark.parametrize("semantics", ["pass_through", "through_sae"])
@pytest.mark.parametrize("kind", ["standard", "transcoder"])
def test_through_others_on_a_path_of_its_own(semantics, kind):
    """With one_site, the dictionary behind was passed through at the first node alone."""
    model, batch = build("llama", F64), batch_of()
    early, late = make_sae(layer=0, dtype=F64), make_sae(kind, layer=1, seed=2, dtype=F64)
    start, rule = sf.Ablate(early.latents([1, 5])), sf.IG(3, "gauss")
    x, end = (grab(model, batch, [early.site], edit)[early.site] for edit in (None, start))
    slope = torch.zeros_like(x)
    for alpha, weight in rule.nodes():
        node, held = ((1 - alpha) * x + alpha * end).requires_grad_(), {}

        def read(value, held=held):
            held["x"] = norm_input(late.site, value, model)
            return value if kind == "transcoder" else splice(value, held)

        def splice(value, held=held):
            out = late.reconstruct(held["x"])
            return out + (value - out).detach()

        hooks = {early.site: lambda _, node=node: node}
        if semantics == "through_sae":
            hooks |= {late.write_site: splice, late.site: read}
        metric = score_metric(run_with(model, batch, hooks)).sum()
        slope += weight * torch.autograd.grad(metric, node)[0]
    saes = sf.dictionaries.Dictionaries([early, late])
    how = {"method": rule, "semantics": semantics, "one_site": True}
    found = dense(sf.Attribute(saes, METRIC, start, **how)(wrapped(model), batch), batch)
    wanted = (early.encode(end) - early.encode(x)) * (slope @ early.directions().to(F64).T)
    close(found[:1], [wanted * batch["attention_mask"][..., None]])


def test_input_norms_through_the_dictionary():
    model, batch = build("llama", F64), batch_of()
    early = make_sae(layer=0, dtype=F64)
    for norm in ("layer_norm", "constant_norm_rescale"):
        late = make_sae("jumprelu", layer=1, norm=norm, dtype=F64)
        found = attribute(
            model, batch, sf.dictionaries.Dictionaries([early, late]), semantics="through_sae"
        )

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
    found = attribute(
        model, batch, sf.dictionaries.Dictionaries([early, mid]), semantics="through_sae"
    )
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
    both = sf.dictionaries.Dictionaries([make_sae(layer=0, dtype=F64), v])
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
    twice = sf.dictionaries.Dictionaries([make_sae("transcoder"), make_sae(site="mlp_out.1")])
    for target in (sae.error(), twice):
        with pytest.raises(sf.errors.DictionaryError, match="through_sae"):
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


def llama_by_hand(model, x, start, tap=None):
    """Last logits from resid_post.start on, one prompt [1, t, d], with RelP's rules written out.

    ``tap`` is given what the first block's gate is worth behind its activation function.
    """
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
        if tap is not None:
            tap.setdefault("gate", gate)
        x = x + mlp.down_proj(half(gate, mlp.up_proj(h)))
    return model.lm_head(rms(base.norm, x))[:, -1]


def phi3_by_hand(model, x, start):
    """As llama, with queries, keys and values of one projection, and gates and values too."""
    base, t = model.model, x.shape[1]
    cos, sin = base.rotary_emb(x, torch.arange(t)[None])
    for block in base.layers[start + 1 :]:
        q, k, v = block.self_attn.qkv_proj(rms(block.input_layernorm, x)).split([32, 16, 16], -1)
        q, k, v = (z.view(1, t, -1, 8).transpose(1, 2) for z in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        pattern = causal(q @ k.transpose(-1, -2) / 8**0.5).detach()
        z = (pattern @ v).transpose(1, 2).reshape(1, t, -1)
        x = x + block.self_attn.o_proj(z)
        h = rms(block.post_attention_layernorm, x)
        gate, up = block.mlp.gate_up_proj(h).split(64, -1)
        x = x + block.mlp.down_proj(half(share(torch.nn.functional.silu, gate), up))
    return model.lm_head(rms(base.norm, x))[:, -1]


def neox_by_hand(model, x, start):
    """Attention and MLP side by side (or one after the other), biases, heads' q, k, v together."""
    base, t = model.gpt_neox, x.shape[1]
    cos, sin = base.rotary_emb(x, torch.arange(t)[None])
    for block in base.layers[start + 1 :]:
        fused = block.attention.query_key_value(layer_norm(block.input_layernorm, x))
        q, k, v = fused.view(1, t, 4, 24).transpose(1, 2).split(8, -1)
        q, k = rotate_part(q, k, cos, sin)
        pattern = causal(q @ k.transpose(-1, -2) / 8**0.5).detach()
        attended = block.attention.dense((pattern @ v).transpose(1, 2).reshape(1, t, D))
        middle = x if block.use_parallel_residual else x + attended
        h = block.mlp.dense_h_to_4h(layer_norm(block.post_attention_layernorm, middle))
        x = x + attended + block.mlp.dense_4h_to_h(share(block.mlp.act, h))
    return model.get_output_embeddings()(layer_norm(base.final_layer_norm, x))[:, -1]


def gemma2_by_hand(model, x, start):
    """Norms of 1 + weight before and behind each branch, a sliding window, both soft caps."""
    base, t, config = model.model, x.shape[1], model.config
    cos, sin = base.rotary_emb(x, torch.arange(t)[None])

    def norm(module, x):
        scale = (x.pow(2).mean(-1, keepdim=True) + module.eps).rsqrt()
        return (1 + module.weight) * x * scale.detach()

    def cap(z, most):
        return torch.tanh(z / most) * most

    for block in base.layers[start + 1 :]:
        attention, h = block.self_attn, norm(block.input_layernorm, x)
        q, k, v = (
            p(h).view(1, t, -1, 8).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        scores = cap(q @ k.transpose(-1, -2) / 8**0.5, attention.attn_logit_softcapping)
        if attention.sliding_window is not None:
            far = torch.ones(t, t, dtype=torch.bool).tril(-attention.sliding_window)
            scores = scores.masked_fill(far, -torch.inf)
        z = (causal(scores).detach() @ v).transpose(1, 2).reshape(1, t, -1)
        x = x + norm(block.post_attention_layernorm, attention.o_proj(z))
        h = norm(block.pre_feedforward_layernorm, x)
        gate = share(block.mlp.act_fn, block.mlp.gate_proj(h))
        out = block.mlp.down_proj(half(gate, block.mlp.up_proj(h)))
        x = x + norm(block.post_feedforward_layernorm, out)
    logits = model.lm_head(norm(base.norm, x))[:, -1]
    return share(lambda z: cap(z, config.final_logit_softcapping), logits)


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


BY_HAND = {
    "llama": llama_by_hand,
    "gpt2": gpt2_by_hand,
    "phi3": phi3_by_hand,
    "gpt_neox": neox_by_hand,
    "gpt_neox in a row": neox_by_hand,
    "gemma2": gemma2_by_hand,
}


def model_for(family) -> torch.nn.Module:
    # transformers' gemma2 gives NaN at left pads in float64
    model = build(family.split()[0], torch.float32 if family == "gemma2" else F64)
    for block in blocks_of(model):
        if family == "gpt_neox in a row":
            block.use_parallel_residual = False
        if family == "gemma2":  # caps that bite
            block.self_attn.attn_logit_softcapping = 0.3
            model.config.final_logit_softcapping = 2.0
    return model


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("family", BY_HAND)
def test_relp_against_a_forward_pass_written_by_hand(family, start):
    model, batch, by_hand = model_for(family), batch_of(), BY_HAND[family]
    neurons = sf.Neurons(f"resid_post.{start}", D)
    found = attribute(model, batch, neurons, backward=sf.attribution.RelP())[0]
    plain = attribute(model, batch, neurons)[0]
    values = grab(model, batch, [neurons.site])[neurons.site]
    for row, length in enumerate([3, 6, 4]):
        x = values[row : row + 1, -length:].clone().requires_grad_()
        logits = by_hand(model, x, start)
        torch.testing.assert_close(logits[0], forward(model, batch)[row, -1], atol=2e-5, rtol=1e-4)
        (slope,) = torch.autograd.grad(score_metric(logits).sum(), x)
        wanted = -(x.detach() * slope)[0]
        near = {"atol": 2e-5, "rtol": 1e-3} if family == "gemma2" else {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(found[row, -length:], wanted.to(F64), **near)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_rule_changes_a_value(family, dtype):
    model, saes = build(family, dtype), sf.Neurons("resid_post.0", D)
    plain = sf.Attribute(saes, METRIC)(wrapped(model), RAGGED)
    for rule in (sf.attribution.RelP(), sf.attribution.GradDrop()):
        found = sf.Attribute(saes, METRIC, backward=rule)(wrapped(model), RAGGED)
        assert torch.equal(found.clean, plain.clean) and torch.equal(found.baseline, plain.baseline)
        assert (found.score - plain.score).abs().max() > 1e-4


def test_a_soft_cap_that_is_full_lets_relevance_pass():
    """Far beyond the cap the gradient is zero, and refused; relevance is what is left."""
    model, neurons = build("gemma2"), sf.Neurons("resid_post.1", D)
    token = int(forward(model, batch_of(RAGGED[:1]))[0, -1].argmax())
    model.config.final_logit_softcapping = 0.05
    metric, rule = sf.metrics.logit(token), sf.attribution.RelP()
    with pytest.raises(sf.errors.GradientError, match="zero at every site"):
        sf.Attribute(neurons, metric)(wrapped(model), RAGGED[:1])
    found = sf.Attribute(neurons, metric, backward=rule)(wrapped(model), RAGGED[:1])
    assert found.score.abs().max() > 1e-4


def test_the_soft_cap_comes_back_after_an_error_and_ctrl_c():
    for error in (RuntimeError("broken"), KeyboardInterrupt()):
        model = build("gemma2")
        before, cap = forward(model, batch_of()), model.config.final_logit_softcapping

        def stop(*_, error=error):
            raise error

        handle = model.model.layers[2].register_forward_hook(stop)
        with pytest.raises(BaseException):  # noqa: B017
            sf.Attribute(make_sae(), METRIC, backward=sf.attribution.RelP())(wrapped(model), RAGGED)
        handle.remove()
        assert model.config.final_logit_softcapping == cap == 30.0
        assert torch.equal(forward(model, batch_of()), before)


def test_relp_inside_a_gated_mlp():
    """A site behind the activation function dropped out of the graph: all its scores were 0."""
    model, batch = build("llama", F64), batch_of()
    neurons = sf.Neurons("model.layers.1.mlp.act_fn.output", 64)
    found = attribute(model, batch, neurons, backward=sf.attribution.RelP())[0]
    before = sf.Site("resid_post", 0)
    values = grab(model, batch, [before])[before]
    both = sf.dictionaries.Dictionaries([sf.Neurons(before, D), neurons])
    through = attribute(model, batch, both, backward=sf.attribution.RelP())
    close(through[1:], [found])  # and the site lets relevance pass to earlier ones
    close(
        through[:1], attribute(model, batch, both["resid_post.0"], backward=sf.attribution.RelP())
    )
    for row, length in enumerate([3, 6, 4]):
        x, tap = values[row : row + 1, -length:], {}
        logits = llama_by_hand(model, x.clone().requires_grad_(), 0, tap)
        (slope,) = torch.autograd.grad(score_metric(logits).sum(), tap["gate"])
        wanted = -(tap["gate"].detach() * slope)[0]
        torch.testing.assert_close(found[row, -length:], wanted, atol=1e-6, rtol=1e-5)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("part", ["input_layernorm", "mlp.act_fn"])
def test_relp_where_a_rule_takes_the_place_of_the_graph(part):
    site = sf.Neurons(f"model.layers.1.{part}.input", 64 if "act" in part else D)
    with pytest.raises(sf.errors.ModelError, match="not at its input"):
        sf.Attribute(site, METRIC, backward=sf.attribution.RelP())(wrapped(build("llama")), RAGGED)


def test_a_coordinate_of_zero_still_has_a_slope():
    """The norm's coefficient was y / x, which is none there: latents along it scored 0."""
    model = build("llama", F64)
    model.model.layers[0].register_forward_hook(
        lambda _, __, out: torch.cat([torch.zeros_like(out[..., :1]), out[..., 1:]], -1)
    )
    axis = sf.Direction(torch.eye(D, dtype=F64)[:2], site="resid_pre.1")
    fixed = sf.attribution.Fixed(axis, torch.tensor([1.0, 0.0]))
    job = sf.Attribute(axis, METRIC, fixed, backward=sf.attribution.RelP())
    slopes = job(wrapped(model), RAGGED)
    zero = slopes.slope[slopes.latent == 0]
    assert (slopes.activation[slopes.latent == 0] == 0).all() and zero.abs().max() > 1e-3
    batch = batch_of()
    values = grab(model, batch, [axis.site])[axis.site]
    for row, length in enumerate([3, 6, 4]):
        x = values[row : row + 1, -length:].clone().requires_grad_()
        (slope,) = torch.autograd.grad(score_metric(llama_by_hand(model, x, 0)).sum(), x)
        mine = slopes.slope[(slopes.latent == 0) & (slopes.prompt == row)]
        torch.testing.assert_close(mine, slope[0, :, 0].float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3", "olmo2", "qwen2"])
def test_relp_changes_no_value_and_is_gone_afterwards(family):
    model = build(family)
    hooks, before = hook_count(model), forward(model, batch_of())
    job = sf.Attribute(sf.Neurons("resid_post.0", D), METRIC, backward=sf.attribution.RelP())
    scores = job(wrapped(model), RAGGED)
    torch.testing.assert_close(scores.clean, score_metric(before[:, -1]), atol=1e-5, rtol=1e-5)
    assert hook_count(model) == hooks and torch.equal(forward(model, batch_of()), before)
    assert scores.score.abs().max() > 1e-4


@pytest.mark.parametrize("backward", [sf.attribution.RelP(), sf.attribution.GradDrop()], ids=repr)
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
    found = attribute(model, batch, out, backward=sf.attribution.RelP())[0]
    # The stream behind the attention is block input plus attn_out, so slopes agree with
    # those of resid_mid, which is written at the same place.
    mid = attribute(model, batch, sf.Neurons("resid_mid.1", D), backward=sf.attribution.RelP())[0]
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
    model = build("llama")
    model.config.model_type = "unheard of"
    with pytest.raises(sf.errors.ModelError, match=r"RelP.*unheard of.*gpt_neox"):
        neurons = sf.Neurons("model.layers.1.output", D)
        sf.Attribute(neurons, METRIC, backward=sf.attribution.RelP())(wrapped(model), RAGGED)
    with pytest.raises(sf.SaefeatError, match="one of the two"):
        sf.Attribute(make_sae(), METRIC, backward=sf.attribution.RelP(), semantics="through_sae")


# ---------------------------------------------------------------- GradDrop


def without_each_layer(model, batch, place, x, own) -> list[torch.Tensor]:
    """The gradient at a site with each layer but its own held fixed, by plain hooks."""
    family = model.config.model_type

    def closed(_, __, out):
        return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()

    found = []
    for layer in range(3):
        if layer == own:
            continue
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
        found.append(torch.autograd.grad(value, leaf)[0])
    return found


@pytest.mark.parametrize("site", ["resid_post.0", "resid_pre.1", "mlp_out.1", "attn_out.0"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text", "phi3"])
def test_graddrop_averages_sizes_over_layers_left_out(family, site):
    """AtP*: 1 / (L − 1) · Σ |score without layer ℓ|; over all L for the stream, in no layer."""
    model, batch = build(family, F64), batch_of()
    place, sae = sf.Site.parse(site), make_sae(site=site, dtype=F64)
    found = attribute(model, batch, sae, backward=sf.attribution.GradDrop())[0]
    signed = attribute(model, batch, sae, backward=sf.attribution.GradDrop(signed=True))[0]
    x = grab(model, batch, [place])[place]
    own = place.layer if place.kind in ("mlp_out", "attn_out") else None
    slopes = without_each_layer(model, batch, place, x, own)
    assert len(slopes) == (3 if own is None else 2)
    real, f = batch["attention_mask"][..., None], sae.encode(x)
    each = [-f * (slope @ sae.directions().to(F64).T) * real for slope in slopes]
    close([found], [sum(one.abs() for one in each) / len(each)])
    close([signed], [sum(each) / len(each)])
    assert (found - signed.abs()).max() > 1e-4, "some layers disagree in sign"


def test_graddrop_over_a_path_and_through_scales():
    """Each layer's scores are integrated first; their sizes are averaged last."""
    model, batch = build("gpt2", F64), batch_of()
    sae = make_sae("jumprelu", layer=1, norm="layer_norm", dtype=F64)
    rule = {"backward": sf.attribution.GradDrop(), "method": sf.IG(2)}
    found = attribute(model, batch, sae, **rule)[0]
    x = grab(model, batch, [sae.site])[sae.site]
    real = batch["attention_mask"][..., None]
    f, scale = sae.encode(x), x.std(-1, keepdim=True)
    rows = sae.directions().to(F64)
    middle = torch.where(real.bool(), x - 0.5 * (f @ rows) * scale, x)
    each = []
    for values in (x, middle):
        each.append(without_each_layer(model, batch, sae.site, values, None))
    means = [sum(pair) / 2 for pair in zip(*each, strict=True)]
    sizes = [(-f * ((slope * scale) @ rows.T) * real).abs() for slope in means]
    close([found], [sum(sizes) / 3])


def test_graddrop_at_a_path_is_graddrop_at_the_site_it_names():
    """A path has no layer: its own was counted, as a third of nothing."""
    model, batch = build("llama", F64), batch_of()
    for kind, path in {
        "attn_out.1": "model.layers.1.self_attn.output",
        "mlp_post.1": "model.layers.1.mlp.down_proj.input",
        "resid_post.1": "model.layers.1.output",
        "resid_pre.2": "model.layers.2.input",
    }.items():
        width = 64 if "mlp_post" in kind else D
        found = [
            attribute(model, batch, sf.Neurons(site, width), backward=sf.attribution.GradDrop())[0]
            for site in (kind, path)
        ]
        close(found[:1], found[1:])


def test_graddrop_uncovers_layers_that_cancel():
    """Two layers that carry v with opposite signs: AtP sees nothing, and a signed mean neither."""
    model, batch = linear_model(), batch_of()
    v = sf.Direction(unit(5).to(F64), site="resid_pre.1")
    for layer, sign in ((1, 1.0), (2, -1.0)):
        attention = model.model.layers[layer].self_attn
        attention.v_proj.weight.data.zero_()
        attention.o_proj.weight.data.zero_()
        attention.v_proj.weight.data[0] = v.vectors[0]
        attention.o_proj.weight.data[:, 0] = sign * unit(6).to(F64)
    # the metric reads what the two layers write, and not v itself
    read = unit(6).to(F64) - (unit(6) @ unit(5)) * unit(5).to(F64)
    metric = sf.metrics.at_site("resid_post.2", lambda x, mask: x[:, -1] @ read.to(x.dtype))
    rules = {
        "atp": None,
        "signed": sf.attribution.GradDrop(signed=True),
        "sizes": sf.attribution.GradDrop(),
    }
    job = {
        name: sf.Attribute(v, metric, backward=rule)(wrapped(model), batch)
        for name, rule in rules.items()
    }
    size = {name: float(found.score.abs().max()) for name, found in job.items()}
    assert size["sizes"] > 0.05
    assert size["atp"] < 0.2 * size["sizes"] and size["signed"] < 0.5 * size["sizes"]


def test_a_model_of_one_layer():
    """There is no other layer to leave out; the stream's own had no score at all."""
    model, batch = build("llama", F64), batch_of()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    for site in ("resid_pre.0", "mlp_out.0", "resid_post.0"):
        neurons = sf.Neurons(site, D)
        found = attribute(model, batch, neurons, backward=sf.attribution.GradDrop())[0]
        x = grab(model, batch, [neurons.site])[neurons.site].requires_grad_()
        closed = [
            getattr(model.model.layers[0], name).register_forward_hook(
                lambda _, __, out: (out[0].detach(), *out[1:]) if isinstance(out, tuple)
                else out.detach()
            )
            for name in (("self_attn", "mlp") if site == "resid_pre.0" else ())
        ]  # fmt: skip
        total = score_metric(run_with(model, batch, {neurons.site: lambda _, x=x: x})).sum()
        for handle in closed:
            handle.remove()
        (slope,) = torch.autograd.grad(total, x)
        close([found], [(x.detach() * slope * batch["attention_mask"][..., None]).abs()])


def test_sizes_say_so_wherever_they_are_read(tmp_path):
    nn, saes = (
        wrapped(build("llama")),
        sf.dictionaries.Dictionaries([make_sae(layer=0), make_sae(layer=1)]),
    )
    job = sf.Attribute(saes, METRIC, backward=sf.attribution.GradDrop())
    found = job(nn, RAGGED, checkpoint=tmp_path / "job", batch_size=2)
    again = job(nn, RAGGED, checkpoint=tmp_path / "job", batch_size=2)
    loaded = sf.attribution.Attribution.load(found.save(tmp_path / "x.safetensors"), saes=saes)
    for scores in (found, again, loaded):
        assert not scores.signed and (scores.score >= 0).all()
        assert "sizes without sign" in repr(scores) and "gap" not in repr(scores)
        for ask in (lambda s=scores: s.gap, lambda s=scores: s.gap_by_site):
            with pytest.raises(sf.SaefeatError, match=r"sizes without a sign.*signed=True"):
                ask()
        with pytest.raises(sf.SaefeatError, match=r"audit.*sizes without a sign"):
            sf.audit(job, nn, RAGGED, scores)
        assert torch.allclose(scores.slope * scores.change.abs(), scores.score, atol=1e-6)
        page = scores.to_html()
        assert "either way" in page and "lowers" not in page
        assert "size" in scores.plot_latents(3).figure.axes[1].get_ylabel()
        # top finds the largest: both those that support and those that oppose
        _, values, _ = scores.totals()
        assert (values >= 0).all() and len(scores.top(len(values))) == int((values > 0).sum())
    signed = sf.Attribute(saes, METRIC, backward=sf.attribution.GradDrop(signed=True))(nn, RAGGED)
    assert signed.signed and signed.gap.isfinite().all() and (signed.score < 0).any()
    assert repr(sf.attribution.GradDrop()) == "GradDrop(signed=False)"
    with pytest.raises(sf.SaefeatError, match="`signed`"):
        sf.attribution.GradDrop(signed="no")


def test_graddrop_where_it_is_not_defined():
    model = build("llama")
    model.config.model_type = "unheard of"
    with pytest.raises(sf.errors.ModelError, match=r"GradDrop.*unheard of"):
        job = sf.Attribute(
            sf.Neurons("model.layers.1.output", D), METRIC, backward=sf.attribution.GradDrop()
        )
        job(wrapped(model), RAGGED)


def test_an_audit_of_exact_scores_is_refused():
    """They have no position, and another token was moved: 'the ranking does NOT hold'."""
    nn, few = wrapped(build("llama")), make_sae().latents(range(0, 48, 3))
    job = sf.Attribute(few, METRIC, method=sf.attribution.Exact())
    with pytest.raises(sf.SaefeatError, match=r"audit.*of whole prompts"):
        sf.audit(job, nn, RAGGED, job(nn, RAGGED), budget=8)


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
        {"backward": sf.attribution.RelP()},
        {"method": sf.attribution.FiniteDifference(0.5)},
        {"method": sf.attribution.Exact(per="token")},
    ],
    ids=str,
)
def test_on_a_linear_model_every_method_is_exact_ablation(how):
    model, metric = linear_model(), sf.metrics.custom(lambda logits: logits[:, 5] - logits[:, 7])
    saes = sf.dictionaries.Dictionaries(
        [make_sae(layer=0, dtype=F64), make_sae("topk", layer=1, dtype=F64)]
    )
    chosen = saes.latents({0: range(0, 48, 3), 1: range(0, 48, 4)})
    exact = sf.Attribute(chosen, metric, method=sf.attribution.Exact())(wrapped(model), RAGGED)
    other = sf.Attribute(chosen, metric, **how)(wrapped(model), RAGGED)
    torch.testing.assert_close(
        other.scores_of(chosen), exact.scores_of(chosen), atol=1e-6, rtol=1e-5
    )
    assert exact.scores_of(chosen).abs().max() > 1e-3


@pytest.mark.parametrize(
    "backward",
    [
        sf.attribution.RelP(),
        pytest.param(
            sf.attribution.GradDrop(),
            marks=pytest.mark.xfail(
                strict=True, reason="a block's gates close at both of its layers at once"
            ),
        ),
    ],
)
def test_a_block_that_stands_at_two_layers(backward):
    """Its hooks were there twice. The gradients are those of two blocks with the same weights."""
    once, twice = build("llama").requires_grad_(False), build("llama").requires_grad_(False)
    once.model.layers.append(once.model.layers[0])
    twice.model.layers.append(copy.deepcopy(twice.model.layers[0]))
    embeds = torch.randn(1, 5, once.config.hidden_size)
    found = []
    for model in (once, twice):
        x = embeds.clone().requires_grad_()
        with backward.applied(model) as slopes:
            total = model(inputs_embeds=x, use_cache=False).logits[0, -1, 3]
            found.append(slopes(total, {0: x}, {0: sf.Site("resid_pre", 0)})[0])
    assert float(found[1].abs().max()) > 0
    torch.testing.assert_close(*found)
