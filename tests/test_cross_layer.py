"""Cross-layer transcoders and crosscoders: latents of several sites, held against plain hooks."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, batch_of, build, forward, wrapped
from saefeat.dictionaries import CrossLayer
from saefeat.remote import Server

N = 24
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("gpt2", "gemma2", "qwen3")]
FAMILIES = ["llama", *SLOW]
READS = {
    "transcoder": ["resid_mid.0"],
    "crosscoder": ["resid_pre.0", "resid_mid.1", "resid_post.1"],
}
WRITES = {
    "transcoder": ["mlp_out.0", "mlp_out.1", "mlp_out.2"],
    "crosscoder": ["resid_post.1", "mlp_out.2", "resid_post.2"],
}


def tensors(reads: int, writes: int, activation: str = "relu", seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    found = {
        "W_enc": torch.randn(reads, D, N, generator=g) / 3,
        "b_enc": torch.randn(N, generator=g) / 4,
        "W_dec": torch.randn(writes, N, D, generator=g) / 3,
    }
    if activation == "jumprelu":
        found["threshold"] = torch.rand(N, generator=g) / 2
    return found


def make(kind: str = "transcoder", activation: str = "relu", seed: int = 0, **sites) -> CrossLayer:
    read, write = sites.get("read", READS[kind]), sites.get("write", WRITES[kind])
    own = tensors(len(read), len(write), activation, seed)
    k = 5 if activation == "topk" else None
    return CrossLayer.from_tensors(own, read=read, write=write, activation=activation, k=k)


def active(own: dict, values: list[torch.Tensor], activation: str = "relu") -> torch.Tensor:
    """[..., N] by the formula."""
    h = sum(x @ w for x, w in zip(values, own["W_enc"], strict=True)) + own["b_enc"]
    if activation == "jumprelu":
        return torch.where(h > own["threshold"], h.relu(), 0.0)
    if activation == "topk":
        kept = h.topk(5, -1)
        return torch.zeros_like(h).scatter(-1, kept.indices, kept.values.relu())
    return h.relu()


def blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def module_of(model, site: str):
    """Module and whether the site is its input, by hand; resid_mid by the norm that reads it."""
    kind, layer = site.split(".")
    block = blocks(model)[int(layer)]
    gemma = hasattr(block, "post_feedforward_layernorm")
    norms = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
    return {
        "resid_pre": (block, True),
        "resid_post": (block, False),
        "resid_mid": (next(getattr(block, n) for n in norms if hasattr(block, n)), True),
        "mlp_out": (block.post_feedforward_layernorm if gemma else block.mlp, False),
    }[kind]


@contextmanager
def hooks(model, seen: dict, steps: dict):
    """Plain hooks: values of sites into ``seen``, and what ``steps[site]()`` gives added there."""
    with ExitStack() as stack:
        for site in [*seen, *(s for s in steps if s not in seen)]:
            module, at_input = module_of(model, site)

            def act(x, site=site):
                if site in seen:
                    seen[site] = x
                return x + steps[site]() if site in steps else x

            def after(_, args, out, act=act):
                whole = out[0] if isinstance(out, tuple) else out
                new = act(whole)
                return (new, *out[1:]) if isinstance(out, tuple) else new

            if at_input:

                def before(_, args, act=act):
                    return (act(args[0]), *args[1:])

                stack.callback(module.register_forward_pre_hook(before).remove)
            else:
                stack.callback(module.register_forward_hook(after).remove)
        yield


def by_hand(model, batch, own: dict, kind: str, latents, new, activation="relu", **options):
    """Logits with the latents' activations f replaced by new(f), at real tokens."""
    read, write = options.get("read", READS[kind]), options.get("write", WRITES[kind])
    seen = dict.fromkeys(read)
    real = batch["attention_mask"].bool()[..., None]

    def change():
        f = active(own, [seen[site] for site in read], activation)[..., latents]
        return torch.where(real, new(f) - f, 0.0)

    rows = dict(zip(write, own["W_dec"][:, latents], strict=True))
    steps = {site: lambda rows=rows[site]: change() @ rows for site in write}
    with hooks(model, seen, steps):
        return forward(model, batch), seen


