"""Attribute against the same thing written naively: the SAE inside the graph, finite differences.

FIELD.md section 3: gradient under no_grad read as "no effect", pads counted in sums, the error term
recomputed from edited latents, attribution averaged over pads and BOS.
"""

from __future__ import annotations

import importlib
from itertools import pairwise

import pytest
import torch

import saefeat as sf
from helpers import (
    ARCHITECTURES,
    D_SAE,
    RAGGED,
    TRANSCODERS,
    D,
    batch_of,
    build,
    forward,
    hook_count,
    make_sae,
    unit,
    wrapped,
)
from saefeat.model.modules import find

MODULE = importlib.import_module("saefeat.attribution.pairs")
METRIC = sf.logit_diff([5, 9], 7)
F64 = torch.float64
ATP, LEFT, MIDPOINT, GAUSS = sf.attribution.AtP(), sf.IG(4), sf.IG(3, "midpoint"), sf.IG(3, "gauss")
METHODS = [ATP, LEFT, MIDPOINT, GAUSS]
PATHS = {  # the nodes, written out
    repr(ATP): [(0.0, 1.0)],
    repr(LEFT): [(0.0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25)],
    repr(MIDPOINT): [(1 / 6, 1 / 3), (0.5, 1 / 3), (5 / 6, 1 / 3)],
    repr(GAUSS): [(0.5 - 0.15**0.5, 5 / 18), (0.5, 4 / 9), (0.5 + 0.15**0.5, 5 / 18)],
}


def score_metric(logits: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits[:, [5, 9]], 1) - logits[:, 7]


# ---------------------------------------------------------------- the naive form


def run_with(model, batch, hooks: dict):
    """Last logits with ``hooks[site](value) -> value`` at plain module hooks."""
    handles = []
    for site, function in hooks.items():
        place = find(model, site)
        module = model.get_submodule(place.path)

        def on_output(_, __, output, function=function):
            if isinstance(output, tuple):
                return (function(output[0]), *output[1:])
            return function(output)

        def on_input(_, args, function=function):
            return (function(args[0]), *args[1:])

        if place.end == "input":
            handles.append(module.register_forward_pre_hook(on_input))
        else:
            handles.append(module.register_forward_hook(on_output))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    try:
        return model(**batch, position_ids=positions).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


def grab(model, batch, sites, intervention=None) -> dict:
    """Raw values at the sites' modules, after an intervention."""
    found = {}

    def keep(site):
        def run(value):
            found[site] = value.detach().clone()
            return value

        return run

    with torch.no_grad():
        if intervention is None:
            run_with(model, batch, {site: keep(site) for site in sites})
        else:
            with sf.hooked(model, intervention):
                run_with(model, batch, {site: keep(site) for site in sites})
    return found


def norm_input(site, x, model):
    """mlp_norm is the norm's input, normalized without its weight."""
    if site.kind != "mlp_norm":
        return x
    place = find(model, site)
    if place.transform == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + place.eps).sqrt()


def scale_of(dictionary, x):
    norm = getattr(dictionary, "norm", "none")
    if norm == "layer_norm":
        return x.std(-1, keepdim=True)
    if norm == "constant_norm_rescale":
        return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return 1.0


