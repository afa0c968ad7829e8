"""Methods: exact moves, finite differences, steps side by side, one site at a time, captum."""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import (
    ARCHITECTURES,
    RAGGED,
    TRANSCODERS,
    D,
    batch_of,
    build,
    make_sae,
    unit,
    watch,
    wrapped,
)
from test_attribution import close, dense, grab, run_with, score_metric

F64 = torch.float64
METRIC = sf.logit_diff([5, 9], 7)


def steering():
    return sf.Ablate(
        sf.Direction.at_sites(unit(9), sites=["resid_pre.0", "resid_post.1", "resid_post.2"])
    )


def sums(scores, dictionary=0) -> torch.Tensor:
    """[prompts, d_sae]: scores summed over tokens."""
    found = torch.zeros(len(scores.tokens), scores.dictionaries[dictionary].d_sae)
    rows = scores.dictionary == dictionary
    return found.index_put_(
        (scores.prompt[rows], scores.latent[rows]), scores.score[rows], accumulate=True
    )


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *TRANSCODERS])
def test_exact_is_ablating_each_latent(architecture):
    """Against run(Ablate(latent)), one latent and one run at a time."""
    nn, sae = wrapped(build("llama")), make_sae(architecture)
    chosen = sae.latents(range(0, 48, 5))
    scores = sf.Attribute(chosen, METRIC, method=sf.attribution.Exact())(nn, RAGGED, batch_size=2)
    assert (scores.position == -1).all() and len(scores) > 10
    found = sums(scores)
    clean = score_metric(sf.run(nn, RAGGED).logits)
    for one in chosen.singles():
        (_, index) = next(iter(one))
        edited = score_metric(sf.run(nn, RAGGED, sf.Ablate(one)).logits)
        torch.testing.assert_close(found[:, index], edited - clean, atol=2e-5, rtol=1e-4)
    assert found.abs().max() > 1e-2


def test_exact_by_token_and_where():
    """One token at a time, against a hook that moves that token alone."""
    model, batch = build("gpt2", F64), batch_of()
    sae, where = make_sae(dtype=F64), sf.Tokens.last(2)
    job = sf.Attribute(sae, METRIC, method=sf.attribution.Exact(per="token"), where=where)
    scores = job(wrapped(model), batch, batch_size=2)
    site = sae.site
    f = sae.encode(grab(model, batch, [site])[site])
    clean = score_metric(run_with(model, batch, {}))
    assert (f[:, -2:] != 0).sum() == len(scores)
    for n in torch.randperm(len(scores))[:20].tolist():
        row, latent = int(scores.prompt[n]), int(scores.latent[n])
        column = int(scores.position[n]) + 6 - [3, 6, 4][row]

        def edit(x, row=row, latent=latent, column=column):
            x = x.clone()
            x[row, column] -= f[row, column, latent] * sae.directions([latent])[0]
            return x

        moved = score_metric(run_with(model, batch, {site: edit}))
        assert scores.score[n].item() == pytest.approx((moved - clean)[row].item(), abs=1e-6)
        assert scores.activation[n].item() == pytest.approx(f[row, column, latent].item())


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_exact_moves_to_the_baseline(norm):
    """Towards an intervention's values; where directions carry a scale, from one to the other."""
    model, batch = build("llama", F64), batch_of()
    sae = make_sae("jumprelu", norm=norm, dtype=F64)
    chosen = sae.latents(range(0, 48, 4))
    start = steering()
    scores = sf.Attribute(chosen, METRIC, baseline=start, method=sf.attribution.Exact())(
        wrapped(model), batch
    )
    site = sae.site
    clean, base = grab(model, batch, [site])[site], grab(model, batch, [site], start)[site]
    f, g = sae.encode(clean), sae.encode(base)
    scale = [x.std(-1, keepdim=True) if norm == "layer_norm" else 1.0 for x in (clean, base)]
    real = batch["attention_mask"].bool()[..., None]
    before = score_metric(run_with(model, batch, {}))
    found = sums(scores)
    for _, latent in chosen:
        step = (g[..., latent, None] * scale[1] - f[..., latent, None] * scale[0]) * real
        moved = clean + step * sae.directions([latent])[0].to(F64)
        after = score_metric(run_with(model, batch, {site: lambda _, moved=moved: moved}))
        torch.testing.assert_close(found[:, latent], (after - before).float(), atol=1e-5, rtol=1e-4)
    assert found.abs().max() > 1e-3


