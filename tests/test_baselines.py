"""Baselines: fixed values, another prompt, and the published endpoint, against plain formulas."""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import PAD, RAGGED, batch_of, build, forward, make_sae, tokenizer, unit, wrapped
from test_attribution import close, dense, grab, run_with, score_metric

F64 = torch.float64
METRIC = sf.logit_diff([5, 9], 7)
SITES = [sf.Site("resid_post", 0), sf.Site("resid_post", 2)]


def two_saes(dtype=F64):
    return sf.dictionaries.Dictionaries(
        [make_sae(layer=0, dtype=dtype), make_sae("jumprelu", layer=2, seed=3, dtype=dtype)]
    )


def slopes_at(model, batch, ends: dict, alpha: float) -> dict:
    """∂m/∂x at each site moved a share of the way to its end, gradients passing through."""
    leaves = {}

    def moved(x, site):
        leaves[site] = torch.lerp(x, ends[site], alpha).detach().requires_grad_()
        return leaves[site] + (x - x.detach())

    hooks = {site: lambda x, site=site: moved(x, site) for site in ends}
    total = score_metric(run_with(model, batch, hooks)).sum()
    return dict(zip(ends, torch.autograd.grad(total, [leaves[s] for s in ends]), strict=True))


def masked(batch):
    return batch["attention_mask"].bool()[..., None]


# ---------------------------------------------------------------- fixed values


@pytest.mark.parametrize("method", [sf.attribution.AtP(), sf.IG(3, "midpoint")], ids=repr)
def test_latents_at_their_means(method):
    model, batch, saes = build("llama", F64), batch_of(), two_saes()
    means = sf.run(wrapped(model), batch, sf.Probe(saes)).readings[0].mean()
    start = sf.attribution.Fixed(saes.latents(), means)
    scores = sf.Attribute(saes, METRIC, baseline=start, method=method)(wrapped(model), batch)
    clean = grab(model, batch, SITES)
    ends, goals = {}, {}
    for n, (site, sae) in enumerate(saes.items()):
        goals[site] = means[n * 48 : (n + 1) * 48].to(F64) - sae.encode(clean[site])
        ends[site] = clean[site] + (goals[site] @ sae.directions().to(F64)) * masked(batch)
    wanted = {site: 0.0 for site in SITES}
    for alpha, weight in method.nodes():
        slopes = slopes_at(model, batch, ends, alpha)
        for site in SITES:
            wanted[site] = wanted[site] + weight * slopes[site] @ saes[site].directions().to(F64).T
    close(dense(scores, batch), [goals[s] * wanted[s] * masked(batch) for s in SITES])
    base = score_metric(run_with(model, batch, {s: lambda x, s=s: ends[s] for s in SITES}))
    torch.testing.assert_close(scores.baseline, base.float(), atol=1e-5, rtol=1e-5)


def test_zero_values_are_the_zero_baseline():
    nn, saes = wrapped(build("llama")), two_saes(torch.float32)
    for layer_norm in (False, True):
        if layer_norm:
            saes = sf.dictionaries.Dictionaries([make_sae("jumprelu", layer=1, norm="layer_norm")])
        zero = sf.Attribute(saes, METRIC, method=sf.IG(3))(nn, RAGGED)
        fixed = sf.Attribute(
            saes, METRIC, baseline=sf.attribution.Fixed(saes, 0.0), method=sf.IG(3)
        )(nn, RAGGED)
        assert torch.equal(zero.score, fixed.score) and torch.equal(zero.baseline, fixed.baseline)


def test_values_that_differ_by_prompt():
    nn, sae = wrapped(build("llama")), make_sae()
    chosen = sae.latents([40, 3, 17])
    values = torch.randn(3, 3)
    job = sf.Attribute(chosen, METRIC, baseline=sf.attribution.Fixed(chosen, values))
    scores = job(nn, RAGGED, batch_size=2)
    activations = scores.activation + scores.change
    order = [chosen.parts[0][1].index(i) for i in scores.latent.tolist()]
    torch.testing.assert_close(activations, values[scores.prompt, order], atol=1e-5, rtol=1e-5)
    for number in range(3):
        one = sf.Attribute(chosen, METRIC, baseline=sf.attribution.Fixed(chosen, values[number]))
        alone = one(nn, [RAGGED[number]])
        torch.testing.assert_close(
            alone.score, scores.score[scores.prompt == number], atol=1e-6, rtol=1e-4
        )


