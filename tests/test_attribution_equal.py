"""The issue's equalities: every dictionary against the naive form in float32, every method batched
against single prompts, and each error with what it says to do.
"""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import ARCHITECTURES, RAGGED, TRANSCODERS, D, batch_of, build, make_sae, unit, wrapped
from test_attribution import ATP, LEFT, dense, grab, naive, run_with, scale_of, score_metric

F64 = torch.float64
METRIC = sf.logit_diff([5, 9], 7)
PAIRS = ["w1 w20 w3", "w21 w5 w22 w7 w8 w30", "w10 w11 w31 w13"]
LONGER = ["w1 w20 w3 w4 w5", "w21 w5 w22 w7 w8 w9 w10", "w10 w31 w12 w13"]


def steering() -> sf.Ablate:
    return sf.Ablate(
        sf.Direction.at_sites(unit(9), sites=["resid_pre.0", "resid_post.1", "resid_post.2"])
    )


# ---------------------------------------------------------------- 1e-5 in float32, naively


def squares(x):
    return torch.relu(x) ** 2


DICTIONARIES = {
    **{name: lambda name=name, **at: make_sae(name, **at) for name in ARCHITECTURES},
    **{name: lambda name=name, **at: make_sae(name, **at) for name in TRANSCODERS},
    "layer_norm": lambda **at: make_sae("jumprelu", norm="layer_norm", **at),
    "constant_norm_rescale": lambda **at: make_sae("topk", norm="constant_norm_rescale", **at),
    "rescaled topk": lambda **at: make_sae("topk", rescale=True, **at),
    "centered": lambda **at: make_sae("standard", centered=True, **at),
    "direction": lambda layer, seed: sf.Direction(
        torch.stack([unit(seed), unit(seed + 5)]), site=f"resid_post.{layer}"
    ),
    "neurons": lambda layer, seed: sf.Neurons(f"resid_post.{layer}", D),
    "generic": lambda layer, seed: sf.dictionaries.Function(
        squares, torch.eye(D), site=f"resid_post.{layer}", width=D
    ),
    "matching pursuit": lambda layer, seed: pursuit(layer),
}


def pursuit(layer: int) -> sf.dictionaries.Dictionary:
    pytest.importorskip("sae_lens")
    from test_mixing import lens

    found = sf.load_sae(lens("matching_pursuit"))
    found.site = found.write_site = sf.Site("resid_post", layer)
    return found


SCALED = ("layer_norm", "constant_norm_rescale")  # the naive form blends latents of one scale
CASES = [
    (name, method, start)
    for name in DICTIONARIES
    for method in (ATP, LEFT)
    for start in ("zero", "direction")
    if start == "zero" or name not in SCALED
]


@pytest.mark.parametrize("name, method, start", CASES, ids=str)
def test_in_float32_to_a_hundred_thousandth(name, method, start):
    """Two dictionaries in a row, each a leaf in its own splice, on a float32 model."""
    model, batch = build("gpt2"), batch_of()
    saes = sf.dictionaries.Dictionaries(
        DICTIONARIES[name](layer=layer, seed=layer) for layer in (0, 2)
    )
    baseline = None if start == "zero" else steering()
    scores = sf.Attribute(saes, METRIC, baseline, method)(wrapped(model), batch)
    found = dense(scores, batch)
    wanted = naive(model, batch, list(saes.values()), method, baseline)
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.dtype == torch.float32 and theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours.float(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCALED)
def test_directions_that_move_with_the_input(name):
    """Against an intervention: the difference of two contributions, each at its own scale."""
    model, batch, start = build("gpt2"), batch_of(), steering()
    sae = DICTIONARIES[name](layer=1, seed=1)
    scores = sf.Attribute(sae, METRIC, start)(wrapped(model), batch)
    clean, base = (grab(model, batch, [sae.site], by)[sae.site] for by in (None, start))
    leaf = clean.clone().requires_grad_()
    value = score_metric(run_with(model, batch, {sae.site: lambda _: leaf})).sum()
    (slope,) = torch.autograd.grad(value, leaf)
    was, will = (sae.encode(x) * scale_of(sae, x) for x in (clean, base))
    wanted = (will - was) * (slope @ sae.directions().T) * batch["attention_mask"][..., None]
    torch.testing.assert_close(dense(scores, batch)[0].float(), wanted, atol=1e-5, rtol=1e-5)
    assert wanted.abs().max() > 1e-3