def naive(model, batch, dictionaries, method, baseline=None) -> list[torch.Tensor]:
    """Scores [b, t, d_sae] a dictionary, with every SAE spliced in and its latents leaves.

    At each node every site is moved a share of the way from what the pass, moved upstream already,
    has there to the baseline's value: (blended latents) · directions + the rest as error. The
    gradient also passes through to earlier sites, as if the error were the rest of the stream.
    """
    reads = [d.site for d in dictionaries]
    writes = [d.write_site for d in dictionaries]
    assert len(set(writes)) == len(writes)
    clean = grab(model, batch, {*reads, *writes})
    base = None if baseline is None else grab(model, batch, {*reads, *writes}, baseline)
    f_clean, f_base, ends, dirs = [], [], [], []
    for d in dictionaries:
        x = norm_input(d.site, clean[d.site], model)
        f_clean.append(d.encode(x))
        dirs.append((d.directions().to(x.dtype), scale_of(d, x)))
        part = f_clean[-1] @ dirs[-1][0] * dirs[-1][1]
        if base is None:
            f_base.append(torch.zeros_like(f_clean[-1]))
            ends.append(clean[d.write_site] - part)
        else:
            f_base.append(d.encode(norm_input(d.site, base[d.site], model)))
            ends.append(base[d.write_site])
    totals = [torch.zeros_like(f) for f in f_clean]
    for alpha, weight in PATHS[repr(method)]:
        leaves = []
        hooks = {}
        for n, d in enumerate(dictionaries):
            leaf = torch.lerp(f_clean[n], f_base[n], alpha).detach().requires_grad_()
            leaves.append(leaf)

            def splice(x, leaf=leaf, alpha=alpha, n=n):
                part = leaf @ dirs[n][0] * dirs[n][1]
                error = (torch.lerp(x, ends[n], alpha) - part).detach()
                return part + error + (x - x.detach())

            hooks[d.write_site] = splice
        value = score_metric(run_with(model, batch, hooks))
        gradients = torch.autograd.grad(value.sum(), leaves)
        totals = [t + weight * g for t, g in zip(totals, gradients, strict=True)]
    real = batch["attention_mask"].bool()[..., None]
    changes = [b - c for b, c in zip(f_base, f_clean, strict=True)]
    return [(c * t * real).detach() for c, t in zip(changes, totals, strict=True)]


def dense(scores: sf.attribution.Attribution, batch, field="score") -> list[torch.Tensor]:
    """The sparse result laid out as [b, t, d_sae] a dictionary."""
    width = batch["input_ids"].shape[1]
    pads = width - batch["attention_mask"].sum(1)
    found = []
    for n, d in enumerate(scores.dictionaries):
        out = torch.zeros(len(pads), width, d.d_sae, dtype=F64)
        rows = (scores.dictionary == n).nonzero()[:, 0]
        where = (
            scores.prompt[rows],
            scores.position[rows] + pads[scores.prompt[rows]],
            scores.latent[rows],
        )
        assert not out[where].any()
        out.index_put_(where, getattr(scores, field)[rows].to(F64), accumulate=True)
        found.append(out)
    return found