CHOSEN = list(range(0, N, 2))
CASES = [("transcoder", a) for a in ("relu", "jumprelu", "topk")] + [("crosscoder", "relu")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "activation"), CASES)
def test_latents_are_read_where_all_their_sites_are_known(family, kind, activation):
    model, batch = build(family), batch_of(RAGGED)
    cross, own = make(kind, activation), tensors(len(READS[kind]), 3, activation)
    seen = dict.fromkeys(READS[kind])
    with hooks(model, seen, {}):
        forward(model, batch)
    values = [seen[site] for site in READS[kind]]
    wanted = active(own, values, activation)
    assert torch.allclose(cross.encode(torch.cat(values, -1)), wanted, atol=1e-5)
    reading = sf.run(wrapped(model), RAGGED, sf.Probe(cross)).readings[0]
    assert torch.allclose(
        reading.values[reading.mask.expand_as(reading.values)],
        wanted[batch["attention_mask"].bool()].flatten(),
        atol=1e-5,
    )


EDITS = {
    "ablate": (lambda chosen: sf.Ablate(chosen), torch.zeros_like),
    "clamp": (lambda chosen: sf.Clamp(chosen, add=0.5), lambda f: f + 0.5),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "activation"), CASES)
def test_an_edit_is_written_at_every_site(family, kind, activation, edit):
    model, batch = build(family), batch_of(RAGGED)
    cross, own = make(kind, activation), tensors(len(READS[kind]), 3, activation)
    verb, new = EDITS[edit]
    wanted, _ = by_hand(model, batch, own, kind, CHOSEN, new, activation)
    assert (wanted - forward(model, batch))[:, -1].abs().max() > 0.05
    out = sf.run(wrapped(model), RAGGED, verb(cross.latents(CHOSEN)))
    assert torch.allclose(out.logits, wanted[:, -1], atol=1e-5)
    (fired,) = out.receipt.rows
    assert fired.tokens == sum(len(prompt.split()) for prompt in RAGGED)


def test_a_share_of_an_edit_is_written_at_the_sites_asked_for():
    model, batch, own = build("llama"), batch_of(RAGGED), tensors(1, 3)
    cross = make().written_at("mlp_out.2", "mlp_out.0")
    assert cross.write_sites == tuple(map(sf.Site.parse, ("mlp_out.0", "mlp_out.2")))
    kept = own | {"W_dec": own["W_dec"][[0, 2]]}
    options = {"write": ["mlp_out.0", "mlp_out.2"]}
    wanted, _ = by_hand(model, batch, kept, "transcoder", CHOSEN, torch.zeros_like, **options)
    out = sf.run(wrapped(model), RAGGED, sf.Ablate(cross.latents(CHOSEN)))
    assert torch.allclose(out.logits, wanted[:, -1], atol=1e-5)
    assert cross.fingerprint() != make().fingerprint()
    assert cross.fingerprint() == make().written_at("mlp_out.0", "mlp_out.2").fingerprint()