# ---------------------------------------------------------------- batched equal to single


def two_saes(dtype) -> sf.dictionaries.Dictionaries:
    return sf.dictionaries.Dictionaries(
        [make_sae(layer=0, dtype=dtype), make_sae("topk", layer=2, dtype=dtype)]
    )


def few(dtype) -> sf.Latents:
    return two_saes(dtype).latents({0: range(0, 48, 5), 2: range(0, 48, 5)})


BACKWARD = {
    "RelP": sf.attribution.RelP(),
    "GradDrop": sf.attribution.GradDrop(),
    "signed": sf.attribution.GradDrop(signed=True),
}
METRICS = {
    "by prompt": lambda rows: sf.logit_diff(
        sf.metrics.PerPrompt([[5, 9, 11][row] for row in rows]), 7
    ),
    "continuation": lambda rows: sf.metrics.log_prob(
        sf.metrics.PerPrompt([[[5, 9, 4], [7], [30, 31]][row] for row in rows])
    ),
    "steered argmax": lambda rows: sf.logit_diff(sf.metrics.BASELINE_TOP, 7),
    "divergence": lambda rows: sf.metrics.kl("baseline"),
    "all logits": lambda rows: sf.metrics.custom(
        lambda logits, mask: (logits[..., 5] * mask).sum(1), tokens="all"
    ),
    "latents": lambda rows: sf.metrics.activation(sf.Neurons("resid_post.2", D).latents([3, 4])),
}
WAYS = {
    "AtP": {},
    "IG left": {"method": sf.IG(3)},
    "IG midpoint": {"method": sf.IG(2, "midpoint")},
    "IG gauss": {"method": sf.IG(2, "gauss")},
    "as published": {"method": sf.IG(3, endpoint="as_published"), "baseline": "steering"},
    "intervention": {"method": sf.IG(2), "baseline": "steering"},
    "fixed by prompt": {"method": sf.IG(2), "baseline": "fixed"},
    "pairs": {"method": sf.IG(2), "baseline": "pairs"},
    "aligned pairs": {"baseline": "aligned"},
    "one site": {"method": sf.IG(2), "one_site": True},
    "through_sae": {"semantics": "through_sae"},
    "keep": {"keep": 4},
    "where": {"where": sf.Tokens.last(2) | sf.Tokens.first(1)},
    **{name: {"backward": rule} for name, rule in BACKWARD.items()},
    "GradDrop over a path": {"backward": sf.attribution.GradDrop(), "method": sf.IG(2)},
    "Exact": {"method": sf.attribution.Exact(), "target": "few"},
    "Exact by token": {"method": sf.attribution.Exact(per="token"), "target": "few"},
    "Exact, steered": {"method": sf.attribution.Exact(), "target": "few", "baseline": "steering"},
    "finite differences": {"method": sf.attribution.FiniteDifference(1e-2), "target": "few"},
    **{name: {"metric": name, "baseline": "steering"} for name in METRICS},
    "exact continuation": {
        "metric": "continuation",
        "method": sf.attribution.Exact(),
        "target": "few",
    },
}


def job_for(way: dict, rows: list[int], dtype) -> sf.Attribute:
    """The attribution of some of the prompts, with what differs by prompt cut to them."""
    how = dict(way)
    saes = two_saes(dtype)
    target = few(dtype) if how.pop("target", None) else saes
    metric = METRICS[how.pop("metric")](rows) if "metric" in how else METRIC
    values = torch.linspace(0, 1, 3 * 96, dtype=dtype).reshape(3, 96)[rows]
    starts = {
        None: lambda: None,
        "steering": steering,
        "fixed": lambda: sf.attribution.Fixed(saes, values),
        "pairs": lambda: sf.attribution.Paired([PAIRS[row] for row in rows]),
        "aligned": lambda: sf.attribution.Paired([LONGER[row] for row in rows], align="end"),
    }
    return sf.Attribute(target, metric, starts[how.pop("baseline", None)](), **how)