def test_finite_differences_are_atp_without_gradients():
    nn = wrapped(build("gpt2", F64))  # llama's norms compute in float32 whatever they are given
    saes = sf.dictionaries.Dictionaries(
        [make_sae(layer=0, dtype=F64), make_sae("topk", layer=2, dtype=F64)]
    )
    atp = sf.Attribute(saes, METRIC, baseline=steering())(nn, RAGGED)
    with torch.no_grad():  # no gradient is needed
        tokens = sf.attribution.FiniteDifference(1e-3, per="token")
        by_token = sf.Attribute(saes, METRIC, baseline=steering(), method=tokens)(nn, RAGGED)
        whole = sf.Attribute(
            saes, METRIC, baseline=steering(), method=sf.attribution.FiniteDifference(1e-3)
        )(nn, RAGGED)
    close(dense(by_token, batch_of()), dense(atp, batch_of()), 1e-5)
    for n in range(2):
        torch.testing.assert_close(sums(whole, n), sums(atp, n), atol=1e-5, rtol=1e-4)


def test_exact_of_metrics_and_rows():
    """Targets by prompt, continuations, divergences: every metric that runs can be exact."""
    nn, sae = wrapped(build("llama")), make_sae()
    chosen = sae.latents(range(0, 48, 6))
    for metric in (
        sf.metrics.logit(sf.metrics.PerPrompt([5, 9, 13])),
        sf.metrics.log_prob(sf.metrics.PerPrompt([[5, 9, 4], [7], [30, 31]])),
        sf.metrics.kl(),
    ):
        found = sums(sf.Attribute(chosen, metric, method=sf.attribution.Exact())(nn, RAGGED))
        clean = sf.metrics.measure(nn, RAGGED, metric)
        for one in chosen.singles():
            (_, index) = next(iter(one))
            edit = sf.Ablate(one, where=sf.Tokens.prompt())
            moved = sf.metrics.measure(nn, RAGGED, metric, edit)
            torch.testing.assert_close(found[:, index], moved - clean, atol=2e-5, rtol=1e-3)


def test_exact_refuses_whole_dictionaries_and_what_needs_gradients():
    nn, sae = wrapped(build("llama")), make_sae()
    with pytest.raises(sf.errors.LatentError, match="limit=48"):
        sf.Attribute(sae, METRIC, method=sf.attribution.Exact(limit=47))(nn, RAGGED)
    for how in (
        {"semantics": "through_sae"},
        {"backward": sf.attribution.RelP()},
        {"one_site": True},
    ):
        with pytest.raises(sf.SaefeatError, match="takes gradients"):
            sf.Attribute(sae, METRIC, method=sf.attribution.Exact(), **how)
    for wrong in (
        lambda: sf.attribution.Exact(per="prompt"),
        lambda: sf.attribution.Exact(limit=0),
        lambda: sf.attribution.FiniteDifference(0.0),
    ):
        with pytest.raises(sf.SaefeatError, match="latent"):
            wrong()


# ---------------------------------------------------------------- steps side by side