def test_values_that_are_missing_or_wrong():
    nn, sae = wrapped(build("llama")), make_sae()
    with pytest.raises(sf.errors.LatentError, match="latent 4 "):
        sf.Attribute(
            sae.latents([3, 4]), METRIC, baseline=sf.attribution.Fixed(sae.latents([3]), 1.0)
        )(nn, RAGGED)
    with pytest.raises(sf.errors.LatentError, match="loaded again"):
        sf.Attribute(sae, METRIC, baseline=sf.attribution.Fixed(make_sae(), 1.0))(nn, RAGGED)
    for wrong in (torch.nan, torch.ones(4), torch.ones(2, 2, 2)):
        with pytest.raises(sf.errors.LatentError, match="values"):
            sf.attribution.Fixed(sae.latents([3, 4]), wrong)
    two = sf.attribution.Fixed(sae.latents([3, 4]), torch.ones(2, 2))
    with pytest.raises(sf.errors.PromptError, match="made for 2 prompts"):
        sf.Attribute(sae.latents([3, 4]), METRIC, baseline=two)(nn, RAGGED)


# ---------------------------------------------------------------- another prompt


CLEAN = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w10 w11 w12 w13"]
SAME = ["w1 w20 w3", "w21 w5 w22 w7 w8 w30", "w10 w11 w31 w13"]
OTHER = ["w1 w20 w3 w4 w5", "w21 w5 w22 w7", "w10 w31 w12 w13"]


def by_hand(model, saes, method, clean_prompt, other, meets):
    """One pair alone, unpadded: scores [t, d_sae] a site; ``meets[p]`` is p's counterpart."""
    batch, corrupt = batch_of([clean_prompt]), batch_of([other])
    clean, base = grab(model, batch, SITES), grab(model, corrupt, SITES)
    ends = {}
    for site in SITES:
        ends[site] = clean[site].clone()
        for here, there in enumerate(meets):
            if there is not None:
                ends[site][:, here] = base[site][:, there]
    total = {site: 0.0 for site in SITES}
    for alpha, weight in method.nodes():
        slopes = slopes_at(model, batch, ends, alpha)
        for site in SITES:
            total[site] = total[site] + weight * slopes[site] @ saes[site].directions().to(F64).T
    moves = {s: saes[s].encode(ends[s]) - saes[s].encode(clean[s]) for s in SITES}
    found = [(moves[s] * total[s])[0] for s in SITES]
    return found, score_metric(forward(model, corrupt)[:, -1])


def agree(scores, row, wanted, length):
    batch = batch_of(CLEAN)
    for found, table in zip(dense(scores, batch), wanted, strict=True):
        torch.testing.assert_close(found[row, -length:], table, atol=1e-5, rtol=1e-5)
        assert table.abs().max() > 1e-4


@pytest.mark.parametrize("method", [sf.attribution.AtP(), sf.IG(3, "midpoint")], ids=repr)
def test_pairs_of_one_length_meet_position_by_position(method):
    model, saes = build("llama", F64), two_saes()
    job = sf.Attribute(saes, METRIC, baseline=sf.attribution.Paired(SAME), method=method)
    scores = job(wrapped(model), CLEAN, batch_size=2)
    for row, (prompt, other) in enumerate(zip(CLEAN, SAME, strict=True)):
        length = len(prompt.split())
        wanted, base = by_hand(model, saes, method, prompt, other, range(length))
        agree(scores, row, wanted, length)
        torch.testing.assert_close(scores.baseline[row], base[0].float(), atol=1e-5, rtol=1e-5)


def test_aligned_at_the_end():
    model, saes = build("llama", F64), two_saes()
    start = sf.attribution.Paired(OTHER, align="end")
    job = sf.Attribute(saes, METRIC, baseline=start, where=sf.Tokens.last(3), method=sf.IG(2))
    scores = job(wrapped(model), CLEAN, batch_size=2)
    meets = [[2, 3, 4], [None, None, 0, 1, 2, 3], [0, 1, 2, 3]]
    for row, (prompt, other) in enumerate(zip(CLEAN, OTHER, strict=True)):
        wanted, base = by_hand(model, saes, sf.IG(2), prompt, other, meets[row])
        agree(scores, row, [table[-3:] for table in wanted], 3)
        torch.testing.assert_close(scores.baseline[row], base[0].float(), atol=1e-5, rtol=1e-5)