def table(scores: sf.attribution.Attribution, prompt: int) -> dict[tuple, float]:
    """(dictionary, position, latent) → score of one prompt."""
    rows = scores.prompt == prompt
    columns = (scores.dictionary, scores.position, scores.latent)
    keys = zip(*(column[rows].tolist() for column in columns), strict=True)
    return dict(zip(keys, scores.score[rows].tolist(), strict=True))


NORMED = ("IG left", "as published", "one site", "through_sae", "RelP", "GradDrop", "Exact")


@pytest.mark.parametrize(
    "way, family",
    [*((way, "gpt2") for way in WAYS), *((way, "gemma3_text") for way in NORMED)],
)
def test_batched_equals_single(way, family):
    """Three prompts of other lengths at once, two at once, and each by itself."""
    dtype = F64 if family == "gpt2" else torch.float32
    nn = wrapped(build(family, dtype))
    whole = job_for(WAYS[way], [0, 1, 2], dtype)(nn, RAGGED)
    cut = job_for(WAYS[way], [0, 1, 2], dtype)(nn, RAGGED, batch_size=2, steps_at_once=1)
    alone = [job_for(WAYS[way], [row], dtype)(nn, RAGGED[row : row + 1]) for row in range(3)]
    assert any(abs(score) > 1e-3 for one in alone for score in table(one, 0).values())
    for found in (whole, cut):
        for row, one in enumerate(alone):
            ours, theirs = table(found, row), table(one, 0)
            for key in ours.keys() | theirs.keys():
                wanted = pytest.approx(theirs.get(key, 0.0), abs=2e-5, rel=1e-3)
                assert ours.get(key, 0.0) == wanted, key
            for name in ("clean", "baseline", "tokens", "ends", "dropped"):
                ours, theirs = getattr(found, name), getattr(one, name)
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours[row], theirs[0], atol=2e-5, rtol=1e-3)


def test_progress_is_shown_batch_by_batch(capsys):
    nn = wrapped(build("llama"))
    sf.Attribute(make_sae(), METRIC)(nn, RAGGED, batch_size=2)
    assert capsys.readouterr().err == ""
    sf.Attribute(make_sae(), METRIC)(nn, RAGGED, batch_size=2, progress=True)
    shown = capsys.readouterr().err
    assert "attribute" in shown and "2/2" in shown


# ---------------------------------------------------------------- each error says what to do


def plainly(nn, prompts=RAGGED, **how) -> None:
    sf.Attribute(make_sae(), how.pop("metric", METRIC), **how)(nn, prompts)


def under_no_grad(nn) -> None:
    with torch.no_grad():
        plainly(nn)


def of_inference(nn) -> None:
    with torch.inference_mode():
        model = build("llama")
    plainly(wrapped(model))


ERRORS = {
    "metric without gradient": (
        lambda nn: plainly(nn, metric=sf.metrics.custom(lambda logits: logits.argmax(-1))),
        sf.errors.GradientError,
        "metrics.custom(lambda logits: logits[:, 5])",
    ),
    "no_grad context": (
        under_no_grad,
        sf.errors.GradientError,
        "with torch.enable_grad(): Attribute(",
    ),
    "inference-mode tensors": (of_inference, sf.errors.GradientError, "load the model outside"),
    "missing baseline tokens": (
        lambda nn: plainly(
            nn, baseline=sf.attribution.Paired([p[:5] for p in RAGGED], align="end")
        ),
        sf.errors.PromptError,
        "where=Tokens.last(n)",
    ),
    "unequal lengths without alignment": (
        lambda nn: plainly(nn, baseline=sf.attribution.Paired(LONGER)),
        sf.errors.PromptError,
        'Paired(prompts, align="end")',
    ),
    "one value missing": (
        lambda nn: plainly(nn, baseline=sf.attribution.Fixed(make_sae().latents([1]), 0.5)),
        sf.errors.LatentError,
        "from the same saes",
    ),
}  # a remote without gradients: tests/test_remote_attribution.py


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_says_what_to_do(name):
    act, kind, call = ERRORS[name]
    with pytest.raises(kind) as caught:
        act(wrapped(build("llama")))
    said = str(caught.value)
    assert "Likely cause: " in said and call in said.split("Try: ")[1], said