@pytest.mark.parametrize("baseline", ["zero", "steering"])
@pytest.mark.parametrize("method", [sf.IG(5), sf.IG(4, "gauss")], ids=repr)
def test_steps_share_passes_without_a_difference(method, baseline):
    nn, batch = wrapped(build("gemma3_text", F64)), batch_of()
    saes = sf.dictionaries.Dictionaries(
        [make_sae(layer=0, dtype=F64), make_sae("transcoder", dtype=F64)]
    )
    start = None if baseline == "zero" else steering()
    job = sf.Attribute(saes, METRIC, baseline=start, method=method)
    one = job(nn, batch, steps_at_once=1)
    for count in ("auto", 2, 3, 50):
        many = job(nn, batch, steps_at_once=count)
        for ours, theirs in zip(dense(many, batch), dense(one, batch), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_how_many_steps_share_a_pass():
    model, rows = build("llama"), []
    model.model.layers[0].register_forward_hook(lambda m, a, out: rows.append(len(out)))
    job = sf.Attribute(make_sae(), METRIC, method=sf.IG(8))
    # the clean run, the steps, and the baseline's own run, not beside the clean run's graph
    for count, wanted in ((1, [3] * 9), (3, [3, 9, 9, 3, 3]), ("auto", [3, 21, 3])):
        rows.clear()
        job(wrapped(model), RAGGED, steps_at_once=count)
        assert rows == wanted
    rows.clear()  # a metric that asks for the baseline run's tokens must have it first
    top = sf.Attribute(make_sae(), sf.logit_diff(sf.metrics.BASELINE_TOP, 7), method=sf.IG(8))
    top(wrapped(model), RAGGED, steps_at_once=3)
    assert rows == [3, 3, 9, 9, 3]
    for wrong in (0, "all", 1.5):
        with pytest.raises(sf.SaefeatError, match="auto"):
            job(wrapped(model), RAGGED, steps_at_once=wrong)


# ---------------------------------------------------------------- one site at a time


@pytest.mark.parametrize("baseline", ["zero", "steering"])
def test_each_site_on_a_path_of_its_own_is_complete(baseline):
    """Neurons explain everything: each site's scores sum to the change it makes alone."""
    model, batch = build("llama", F64), batch_of()
    sites = [f"resid_post.{layer}" for layer in (0, 2)] + ["mlp_out.1"]
    neurons = sf.dictionaries.Dictionaries(sf.Neurons(site, D) for site in sites)
    start = steering() if baseline == "steering" else sf.attribution.Fixed(neurons, 0.2)
    job = sf.Attribute(neurons, METRIC, start, sf.IG(32, "gauss"), one_site=True)
    scores = job(wrapped(model), batch)
    assert scores.gap_by_site.abs().max() < 1e-4
    change = scores.ends - scores.clean[:, None]
    assert change.abs().amin(0).max() > 1e-2
    clean = grab(model, batch, list(neurons))
    ends = grab(model, batch, list(neurons), start) if baseline == "steering" else None
    for n, site in enumerate(neurons):
        end = torch.full_like(clean[site], 0.2) if ends is None else ends[site]
        if ends is None:
            end = torch.where(batch["attention_mask"].bool()[..., None], end, clean[site])
        alone = score_metric(run_with(model, batch, {site: lambda _, end=end: end}))
        torch.testing.assert_close(scores.ends[:, n], alone.float(), atol=1e-5, rtol=1e-4)
    together = sf.Attribute(neurons, METRIC, start, sf.IG(32, "gauss"))(wrapped(model), batch)
    assert together.gap.abs().max() > 1e-2, "on one path the sum overcounts"
    with pytest.raises(sf.SaefeatError, match="one_site"):
        _ = together.gap_by_site


def test_one_site_is_that_site_attributed_alone():
    nn, batch = wrapped(build("llama", F64)), batch_of()
    saes = sf.dictionaries.Dictionaries(
        [make_sae(layer=0, dtype=F64), make_sae("topk", layer=2, dtype=F64)]
    )
    for method in (sf.IG(4), sf.IG(3, "gauss")):
        both = sf.Attribute(saes, METRIC, method=method, one_site=True)(nn, batch, batch_size=2)
        for n, sae in enumerate(saes.values()):
            alone = sf.Attribute(sae, METRIC, method=method)(nn, batch)
            close(dense(both, batch)[n : n + 1], dense(alone, batch))
            torch.testing.assert_close(both.ends[:, n], alone.baseline, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- keeping the largest


@pytest.mark.parametrize("keep", [1, 4, 1000])
def test_keep_the_largest_of_each_token(keep, monkeypatch):
    import saefeat.attribution.pairs as module

    nn, batch = wrapped(build("llama", F64)), batch_of()
    saes = sf.dictionaries.Dictionaries(
        [make_sae(layer=0, dtype=F64), make_sae("topk", layer=2, dtype=F64)]
    )
    every = sf.Attribute(saes, METRIC, method=sf.IG(2))(nn, batch)
    monkeypatch.setattr(module, "CHUNK", 10)
    monkeypatch.setattr(module, "TOKENS", 4)
    kept = sf.Attribute(saes, METRIC, method=sf.IG(2), keep=keep)(nn, batch)
    left = torch.zeros(3, 2, dtype=F64)
    for ours, whole in zip(dense(kept, batch), dense(every, batch), strict=True):
        size = whole.abs()
        least = size.topk(min(keep, size.shape[-1]), -1).values[..., -1:]
        wanted = torch.where(size >= least, whole, 0.0)
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)
        rest = whole - wanted
        left += torch.stack([rest.sum((1, 2)), rest.abs().sum((1, 2))], 1)
    torch.testing.assert_close(kept.dropped, left.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kept.gap, every.gap, atol=1e-5, rtol=1e-4)
    assert ("dropped" in repr(kept)) == (keep < 1000) and every.dropped is None
    for wrong in (0, -1, 2.5):
        with pytest.raises(sf.SaefeatError, match="keep"):
            sf.Attribute(saes, METRIC, keep=wrong)


# ---------------------------------------------------------------- stopping and going on


class Stop(Exception):
    pass


def test_an_interrupted_attribution_goes_on(tmp_path):
    model = build("llama")
    nn, sae = wrapped(model), make_sae()
    prompts = [*RAGGED, "w5 w6", "w7 w8 w9"]
    job = sf.Attribute(sae, METRIC, steering(), sf.IG(3), one_site=True, keep=5)
    whole = job(nn, prompts, batch_size=2)
    passes = []

    def stop(*_):
        passes.append(1)
        if len(passes) > 8:
            raise Stop

    handle = watch(model.model.layers[0], stop)
    with pytest.raises(Stop):
        job(nn, prompts, batch_size=2, steps_at_once=1, checkpoint=tmp_path / "job")
    handle.remove()
    handle = watch(model.model.layers[0], lambda *_: passes.append(1))
    passes.clear()
    again = job(nn, prompts, batch_size=2, steps_at_once=1, checkpoint=tmp_path / "job")
    needed = len(passes)
    handle.remove()
    for name in ("prompt", "position", "latent", "score", "clean", "baseline", "ends", "dropped"):
        torch.testing.assert_close(getattr(again, name), getattr(whole, name), atol=1e-6, rtol=1e-4)
    assert needed == 2 * 5, "the first batch is not run again"
    passes.clear()
    last = job(nn, prompts, batch_size=2, checkpoint=tmp_path / "job")
    assert torch.equal(last.score, again.score)


def test_a_checkpoint_belongs_to_one_call(tmp_path):
    nn, sae = wrapped(build("llama")), make_sae()
    sf.Attribute(sae, METRIC)(nn, RAGGED, checkpoint=tmp_path)
    others = {
        "method": (sf.Attribute(sae, METRIC, method=sf.IG(2)), RAGGED),
        "metric": (sf.Attribute(sae, sf.metrics.logit(5)), RAGGED),
        "baseline": (sf.Attribute(sae, METRIC, sf.attribution.Fixed(sae, 0.1)), RAGGED),
        "target": (sf.Attribute(sae.latents([1, 2]), METRIC), RAGGED),
        "keep": (sf.Attribute(sae, METRIC, keep=3), RAGGED),
        "prompts": (sf.Attribute(sae, METRIC), RAGGED[:2]),
    }
    for name, (job, prompts) in others.items():
        with pytest.raises(sf.errors.CheckpointError, match=name):
            job(nn, prompts, checkpoint=tmp_path)
    with pytest.raises(sf.errors.CheckpointError, match="batch_size"):
        sf.Attribute(sae, METRIC)(nn, RAGGED, batch_size=2, checkpoint=tmp_path)


# ---------------------------------------------------------------- errors


def test_models_without_gradients():
    nn = wrapped(build("llama"))
    job = sf.Attribute(make_sae(), METRIC)
    with torch.inference_mode():
        loaded = wrapped(build("llama"))
    with pytest.raises(sf.errors.GradientError, match=r"inference_mode\(\)"):
        job(loaded, RAGGED)
    nn._module.to("meta")
    with pytest.raises(sf.errors.GradientError, match="FiniteDifference"):
        job(nn, RAGGED)


def test_a_metric_that_is_not_finite():
    nn = wrapped(build("llama"))
    bad = sf.metrics.custom(lambda logits: logits[:, 5] / (logits[:, 5] - logits[:, 5]))
    with pytest.raises(sf.errors.GradientError, match="finite"):
        sf.Attribute(make_sae(), bad)(nn, RAGGED)


def test_repr_is_the_call():
    sae = make_sae()
    job = sf.Attribute(
        sae.latents([1]), METRIC, method=sf.attribution.Exact(limit=5), where=sf.Tokens.last(1)
    )
    assert "method=Exact(per='latent', limit=5)" in repr(job)
    assert repr(sf.attribution.Paired(["w1"], align="end")) == "Paired(['w1'], align='end')"


# ---------------------------------------------------------------- captum


@pytest.mark.parametrize("rule", ["left", "gauss"])
def test_captums_integrated_gradients_on_one_site(rule):
    """Captum attributes coordinates of the site's value; ours are the neurons' scores."""
    attr = pytest.importorskip("captum.attr")
    model, batch = build("llama", F64), batch_of()
    site, start = sf.Site("resid_post", 1), steering()
    neurons = sf.Neurons(site, D)
    scores = sf.Attribute(neurons, METRIC, start, sf.IG(16, rule))(wrapped(model), batch)
    clean, base = grab(model, batch, [site])[site], grab(model, batch, [site], start)[site]

    def forward(x):
        copies = len(x) // 3
        many = {name: tensor.repeat(copies, 1) for name, tensor in batch.items()}
        return score_metric(run_with(model, many, {site: lambda _: x}))

    methods = {"left": "riemann_left", "gauss": "gausslegendre"}
    wanted = attr.IntegratedGradients(forward).attribute(
        clean, base, n_steps=16, method=methods[rule]
    )
    # captum's path runs from baseline to input: its left end is our right one
    if rule == "left":
        wanted = attr.IntegratedGradients(forward).attribute(
            base, clean, n_steps=16, method=methods[rule]
        )
        wanted = -wanted
    close(dense(scores, batch), [-wanted.detach() * batch["attention_mask"][..., None]])


def test_a_path_moves_resid_mid_by_a_constant():
    """Its way to the baseline held the block's input with its graph: an earlier site's gradient
    lost that share of the residual stream (scores of .23 for .36)."""
    model = build("llama", torch.float64)
    early, late = sf.Neurons("resid_pre.1", D), sf.Direction(unit(), site="resid_mid.1")
    chosen = early.latents([3, 8]) | late.latents()
    method = sf.IG(1, "midpoint")
    found = sf.Attribute(chosen, sf.metrics.logit(7), method=method)(wrapped(model), [[5, 9, 6]])
    block, seen = model.model.layers[1], {}

    def move_input(_, args):
        x, zero = args[0], args[0].clone()
        zero[..., [3, 8]] = 0.0
        seen["x"], seen["leaf"] = x, torch.lerp(x, zero, 0.5).detach().requires_grad_()
        return (seen["leaf"], *args[1:])

    def move_middle(_, __, out):
        clean = seen["clean"]
        end = clean - (clean @ unit().double())[..., None] * unit().double()
        return out[0] + 0.5 * (end - (out[0] + seen["leaf"])).detach(), *out[1:]

    def keep_middle(_, __, out):
        seen["clean"] = out[0] + seen["input"]

    def keep_input(_, args):
        seen["input"] = args[0]

    ids = torch.tensor([[5, 9, 6]])
    for before, after in ((keep_input, keep_middle), (move_input, move_middle)):
        handles = [
            block.register_forward_pre_hook(before),
            block.self_attn.register_forward_hook(after),
        ]
        logits = model(ids).logits
        for handle in handles:
            handle.remove()
    (slope,) = torch.autograd.grad(logits[0, -1, 7], seen["leaf"])
    wanted = (-seen["x"] * slope)[0][:, [3, 8]].detach()
    mine = found.dictionary == 0
    scores = torch.zeros(3, D, dtype=torch.float64)
    scores[found.position[mine], found.latent[mine]] = found.score[mine].double()
    torch.testing.assert_close(scores[:, [3, 8]], wanted, atol=1e-6, rtol=1e-5)