def test_a_map_of_positions():
    """None stays as it is, and is not scored."""
    model, saes = build("llama", F64), two_saes()
    maps = [[0, 4, 3], [1, None, 0, 2, None, 3], [3, 2, 1, 0]]
    job = sf.Attribute(
        saes, METRIC, baseline=sf.attribution.Paired(OTHER, align=maps), method=sf.IG(2)
    )
    scores = job(wrapped(model), CLEAN, batch_size=2)
    assert scores.tokens.tolist() == [3, 4, 4]
    for row, (prompt, other) in enumerate(zip(CLEAN, OTHER, strict=True)):
        wanted, _ = by_hand(model, saes, sf.IG(2), prompt, other, maps[row])
        agree(scores, row, wanted, len(maps[row]))


def test_pairs_with_a_continuation():
    """What continues a prompt meets what continues the other."""
    model, sae = build("llama", F64), make_sae(layer=0, dtype=F64)
    metric = sf.metrics.log_prob(sf.metrics.PerPrompt([[5, 9, 4], [7], [30, 31]]))
    job = sf.Attribute(sae, metric, baseline=sf.attribution.Paired(SAME), where=sf.Tokens.all())
    scores = job(wrapped(model), CLEAN)
    torch.testing.assert_close(scores.baseline, sf.metrics.measure(wrapped(model), SAME, metric))
    ids = [
        [tokenizer()(p)["input_ids"] + more for p, more in zip(ps, ([5, 9], [], [30]), strict=True)]
        for ps in (CLEAN, SAME)
    ]
    clean, other = (batch_of(rows) for rows in ids)
    site = SITES[0]
    moves = sae.encode(grab(model, other, [site])[site]) - sae.encode(
        grab(model, clean, [site])[site]
    )
    found = dense(scores, clean, "change")[0]
    torch.testing.assert_close(found, moves * masked(clean), atol=1e-5, rtol=1e-5)


def test_pairs_that_cannot_be_aligned():
    nn, sae = wrapped(build("llama")), make_sae()

    def attribute(baseline, **options):
        return sf.Attribute(sae, METRIC, baseline=baseline, **options)(nn, CLEAN, batch_size=2)

    with pytest.raises(sf.errors.PromptError, match="pair 0: 3 tokens, and 5"):
        attribute(sf.attribution.Paired(OTHER))
    with pytest.raises(sf.errors.PromptError, match="pair 2: 4 tokens, and 2"):
        attribute(sf.attribution.Paired([*SAME[:2], "w1 w2"]))
    with pytest.raises(sf.errors.PromptError, match="2 scored tokens of prompt 1"):
        attribute(sf.attribution.Paired(OTHER, align="end"))
    with pytest.raises(sf.errors.PromptError, match="2 prompts"):
        attribute(sf.attribution.Paired(SAME[:2]))
    with pytest.raises(sf.errors.PromptError, match="'start'"):
        attribute(sf.attribution.Paired(OTHER, align="start"))
    for wrong in ([[0, 1, 2]], [[0, 1], [0] * 6, [0] * 4], [[0, 1, 5], [0] * 6, [0] * 4]):
        with pytest.raises(sf.errors.PromptError, match="align"):
            attribute(sf.attribution.Paired(OTHER, align=wrong))
    assert PAD == 0


# ---------------------------------------------------------------- the published endpoint