def close(found, wanted, tolerance=1e-5):
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.abs().max() > 1e-4, "the case must have scores"
        torch.testing.assert_close(ours, theirs.to(F64), atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- against the naive form


def baselines():
    v = sf.Direction.at_sites(unit(9), sites=["resid_pre.0", "resid_post.1", "resid_post.2"])
    return {"zero": None, "direction": sf.Ablate(v)}


@pytest.mark.parametrize("baseline", ["zero", "direction"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_three_sites_against_the_naive_form(family, method, baseline):
    model, batch = build(family, F64), batch_of()
    saes = sf.dictionaries.Dictionaries(
        make_sae(a, layer=layer, seed=layer, dtype=F64)
        for layer, a in enumerate(["standard", "jumprelu", "gated"])
    )
    start = baselines()[baseline]
    scores = sf.Attribute(saes, METRIC, baseline=start, method=method)(wrapped(model), batch)
    close(dense(scores, batch), naive(model, batch, saes.values(), method, start))


@pytest.mark.parametrize("baseline", ["zero", "direction"])
@pytest.mark.parametrize("method", [ATP, LEFT], ids=repr)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *TRANSCODERS])
def test_every_architecture_against_the_naive_form(architecture, method, baseline):
    model, batch = build("gemma3_text", F64), batch_of()
    saes = [make_sae(architecture, layer=layer, seed=layer, dtype=F64) for layer in (0, 2)]
    saes.append(make_sae("standard", "resid_post.1", 5, dtype=F64))
    saes = sf.dictionaries.Dictionaries(saes)
    start = baselines()[baseline]
    scores = sf.Attribute(saes, METRIC, baseline=start, method=method)(wrapped(model), batch)
    close(dense(scores, batch), naive(model, batch, list(saes.values()), method, start))


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("method", [ATP, LEFT], ids=repr)
def test_input_norms_against_the_naive_form(norm, method):
    model, batch = build("llama", F64), batch_of()
    saes = sf.dictionaries.Dictionaries([make_sae("jumprelu", layer=1, norm=norm, dtype=F64)])
    scores = sf.Attribute(saes, METRIC, method=method)(wrapped(model), batch)
    close(dense(scores, batch), naive(model, batch, list(saes.values()), method))


@pytest.mark.parametrize("site", ["resid_pre.1", "attn_out.1", "mlp_out.0", "resid_post.0"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_every_kind_of_site_against_the_naive_form(family, site):
    model, batch = build(family, F64), batch_of()
    saes = sf.dictionaries.Dictionaries([make_sae("standard", site, dtype=F64)])
    scores = sf.Attribute(saes, METRIC, method=LEFT)(wrapped(model), batch)
    close(dense(scores, batch), naive(model, batch, list(saes.values()), LEFT))


def test_resid_mid_scores_are_those_of_the_attention_output_moved():
    """resid_mid is written where the attention's output is: same gradient, other latents."""
    model, batch = build("llama", F64), batch_of()
    mid = make_sae("standard", "resid_mid.1", dtype=F64)
    scores = sf.Attribute(mid, METRIC)(wrapped(model), batch)
    slopes = sf.Attribute(sf.Neurons("attn_out.1", D), METRIC)(wrapped(model), batch)
    values = dense(slopes, batch, "change")[0]
    gradient = torch.where(values != 0, dense(slopes, batch)[0] / values, 0.0)
    probe = sf.Probe(mid)
    with torch.no_grad(), sf.hooked(model, probe) as log:
        forward(model, batch)
    f = probe.readings(log)[0].values
    wanted = -f * (gradient @ mid.directions().T) * batch["attention_mask"][..., None]
    close(dense(scores, batch), [wanted])


# ---------------------------------------------------------------- against the metric itself


@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.1", "attn_out.0"])
def test_finite_differences(site):
    """The metric's change when one latent moves by eps along its direction, float64."""
    model, batch = build("gpt2", F64), batch_of()
    sae = make_sae("standard", site, dtype=F64)
    scores = sf.Attribute(sae, METRIC)(wrapped(model), batch)
    assert len(scores) > 50
    eps = 1e-5
    pads = 6 - batch["attention_mask"].sum(1)
    for n in torch.randperm(len(scores))[:25].tolist():
        row, latent = int(scores.prompt[n]), int(scores.latent[n])
        column = int(scores.position[n] + pads[row])
        ends = []
        for sign in (1, -1):

            def nudge(x, sign=sign, row=row, column=column, latent=latent):
                x = x.clone()
                x[row, column] += sign * eps * sae.directions([latent])[0]
                return x

            with torch.no_grad():
                ends.append(score_metric(run_with(model, batch, {sf.Site.parse(site): nudge})))
        slope = (ends[0] - ends[1]) / (2 * eps)
        found = float(scores.score[n] / scores.change[n])
        assert found == pytest.approx(float(slope[row]), abs=1e-6, rel=1e-5)
        others = [r for r in range(3) if r != row]
        assert not slope[others].any()


@pytest.mark.parametrize("architecture", ["standard", "topk", "abstopk", "direction", "transcoder"])
def test_a_single_site_is_complete(architecture):
    """Σ scores is the metric's change, and a gap there is if the rule is coarse."""
    model, batch = build("llama", F64), batch_of()
    if architecture == "direction":
        part = sf.Direction(torch.randn(3, D, dtype=F64), site="resid_post.1")
    else:
        part = make_sae(architecture, dtype=F64)
    fine = sf.Attribute(part, METRIC, method=sf.IG(24, "gauss"))(wrapped(model), batch)
    coarse = sf.Attribute(part, METRIC)(wrapped(model), batch)
    moved = fine.baseline - fine.clean
    assert (moved.abs() > 1e-3).all()
    torch.testing.assert_close(fine.gap, torch.zeros(3), atol=2e-5, rtol=0)
    assert (coarse.gap.abs() > 1e-4).any()
    total = torch.stack([part[row].sum() for row in range(3) for part in [sum_rows(fine, batch)]])
    torch.testing.assert_close(fine.gap, (total - moved).float(), atol=1e-5, rtol=0)


def sum_rows(scores, batch) -> torch.Tensor:
    return sum(part.sum((1, 2)) for part in dense(scores, batch))


def test_ablating_under_the_same_intervention_is_complete_too():
    model, batch = build("llama", F64), batch_of()
    v = sf.Direction(unit(2), site="resid_post.1")
    for change in (sf.Ablate(v), sf.Clamp(v, add=3.0), sf.Clamp(v, 2.0, where=sf.Tokens.last(2))):
        scores = sf.Attribute(v, METRIC, baseline=change, method=sf.IG(24, "gauss"))(
            wrapped(model), batch
        )
        assert ((scores.baseline - scores.clean).abs() > 1e-3).all()
        torch.testing.assert_close(scores.gap, torch.zeros(3), atol=2e-5, rtol=0)


def test_clean_and_baseline_are_the_metric_of_real_runs():
    model, batch = build("llama"), batch_of()
    start = sf.Ablate(make_sae().latents([1, 2, 3]))
    scores = sf.Attribute(make_sae(layer=2), METRIC, baseline=start)(wrapped(model), batch)
    clean = score_metric(forward(model, batch)[:, -1])
    with sf.hooked(model, start):
        base = score_metric(forward(model, batch)[:, -1])
    torch.testing.assert_close(scores.clean, clean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.baseline, base, atol=1e-5, rtol=1e-5)
    assert (clean - base).abs().max() > 1e-3


def test_more_steps_come_closer():
    model, batch = build("llama", F64), batch_of()
    sae = make_sae("standard", dtype=F64)
    gaps = [
        float(sf.Attribute(sae, METRIC, method=m)(wrapped(model), batch).gap.abs().sum())
        for m in (sf.IG(1), sf.IG(8), sf.IG(32), sf.IG(16, "gauss"))
    ]
    assert all(later < 0.6 * sooner for sooner, later in pairwise(gaps)), gaps


def test_nodes_are_the_rules():
    for method in METHODS:
        found, wanted = torch.tensor(method.nodes()), torch.tensor(PATHS[repr(method)])
        torch.testing.assert_close(found, wanted)
    for rule in ("left", "midpoint", "gauss"):
        assert sum(w for _, w in sf.IG(7, rule).nodes()) == pytest.approx(1.0)
    for wrong in (lambda: sf.IG(0), lambda: sf.IG(3, "right")):
        with pytest.raises(sf.SaefeatError, match="midpoint"):
            wrong()


# ---------------------------------------------------------------- batches, pads, parts


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("method", [ATP, LEFT], ids=repr)
def test_batched_equals_single(family, method):
    model = build(family)
    saes = sf.dictionaries.Dictionaries([make_sae(layer=0), make_sae("jumprelu", layer=2)])
    job = sf.Attribute(saes, METRIC, baseline=baselines()["direction"], method=method)
    nn = wrapped(model)
    whole, cut = job(nn, RAGGED), job(nn, RAGGED, batch_size=2)
    alone = [job(nn, [prompt]) for prompt in RAGGED]
    assert whole.tokens.tolist() == cut.tokens.tolist() == [3, 6, 4]
    for row, one in enumerate(alone):
        length = len(RAGGED[row].split())
        (batch,) = [batch_of([RAGGED[row]])]
        wanted = dense(one, batch)
        for found in (whole, cut):
            for ours, theirs in zip(dense(found, batch_of()), wanted, strict=True):
                assert not ours[row, :-length].any()
                torch.testing.assert_close(ours[row, -length:], theirs[0], atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(found.clean[row], one.clean[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.baseline[row], one.baseline[0], atol=1e-5, rtol=1e-5)


def test_pads_are_never_scored_and_never_counted():
    """Attribution averaged over pads and BOS."""
    scores = sf.Attribute(make_sae(), METRIC)(wrapped(build("llama")), RAGGED)
    lengths = torch.tensor([3, 6, 4])
    assert (scores.position >= 0).all() and (scores.position < lengths[scores.prompt]).all()
    assert scores.tokens.tolist() == [3, 6, 4]
    assert set(scores.prompt.tolist()) == {0, 1, 2}


def test_where_restricts_what_is_scored():
    nn = wrapped(build("llama"))
    every = sf.Attribute(make_sae(), METRIC)(nn, RAGGED)
    last = sf.Attribute(make_sae(), METRIC, where=sf.Tokens.last(2))(nn, RAGGED)
    assert last.tokens.tolist() == [2, 2, 2]
    whole, part = dense(every, batch_of())[0], dense(last, batch_of())[0]
    torch.testing.assert_close(part[:, -2:], whole[:, -2:])
    assert not part[:, :-2].any() and whole[:, :-2].any()


def test_excluded_tokens_are_neither_scored_nor_counted():
    nn = wrapped(build("llama"))
    prompts = [[2, 10, 11, 12], [2, 10, 13, 14, 15], [20, 21]]
    scores = sf.Attribute(make_sae(excluded=(2,)), METRIC)(nn, prompts)
    first = scores.position == 0
    assert not first[scores.prompt != 2].any() and first[scores.prompt == 2].any()
    assert scores.tokens.tolist() == [3, 4, 2]


@pytest.mark.parametrize(
    ("method", "baseline"), [(ATP, "zero"), (ATP, "direction"), (LEFT, "direction")]
)
def test_latents_score_as_in_the_full_run(method, baseline):
    nn = wrapped(build("llama"))
    saes = sf.dictionaries.Dictionaries([make_sae(layer=0), make_sae("topk", layer=2, seed=3)])
    start = baselines()[baseline]
    chosen = saes.latents({2: [40, 3, 17, 8], 0: list(range(47, 20, -1))})
    full = sf.Attribute(saes, METRIC, baseline=start, method=method)(nn, RAGGED)
    part = sf.Attribute(chosen, METRIC, baseline=start, method=method)(nn, RAGGED)
    by_site = {d.site: x for d, x in zip(full.dictionaries, dense(full, batch_of()), strict=True)}
    # order of dictionaries follows the selection; gradients pass through all watched sites
    for d, found in zip(part.dictionaries, dense(part, batch_of()), strict=True):
        indices = dict((b.site, ix) for b, ix in chosen.parts)[d.site]
        wanted = torch.zeros_like(found)
        wanted[..., list(indices)] = by_site[d.site][..., list(indices)]
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
        assert found.any()


BLOCKS = {  # what is encoded at a time, what is remembered, and when products are dense
    "small": {"CHUNK": 7, "TOKENS": 2},
    "single latents": {"CHUNK": 1},
    "forgotten": {"CHUNK": D_SAE - 1, "REMEMBERED": 0},
    "by pairs": {"DENSE": 0},
    "by pairs, small": {"DENSE": 0, "CHUNK": 5, "TOKENS": 3},
    "dense, forgotten": {"DENSE": 10**9, "REMEMBERED": 0, "TOKENS": 3},
}


@pytest.mark.parametrize("architecture", ["jumprelu", "topk", "transcoder", "layer_norm", "error"])
@pytest.mark.parametrize("method", [ATP, sf.IG(2)], ids=repr)
def test_blocks_change_nothing(architecture, method, monkeypatch):
    model, batch = build("llama", F64), batch_of()
    if architecture in ("layer_norm", "error"):
        sae = make_sae(norm="layer_norm", dtype=F64)
        sae = sae.error() if architecture == "error" else sae
    else:
        sae = make_sae(architecture, dtype=F64)
    job = sf.Attribute(sae, METRIC, method=method)
    whole = dense(job(wrapped(model), batch), batch)
    for sizes in BLOCKS.values():
        with monkeypatch.context() as patch:
            for name, size in sizes.items():
                patch.setattr(MODULE, name, size)
            torch.testing.assert_close(dense(job(wrapped(model), batch), batch), whole)


def test_what_moves_is_encoded_once(monkeypatch):
    """The zero baseline and the scores share one encoding; with too many pairs they do not."""
    encoded = []
    plain = MODULE.encode
    monkeypatch.setattr(MODULE, "encode", lambda *args: encoded.append(1) or plain(*args))
    model = wrapped(build("llama"))
    job = sf.Attribute(make_sae(), METRIC, method=sf.IG(2))
    job(model, batch_of())
    once = len(encoded)
    monkeypatch.setattr(MODULE, "REMEMBERED", 0)
    job(model, batch_of())
    assert len(encoded) == 3 * once


def test_a_dictionary_that_computes_all_latents_is_encoded_in_one_block(monkeypatch):
    encoded = []
    plain = MODULE.encode
    monkeypatch.setattr(MODULE, "encode", lambda *args: encoded.append(1) or plain(*args))
    monkeypatch.setattr(MODULE, "CHUNK", 4)
    sf.Attribute(make_sae("topk"), METRIC, method=sf.IG(2))(wrapped(build("llama")), batch_of())
    assert make_sae("topk").joint and len(encoded) == 1


def test_a_frozen_model_gives_the_same():
    model = build("llama")
    job = sf.Attribute(
        sf.dictionaries.Dictionaries([make_sae(layer=0), make_sae(layer=2)]), METRIC, method=LEFT
    )
    free = dense(job(wrapped(model), RAGGED), batch_of())
    assert free[0].abs().max() > 1e-3
    model.requires_grad_(False)
    frozen = dense(job(wrapped(model), RAGGED), batch_of())
    for ours, theirs in zip(frozen, free, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_bfloat16_models_are_scored_in_float32():
    model = build("llama", torch.bfloat16)
    scores = sf.Attribute(make_sae(), METRIC, method=sf.IG(2))(wrapped(model), RAGGED)
    assert scores.score.dtype == torch.float32 and torch.isfinite(scores.score).all()
    exact = sf.Attribute(make_sae(), METRIC, method=sf.IG(2))(wrapped(build("llama")), RAGGED)
    a, b = dense(scores, batch_of())[0].flatten(), dense(exact, batch_of())[0].flatten()
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.98


def test_the_model_is_as_it_was():
    model = build("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = hook_count(model)
    logits = forward(model, batch_of())
    sf.Attribute(make_sae(), METRIC, baseline=sf.Ablate(make_sae()), method=LEFT)(
        wrapped(model), RAGGED
    )
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert hook_count(model) == hooks and not model.training
    assert torch.equal(forward(model, batch_of()), logits)
    assert torch.is_grad_enabled()


def test_scores_are_plain_data():
    scores = sf.Attribute(make_sae(), METRIC)(wrapped(build("llama")), RAGGED)
    for name in ("score", "activation", "change", "clean", "baseline"):
        tensor = getattr(scores, name)
        assert not tensor.requires_grad and tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
    torch.testing.assert_close(scores.change, -scores.activation)
    assert (scores.activation > 0).all()
    assert len(scores) == len(scores.score) and "3 prompts" in repr(scores)


# ---------------------------------------------------------------- errors


def test_gradients_switched_off():
    """Gradient under no_grad read as 'no effect'."""
    nn = wrapped(build("llama"))
    job = sf.Attribute(make_sae(), METRIC)
    for off in (torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)):
        with off(), pytest.raises(sf.errors.GradientError, match="enable_grad"):
            job(nn, RAGGED)


BAD = {
    "argmax": lambda logits: logits.argmax(-1),
    "detached": lambda logits: logits[:, 5].detach(),
    "mean": lambda logits: logits[:, 5].mean(),
    "matrix": lambda logits: logits[:, 5:7],
    "constant": lambda logits: torch.zeros(len(logits)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_metric_without_one_differentiable_number_a_prompt(name):
    nn = wrapped(build("llama"))
    with pytest.raises(sf.errors.GradientError) as caught:
        sf.Attribute(make_sae(), sf.metrics.custom(BAD[name], name))(nn, RAGGED)
    assert "[batch]" in str(caught.value) and "shape" in str(caught.value)


def test_a_metric_of_another_batch():
    nn = wrapped(build("llama"))
    with pytest.raises(sf.errors.GradientError):
        sf.Attribute(make_sae(), sf.metrics.custom(lambda logits: logits[:, 5].sum()[None]))(
            nn, RAGGED
        )


def test_an_empty_target():
    with pytest.raises(sf.errors.LatentError, match="at least one latent"):
        sf.Attribute(make_sae().latents([]), METRIC)(wrapped(build("llama")), RAGGED)


def test_tokens_of_a_metric():
    nn = wrapped(build("llama"))
    a = sf.Attribute(make_sae(), sf.logit_diff("w1", ["w3", "w5"]))(nn, RAGGED)
    b = sf.Attribute(make_sae(), sf.logit_diff(5, [7, 9]))(nn, RAGGED)
    assert torch.equal(a.score, b.score)
    for word in ("w1 w2", "unknown", ""):
        with pytest.raises(sf.errors.PromptError, match="token"):
            sf.Attribute(make_sae(), sf.metrics.logit(word))(nn, RAGGED)


@pytest.mark.parametrize("token", [-1, 100, 10**6])
def test_token_ids_outside_the_vocabulary(token):
    nn = wrapped(build("llama"))
    with pytest.raises(sf.errors.PromptError):
        sf.Attribute(make_sae(), sf.metrics.logit(token))(nn, RAGGED)


def test_the_baselines_own_token():
    model, batch = build("llama"), batch_of()
    start = sf.Clamp(sf.Direction(unit(3), site="resid_post.0"), 30.0)
    with sf.hooked(model, start):
        base = forward(model, batch)[:, -1]
    clean, top = forward(model, batch)[:, -1], base.argmax(-1)
    assert (top != clean.argmax(-1)).any()
    metric = sf.logit_diff(sf.metrics.BASELINE_TOP, 7)
    scores = sf.Attribute(make_sae(), metric, baseline=start)(wrapped(model), batch)
    rows = torch.arange(3)
    torch.testing.assert_close(scores.clean, clean[rows, top] - clean[:, 7], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.baseline, base[rows, top] - base[:, 7], atol=1e-5, rtol=1e-5)
    # compared with itself, there is nothing to attribute, and it says so
    same = sf.logit_diff(sf.metrics.BASELINE_TOP, int(top[1]))
    scores = sf.Attribute(make_sae(), same, baseline=start)(wrapped(model), batch)
    assert scores.degenerate.tolist() == (top == top[1]).tolist() and scores.degenerate[1]


# ---------------------------------------------------------------- reading scores out


@pytest.fixture(scope="module")
def result():
    saes = sf.dictionaries.Dictionaries([make_sae(layer=2, seed=1), make_sae("jumprelu", layer=0)])
    return sf.Attribute(saes, METRIC, baseline=baselines()["direction"])(
        wrapped(build("llama")), RAGGED
    )


def brute(result) -> torch.Tensor:
    """[prompts, dictionaries, d_sae]: the mean over each prompt's tokens."""
    parts = [x.sum(1) / result.tokens[:, None] for x in dense(result, batch_of())]
    return torch.stack(parts, 1)


@pytest.mark.parametrize("k", [1, 5, 20, 10**6])
def test_top_is_the_best_of_the_mean(result, k):
    mean = brute(result).mean(0)
    order = [(n, i) for n in range(2) for i in range(D_SAE) if mean[n, i] > 1e-12]
    order.sort(key=lambda pair: -mean[pair])
    wanted = {(str(result.dictionaries[n].site), i) for n, i in order[:k]}
    top = result.top(k)
    assert {(str(site), i) for site, i in top} == wanted
    assert len(top) == min(k, len(order)) and 0 < len(order) < 2 * D_SAE
    for basis, indices in top.parts:  # best first within each dictionary
        n = result.dictionaries.index(basis)
        values = mean[n, list(indices)]
        assert torch.equal(values, values.sort(descending=True).values)


@pytest.mark.parametrize("k", [1, 6])
def test_top_per_prompt(result, k):
    for row, top in enumerate(result.top(k, per="prompt")):
        values = brute(result)[row]
        best = values.flatten().topk(k).indices.tolist()
        wanted = {(str(result.dictionaries[b // D_SAE].site), b % D_SAE) for b in best}
        assert {(str(site), i) for site, i in top} == wanted
    assert len(result.top(k, per="prompt")) == 3
    assert len({str(top) for top in result.top(k, per="prompt")}) > 1


def test_top_within(result):
    a, b = result.dictionaries
    allowed = a.latents(range(0, D_SAE, 2)) | b.latents(range(5))
    found = result.top(4, within=allowed)
    assert 0 < len(found) <= 4 and len(found - allowed) == 0
    mean = brute(result).mean(0)
    ok = torch.zeros_like(mean, dtype=torch.bool)
    ok[0, ::2], ok[1, :5] = True, True
    best = torch.where(ok, mean, -1.0).flatten().topk(4).indices.tolist()
    wanted = {(str(result.dictionaries[n // D_SAE].site), n % D_SAE) for n in best}
    assert {(str(site), i) for site, i in found} == wanted


def test_scores_of(result):
    a, b = result.dictionaries
    chosen = b.latents([7, 0, 30]) | a.latents(list(range(40, 20, -1)))
    mean = brute(result).mean(0)
    wanted = torch.cat([mean[1, [7, 0, 30]], mean[0, list(range(40, 20, -1))]])
    torch.testing.assert_close(result.scores_of(chosen), wanted.float(), atol=1e-6, rtol=1e-4)
    assert wanted.abs().max() > 1e-4 and (wanted == 0).any()


def test_scores_of_another_dictionary(result):
    """Latent index from another width; the same file loaded again is another object, too."""
    with pytest.raises(sf.SaefeatError):
        result.scores_of(make_sae("topk", seed=9).latents([1, 2]))


def test_totals_by_prompt_and_over_all(result):
    keys, values, prompts = result.totals(per="prompt")
    table = brute(result)
    rebuilt = torch.zeros_like(table)
    rebuilt[prompts, keys[:, 0], keys[:, 1]] = values.to(F64)
    torch.testing.assert_close(rebuilt, table, atol=1e-6, rtol=1e-4)
    keys, values, _ = result.totals()
    rebuilt = torch.zeros_like(table[0])
    rebuilt[keys[:, 0], keys[:, 1]] = values.to(F64)
    torch.testing.assert_close(rebuilt, table.mean(0), atol=1e-6, rtol=1e-4)


def test_totals_of_a_misspelt_kind(result):
    with pytest.raises(sf.SaefeatError):
        result.totals(per="prompts")


@pytest.mark.parametrize("k", [0, -1])
def test_top_of_nothing(result, k):
    with pytest.raises(sf.errors.LatentError, match="at least 1"):
        result.top(k)


def test_attribute_then_ablate_then_probe_is_a_loop():
    """The sign: latents that score highest move the metric toward the baseline when ablated."""
    model, batch = build("llama"), batch_of()
    nn = wrapped(model)
    sae = make_sae(layer=2)
    scores = sf.Attribute(sae, METRIC, method=sf.IG(8, "gauss"))(nn, batch)
    top = scores.top(5)
    out = sf.run(nn, batch, sf.Ablate(top) | sf.Probe(top))
    moved = (score_metric(out.logits) - scores.clean).mean()
    keys, values, _ = scores.totals()
    low = sae.latents(keys[values.argsort()[:5], 1])
    down = (score_metric(sf.run(nn, batch, sf.Ablate(low)).logits) - scores.clean).mean()
    assert moved > 0 > down


def test_a_baseline_that_never_acts():
    """A baseline that selects no token gives all-zero scores, which read as 'no effect'."""
    start = sf.Ablate(make_sae(), where=sf.Tokens.ids(99))
    with pytest.raises(sf.errors.FiringError):
        sf.Attribute(make_sae(), METRIC, baseline=start)(wrapped(build("llama")), RAGGED)


def test_the_zero_run_leaves_tokens_that_are_not_scored():
    """BOS that the SAE excludes keeps its latents; the same as ablating them."""
    nn, prompts = wrapped(build("llama")), [[2, 10, 11, 12], [2, 10, 13, 14, 15], [2, 20, 21]]
    for sae, where in ((make_sae(excluded=(2,)), None), (make_sae(), sf.Tokens.last(1))):
        zero = sf.Attribute(sae, METRIC, where=where)(nn, prompts)
        run = sf.Attribute(sae, METRIC, baseline=sf.Ablate(sae, where=where))(nn, prompts)
        torch.testing.assert_close(zero.baseline, run.baseline, atol=1e-5, rtol=1e-4)


def test_the_error_term_is_attributed_against_a_run():
    """Its activation is always 1, but its direction moves: (e' − e) · gradient."""
    nn, sae = wrapped(build("llama")), make_sae()
    start = sf.Clamp(sf.Direction(unit(3), site="resid_post.1"), add=2.0)
    steps = sf.IG(24, "gauss")
    latents = sf.Attribute(sae, METRIC, baseline=start, method=steps)(nn, RAGGED)
    error = sf.Attribute(sae.error(), METRIC, baseline=start, method=steps)(nn, RAGGED)
    total = torch.zeros(3)
    for scores in (latents, error):
        total = total.index_add(0, scores.prompt, scores.score)
    assert error.score.abs().max() > 1e-3
    change = latents.baseline - latents.clean
    torch.testing.assert_close(total, change, atol=1e-4, rtol=1e-3)


def test_a_baseline_fires_over_the_data_set_not_in_every_batch():
    nn, v = wrapped(build("llama")), sf.Direction(unit(3), site="resid_post.0")
    token = sf.text.prompts.encode_prompts(nn.tokenizer, RAGGED)["input_ids"][0, -1].item()
    start = sf.Ablate(v, where=sf.Tokens.ids(int(token)))
    whole = sf.Attribute(make_sae(), METRIC, baseline=start)(nn, RAGGED)
    single = sf.Attribute(make_sae(), METRIC, baseline=start)(nn, RAGGED, batch_size=1)
    torch.testing.assert_close(whole.baseline, single.baseline, atol=1e-5, rtol=1e-4)