def generated(model, own: dict, kind: str, new, cache: bool) -> list[list[int]]:
    """Tokens of transformers' own generate, with plain hooks at every pass."""
    batch, seen = batch_of(RAGGED), dict.fromkeys(READS[kind])
    real = [batch["attention_mask"].bool()[..., None]]

    def change():
        f = active(own, [seen[site] for site in READS[kind]])[..., CHOSEN]
        mask = real[0] if f.shape[1] == real[0].shape[1] else torch.ones_like(f[..., :1]).bool()
        if f.shape[1] > real[0].shape[1]:
            mask[:, : real[0].shape[1]] = real[0]
        return torch.where(mask, new(f) - f, 0.0)

    rows = dict(zip(WRITES[kind], own["W_dec"][:, CHOSEN], strict=True))
    steps = {site: lambda rows=rows[site]: change() @ rows for site in WRITES[kind]}
    with hooks(model, seen, steps), torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=cache)
    return ids[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", READS)
def test_an_edit_acts_at_every_token_of_a_generation(kind, cache):
    model, cross = build("llama"), make(kind)
    own = tensors(len(READS[kind]), 3)
    edit = sf.Clamp(cross.latents(CHOSEN), add=1.5)
    wanted = generated(model, own, kind, lambda f: f + 1.5, cache)
    model.generation_config.use_cache = cache
    out = sf.run(wrapped(model), RAGGED, edit, max_new_tokens=4)
    assert [list(row) for row in out.completions] == wanted
    assert wanted != generated(model, own, kind, lambda f: f, cache)


def test_a_receipt_counts_a_latent_once_and_measures_all_that_is_written():
    model, cross, own = build("llama"), make(), tensors(1, 3)
    chosen = [3, 8]
    out = sf.run(wrapped(model), RAGGED, sf.Ablate(cross.latents(chosen)))
    (fired,), seen = out.receipt.rows, {"resid_mid.0": None}
    with hooks(model, seen, {}):
        forward(model, batch_of(RAGGED))
    real = batch_of(RAGGED)["attention_mask"].bool()
    f = active(own, [seen["resid_mid.0"]])[..., chosen][real]
    assert fired.changed == int((f != 0).sum())
    whole = torch.cat([f @ rows for rows in own["W_dec"][:, chosen]], -1).norm(dim=-1)
    assert torch.allclose(
        fired.events.norms()[1].sort().values, whole[(f != 0).any(-1)].sort().values, atol=1e-5
    )


def test_it_travels():
    model = wrapped(build("llama"))
    for kind in READS:
        edit = sf.Ablate(make(kind).latents(CHOSEN)) | sf.Probe(make(kind, seed=1))
        here, there = (sf.run(model, RAGGED, edit, on=on) for on in (None, Server("local")))
        assert torch.allclose(here.logits, there.logits, atol=1e-5)


def test_conditions_read_several_sites():
    model, cross = wrapped(build("llama")), make("crosscoder")
    reading = sf.run(model, RAGGED, sf.Probe(cross.latents([4]))).readings[0]
    bound = float(reading.values[reading.mask.expand_as(reading.values)].median())
    push = sf.Direction(torch.ones(D), site="resid_post.2")
    when = sf.When(cross.latents([4]), above=bound)
    out = sf.run(model, RAGGED, sf.Clamp(push, add=2.0, when=when))
    wanted = int((reading.values > bound)[reading.mask.expand_as(reading.values)].sum())
    assert out.receipt.rows[0].changed == wanted > 0


# ------------------------------------------------------------------ what is refused


def test_a_crosscoder_is_not_written_before_it_is_known():
    model, cross = (
        wrapped(build("llama")),
        make("crosscoder", write=["resid_pre.0", "resid_post.1"]),
    )
    with pytest.raises(sf.errors.SiteError, match=r'written_at\("resid_post.1"\)'):
        sf.run(model, RAGGED, sf.Ablate(cross.latents([1])))
    sf.run(model, RAGGED, sf.Ablate(cross.written_at("resid_post.1").latents(CHOSEN)))
    early = make("crosscoder", write=["resid_pre.0", "resid_post.0"])
    with pytest.raises(sf.errors.SiteError, match="Probe, which only reads"):
        sf.run(model, RAGGED, sf.Ablate(early.latents([1])))
    sf.run(model, RAGGED, sf.Probe(early))


def test_sites_are_listed_as_the_model_reaches_them():
    model = wrapped(build("llama"))
    for at in ({"write": ["mlp_out.1", "mlp_out.0"]}, {"read": ["resid_mid.1", "resid_mid.0"]}):
        with pytest.raises(sf.errors.SiteError, match="the order in which the model reaches them"):
            sf.run(model, RAGGED, sf.Probe(make(**at)))


def test_what_takes_one_site_refuses_several(tmp_path):
    model, cross = wrapped(build("llama")), make()
    chosen, later = cross.latents([1, 2]), make(seed=1, read=["resid_mid.2"], write=["mlp_out.2"])
    wide = make("crosscoder").latents([1])
    refusals = {
        "span": lambda: sf.run(model, RAGGED, sf.Ablate(chosen.span())),
        "save": lambda: sf.save(sf.Ablate(chosen), tmp_path / "x.safetensors"),
        "edges": lambda: sf.validation.edges(model, RAGGED, chosen, later),
        "random_directions": lambda: sf.controls.random_directions(chosen, seed=0),
        "activation": lambda: sf.metrics.activation(wide),
    }
    for name, call in refusals.items():
        with pytest.raises(sf.errors.SiteError, match=f"^{name}: .*sites, wanted latents"):
            call()
    with pytest.raises(sf.errors.DictionaryError, match="verify"):
        sf.verify(model, cross, RAGGED)


def test_steering_vectors_are_those_of_every_site():
    found = sf.hub.steering_vector(sf.Clamp(make().latents([3, 4]), add=torch.tensor([1.0, 2.0])))
    for rows, (site, vector) in zip(tensors(1, 3)["W_dec"], found.items(), strict=True):
        assert str(site).startswith("mlp_out") and torch.allclose(vector, rows[3] + 2 * rows[4])


def test_a_later_step_cannot_read_what_an_earlier_one_changed():
    cross = make()
    chain = sf.Ablate(cross.latents([1])) | sf.Clamp(cross.latents([1]), add=1.0)
    with pytest.raises(sf.errors.LatentError, match="edited earlier"):
        sf.run(wrapped(build("llama")), RAGGED, chain)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b_enc": None}, "without b_enc"),
        ({"threshold": torch.zeros(N)}, "with threshold"),
        ({"b_enc": torch.zeros(N + 1)}, "b_enc"),
        ({"W_dec": torch.zeros(2, N, D)}, r"W_dec.*\(2, 24, 32\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, said):
    own = {name: t for name, t in (tensors(1, 3) | change).items() if t is not None}
    with pytest.raises(sf.errors.DictionaryError, match=said):
        CrossLayer.from_tensors(own, read=["resid_mid.0"], write=WRITES["transcoder"])


def test_it_keeps_the_contract():
    for kind, activation in CASES:
        sf.dictionaries.check_dictionary(make(kind, activation))
    assert "resid_pre.0 to resid_post.1 (3 sites)" in repr(make("crosscoder"))


# ------------------------------------------------------------------ attribution

METRIC = sf.logit_diff(5, 6)


def summed(found: sf.attribution.Attribution) -> torch.Tensor:
    """[prompts, N]: scores over tokens."""
    out = torch.zeros(len(RAGGED) * N)
    out.index_add_(0, found.prompt * N + found.latent, found.score)
    return out.view(-1, N)


def slopes_by_hand(model, own: dict, kind: str, activation: str = "relu"):
    """[b, t, N]: −f · Σ over write sites of the metric's plain gradient there along W_dec; and how
    many (token, latent) pairs are active.
    """
    batch = batch_of(RAGGED)
    zeros = {s: torch.zeros(*batch["input_ids"].shape, D, requires_grad=True) for s in WRITES[kind]}
    seen = dict.fromkeys(READS[kind])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with hooks(model, seen, {site: lambda z=z: z for site, z in zeros.items()}):
        logits = model(**batch, position_ids=positions).logits[:, -1]
    values = [seen[site].detach() for site in READS[kind]]
    grads = torch.autograd.grad((logits[:, 5] - logits[:, 6]).sum(), list(zeros.values()))
    f = active(own, values, activation)
    along = sum(g @ rows.T for g, rows in zip(grads, own["W_dec"], strict=True))
    real = batch["attention_mask"].bool()
    return torch.where(real[..., None], -f * along, 0.0), int((f[real] != 0).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "activation"), CASES)
def test_a_score_sums_the_gradient_over_all_write_sites(family, kind, activation):
    model = build(family)
    own = tensors(len(READS[kind]), 3, activation)
    wanted, count = slopes_by_hand(model, own, kind, activation)
    found = sf.Attribute(make(kind, activation), METRIC)(wrapped(model), RAGGED)
    assert torch.allclose(summed(found), wanted.sum(1), atol=1e-5)
    assert float(wanted.abs().max()) > 1e-3
    assert len(found.score) == count  # one row a latent and token


@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("on", [None, Server("local")])
def test_exact_scores_are_those_of_the_edit(kind, on):
    model, chosen = build("llama"), [2, 4, 6]
    cross, own, batch = make(kind), tensors(len(READS[kind]), 3), batch_of(RAGGED)
    method = sf.attribution.Exact()
    found = sf.Attribute(cross.latents(chosen), METRIC, method=method)(
        wrapped(model), RAGGED, on=on
    )
    scores = summed(found)
    clean = forward(model, batch)[:, -1]
    for latent in chosen:
        logits, _ = by_hand(model, batch, own, kind, [latent], torch.zeros_like)
        change = (logits[:, -1, 5] - logits[:, -1, 6]) - (clean[:, 5] - clean[:, 6])
        assert torch.allclose(scores[:, latent], change, atol=1e-5)
    assert scores.abs().max() > 1e-3


@pytest.mark.parametrize("kind", READS)
def test_a_small_step_is_the_gradient(kind):
    cross, model = make(kind), wrapped(build("llama", torch.float64))
    latents = cross.latents([2, 4, 6])
    step = sf.attribution.FiniteDifference(step=0.02)
    small = summed(sf.Attribute(latents, METRIC, method=step)(model, RAGGED))
    slope = summed(sf.Attribute(latents, METRIC)(model, RAGGED))
    assert torch.allclose(small, slope, rtol=0.02, atol=1e-3)


def test_several_cross_layer_dictionaries_and_an_sae_are_scored_together():
    model = build("llama")
    layers = [make(seed=n, read=[f"resid_mid.{n}"], write=WRITES["transcoder"][n:]) for n in (0, 1)]
    sae = sf.Neurons("resid_post.2", D)
    every = sf.dictionaries.Dictionaries([*layers, sae])
    together = sf.Attribute(every, METRIC)(wrapped(model), RAGGED)
    for n, dictionary in enumerate([*layers, sae]):
        alone = sf.Attribute(dictionary, METRIC)(wrapped(model), RAGGED)
        own = together.dictionary == n
        assert torch.allclose(together.score[own], alone.score, atol=1e-5)


def test_integrated_gradients_and_baselines_take_several_sites():
    model, cross = wrapped(build("llama")), make()
    own = tensors(1, 3)
    for baseline in (
        None,
        sf.attribution.Fixed(cross, 0.3),
        sf.Ablate(sf.Direction(torch.ones(D), site="resid_pre.0")),
        sf.attribution.Paired(["w9 w2 w3", "w4 w5 w6 w7 w8 w1", "w10 w11 w1 w13"]),
    ):
        found = sf.Attribute(cross, METRIC, baseline, sf.IG(4, "midpoint"))(model, RAGGED)
        assert torch.isfinite(found.score).all() and float(found.score.abs().max()) > 1e-3
    plain = slopes_by_hand(build("llama"), own, "transcoder")[0].sum(1)
    few = sf.Attribute(cross, METRIC, method=sf.IG(1))(model, RAGGED)  # one node, at the clean run
    assert torch.allclose(summed(few), plain, atol=1e-5)


def test_an_audit_holds_scores_against_edits_at_every_site():
    model, cross = wrapped(build("llama")), make()
    attribute = sf.Attribute(cross, METRIC)
    scores = attribute(model, RAGGED)
    audit = sf.audit(attribute, model, RAGGED, scores, budget=8)
    exact = sf.Attribute(cross, METRIC, method=sf.attribution.Exact())(model, RAGGED)
    wanted = summed(exact).mean(0)[audit.keys[:, 1]]
    assert torch.allclose(audit.exact, wanted.to(audit.exact), atol=1e-5)
    assert wanted.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [({"one_site": True}, "one_site"), ({"semantics": "through_sae"}, "several sites")],
)
def test_ways_that_take_one_site_are_refused_by_attribute(options, said):
    with pytest.raises(sf.SaefeatError, match=said):
        sf.Attribute(make(), METRIC, **options, method=sf.IG(2))(wrapped(build("llama")), RAGGED)


def test_attribution_refuses_a_crosscoder_that_is_written_too_early():
    early = make("crosscoder", write=["resid_pre.0", "resid_post.1"])
    with pytest.raises(sf.errors.SiteError, match="written_at"):
        sf.Attribute(early, METRIC)(wrapped(build("llama")), RAGGED)


def test_scores_are_kept_in_a_file(tmp_path):
    cross = make()
    found = sf.Attribute(cross, METRIC)(wrapped(build("llama")), RAGGED)
    found.save(tmp_path / "scores.safetensors")
    again = sf.attribution.Attribution.load(tmp_path / "scores.safetensors", saes=[cross])
    assert again.dictionaries == (cross,) and torch.equal(again.score, found.score)