def published(model, batch, saes, v, steps):
    """The refusal paper's formula, written as its code has it: latents and errors blended.

    A hook encodes what *this pass* has at its site, moved upstream already, and blends its latents
    and its error with the corrupt run's. The error of the corrupt run is stored as
    z_before_ablation − decode(f(z_after)).
    """
    sites = list(saes)
    clean, before, after = grab(model, batch, sites), {}, {}

    def ablated(site):
        def run(z):
            before[site] = z.detach().clone()
            after[site] = z - (z @ v)[..., None] * v
            return after[site]

        return run

    with torch.no_grad():
        run_with(model, batch, {site: ablated(site) for site in sites})
    f_clean = {s: saes[s].encode(clean[s]) for s in sites}
    f_corrupt = {s: saes[s].encode(after[s]) for s in sites}
    e_corrupt = {s: before[s] - saes[s].reconstruct(after[s]) for s in sites}
    total = {s: 0.0 for s in sites}
    for k in range(steps):
        alpha, leaves = k / steps, {}

        def splice(z, s, alpha=alpha, leaves=leaves):
            inside = z.detach()
            f = saes[s].encode(inside)
            error = inside - saes[s].reconstruct(inside)
            leaf = ((1 - alpha) * f + alpha * f_corrupt[s]).requires_grad_()
            rest = saes[s].reconstruct(inside) - f @ saes[s].directions().to(F64)  # b_dec
            error = (1 - alpha) * error + alpha * e_corrupt[s]
            leaves[s] = leaf
            # gradients pass through
            return leaf @ saes[s].directions().to(F64) + rest + error + (z - inside)

        hooks = {s: lambda z, s=s, splice=splice: splice(z, s) for s in sites}
        value = score_metric(run_with(model, batch, hooks)).sum()
        slopes = torch.autograd.grad(value, [leaves[s] for s in sites])
        for s, slope in zip(sites, slopes, strict=True):
            total[s] = total[s] + slope / steps
    return [((f_corrupt[s] - f_clean[s]) * total[s] * masked(batch)).detach() for s in sites]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_published_endpoint(family):
    model, batch, v = build(family, F64), batch_of(), unit(9).to(F64)
    saes = sf.dictionaries.Dictionaries(
        make_sae(a, layer=layer, seed=layer, dtype=F64)
        for layer, a in enumerate(["standard", "jumprelu", "gated"])
    )
    steering = sf.Ablate(
        sf.Direction.at_sites(v, sites=[f"resid_post.{layer}" for layer in range(3)])
    )

    def attribute(**how):
        method = sf.IG(steps=5, **how)
        return dense(
            sf.Attribute(saes, METRIC, baseline=steering, method=method)(wrapped(model), batch),
            batch,
        )

    wanted = published(model, batch, saes, v, 5)
    close(attribute(endpoint="as_published"), wanted)
    corrected = attribute()
    different = max((a - b).abs().max() for a, b in zip(corrected, wanted, strict=True))
    assert different > 1e-3, "the two ends differ, or the switch would not be tested"


def test_the_published_endpoint_needs_an_intervention():
    sae = make_sae()
    for start in (None, sf.attribution.Fixed(sae, 0.0), sf.attribution.Paired(SAME)):
        with pytest.raises(sf.SaefeatError, match="intervention"):
            sf.Attribute(sae, METRIC, start, sf.IG(2, endpoint="as_published"))
    with pytest.raises(sf.SaefeatError, match="as_published"):
        sf.IG(2, endpoint="published")
    assert repr(sf.IG(2)) == "IG(steps=2, rule='left')"
    assert eval(repr(sf.IG(2, endpoint="as_published")), {"IG": sf.IG}).endpoint == "as_published"


def test_the_baselines_own_tokens_for_others_to_check_against():
    """``BASELINE_TOP`` resolved outside an attribution, as audits need it."""
    from saefeat.attribution.path import baseline_logits

    nn, sae = wrapped(build("llama")), make_sae()
    starts = (
        None,
        sf.attribution.Fixed(sae, 2.0),
        sf.attribution.Paired(SAME),
        sf.Ablate(sae, where=sf.Tokens.last(1)),
    )
    for start in starts:
        job = sf.Attribute(sae, sf.metrics.logit(sf.metrics.BASELINE_TOP), start)
        logits = torch.cat(list(baseline_logits(job.job, nn, CLEAN, batch_size=2)))
        top = logits.argmax(-1)
        scores = job(nn, CLEAN)
        again = sf.Attribute(sae, sf.metrics.logit(sf.metrics.PerPrompt(top.tolist())), start)(
            nn, CLEAN
        )
        torch.testing.assert_close(scores.score, again.score)
