"""Attribution's own traps: what would be a silent nonsense number is right, or refused by name."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, build, hook_count, make_sae, unit, wrapped
from saefeat.files.hashing import digest
from saefeat.kernel.frozen import Placed
from saefeat.kernel.state import Log, Memory, State, window
from saefeat.kernel.watch import Keep

F64 = torch.float64
METRIC = sf.logit_diff([5, 9], 7)
LENGTHS = [3, 6, 4]


def attribute(**options) -> sf.attribution.Attribution:
    return sf.Attribute(make_sae(), METRIC, **options)(wrapped(build("llama")), RAGGED)


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_site_moved_to_a_target_is_at_the_target(dtype, gradient):
    """9984 + (3.7 − 9984) is 0 in bfloat16: massive activations made the zero baseline wrong."""
    x = torch.tensor([[[9984.0, 1.0, -3e4]]], dtype=dtype, requires_grad=True)
    target = torch.tensor([[[3.7, 2.0, 1e-3]]], dtype=dtype)
    state = State(window(None, None, (1, 1), 0, Memory(), None), Log(), Placed())
    out = Keep(number=0, target=target, copy=False, gradient=gradient).apply(x, state)
    assert torch.equal(out, target) and out is not target
    if gradient:  # and gradients pass as if a constant had been added
        (slope,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(slope, torch.ones_like(x))


def test_gradients_are_averaged_in_float32():
    """A running mean of 200 bfloat16 gradients was off by 6 percent."""
    model = build("llama", torch.bfloat16)
    sae, steps = make_sae(), sf.IG(200, "midpoint")
    ours = sf.Attribute(sae, METRIC, method=steps)(wrapped(model), RAGGED, steps_at_once=1)
    exact = sf.Attribute(sae, METRIC, method=steps)(wrapped(model.float()), RAGGED)
    a, b = (found.scores_of(sae.latents()) for found in (ours, exact))
    assert float((a - b).norm() / b.norm()) < 0.03


# ---------------------------------------------------------------- numbers that are none


def root(logits):
    return (logits[:, 5] - logits[:, 5].detach()).sqrt() + logits[:, 6]  # slope inf at zero


@pytest.mark.parametrize("keep", [None, 3])
def test_a_gradient_that_is_not_finite(keep):
    """NaN sorts above every number: it was the top latent."""
    with pytest.raises(sf.errors.GradientError, match=r"finite gradient.*first in prompt 0"):
        sf.Attribute(make_sae(), sf.metrics.custom(root), keep=keep)(
            wrapped(build("llama")), RAGGED
        )
    with pytest.raises(sf.errors.GradientError, match="finite"):
        nn, job = wrapped(build("llama")), sf.Attribute(make_sae(), METRIC)
        with nn.trace(RAGGED):
            job.watch(nn).scores(root(nn.output.logits[:, -1]))


@pytest.mark.parametrize(
    "method", [sf.attribution.AtP(), sf.IG(2), sf.attribution.Exact()], ids=repr
)
def test_a_metric_that_mixes_prompts_in_the_right_shape(method):
    """One number a prompt, and a batch's gradient was no prompt's own."""
    nn, few = wrapped(build("llama")), make_sae().latents(range(0, 48, 6))
    mixing = {
        "centered": sf.metrics.custom(
            lambda logits: logits[:, 5] - logits[:, 5].mean(), "centered"
        ),
        "one way": sf.metrics.custom(lambda logits: logits[:, 5].cumsum(0), "one way"),
        "softmax over prompts": sf.metrics.custom(
            lambda logits, mask: (logits[..., 5] * mask).sum(1).softmax(0), "rows", tokens="all"
        ),
        "at a site": sf.metrics.at_site("resid_post.2", lambda x, mask: x[:, -1, 3].flip(0) * 2),
    }
    for metric in mixing.values():
        with pytest.raises(sf.errors.GradientError, match="depends on another prompt"):
            sf.Attribute(few, metric, method=method)(nn, RAGGED)
        with pytest.raises(sf.errors.GradientError, match="depends on another prompt"):
            sf.Attribute(few, metric, method=method)(nn, RAGGED, batch_size=1)


def test_an_effect_that_is_not_finite():
    nn, few = wrapped(build("llama")), make_sae().latents(range(12))
    clean = sf.metrics.measure(nn, RAGGED, sf.metrics.logit(5))
    below = sf.metrics.custom(lambda logits: (clean.max() + 1e-4 - logits[:, 5]).sqrt())
    with pytest.raises(sf.errors.GradientError, match="effect"):
        sf.Attribute(few, below, method=sf.attribution.Exact())(nn, RAGGED)


def test_a_site_alone_at_its_baseline_that_is_not_finite():
    """One site alone goes where neither the clean nor the baseline run does."""
    nn, saes = (
        wrapped(build("llama")),
        sf.dictionaries.Dictionaries([make_sae(layer=0), make_sae(layer=1)]),
    )
    for token in range(20):
        job = sf.Attribute(saes, sf.metrics.logit(token), one_site=True)
        found = job(nn, RAGGED)
        least, known = float(found.ends.min()), torch.cat([found.clean, found.baseline])
        if least < float(known.min()) - 0.01:
            break
    metric = sf.metrics.custom(lambda logits: (logits[:, token] - least - 0.005).sqrt())
    assert sf.Attribute(saes, metric)(nn, RAGGED).score.isfinite().all()
    with pytest.raises(sf.errors.GradientError, match="baseline run"):
        sf.Attribute(saes, metric, one_site=True)(nn, RAGGED)


# ---------------------------------------------------------------- nothing, and other bad input


def test_a_rule_that_scores_no_token():
    """Zero scores everywhere would read as 'no effect'."""
    nowhere = sf.Tokens.ids(99)
    with pytest.raises(sf.errors.FiringError, match="no token in any of 3 prompts"):
        attribute(where=nowhere)
    nn, job = wrapped(build("llama")), sf.Attribute(make_sae(), METRIC, where=nowhere)
    with pytest.raises(sf.errors.FiringError, match="no token"), nn.trace(RAGGED):
        job.watch(nn).scores(nn.output.logits)
    some = attribute(where=sf.Tokens.ids(5))  # w1, in the first prompt alone
    assert some.tokens.tolist() == [1, 0, 0]


@pytest.mark.parametrize("size", [0, -1, 2.0, "all", True])
def test_batch_sizes(size):
    nn = wrapped(build("llama"))
    with pytest.raises(sf.errors.PromptError, match=r"`batch_size`.*integer"):
        sf.Attribute(make_sae(), METRIC)(nn, RAGGED, batch_size=size)
    with pytest.raises(sf.errors.PromptError, match=r"`batch_size`.*integer"):
        sf.metrics.measure(nn, RAGGED, METRIC, batch_size=size)


@pytest.mark.parametrize("k", [2.5, "3", None, True])
def test_a_share_is_no_number_of_latents(k):
    """top(2.5) gave every latent with a positive score."""
    with pytest.raises(sf.errors.LatentError, match="whole number"):
        attribute().top(k)


def test_fixed_values_differ_by_prompt_and_latent_at_most():
    sae = make_sae()
    for values in (sf.values.Schedule([1.0, 2.0]), None):
        with pytest.raises(sf.errors.LatentError, match=r"Fixed: `values`"):
            sf.attribution.Fixed(sae, values)


def test_a_metric_of_latents_that_look_back():
    """Padding would be part of what they look back on."""
    looks_back = sf.dictionaries.Function(
        torch.cumsum, torch.eye(D), site="resid_post.2", width=D, prefix=True
    )
    with pytest.raises(sf.errors.LatentError, match="look back"):
        sf.metrics.activation(looks_back)


def test_functions_that_differ_inside_are_two_jobs(tmp_path):
    """A checkpoint of one was taken for the other's."""

    def of(shift):
        inner = {
            5: lambda logits: sum(map(lambda n: logits[:, n + 5], range(2))),
            6: lambda logits: sum(map(lambda n: logits[:, n + 6], range(2))),
        }
        return sf.metrics.custom(inner[shift])

    assert digest(of(5)) == digest(of(5)) != digest(of(6))

    def first(logits, *, token=5):
        return logits[:, token]

    def second(logits, *, token=6):
        return logits[:, token]

    assert digest(first) != digest(second)
    nn, sae = wrapped(build("llama")), make_sae()
    sf.Attribute(sae, of(5))(nn, RAGGED, checkpoint=tmp_path)
    with pytest.raises(sf.errors.CheckpointError, match="metric"):
        sf.Attribute(sae, of(6))(nn, RAGGED, checkpoint=tmp_path)


@pytest.mark.parametrize(
    "metric",
    [
        sf.logit_diff(sf.metrics.BASELINE_TOP, 7),
        sf.metrics.custom(lambda logits, mask: (logits[..., 5] * mask).sum(1), tokens="all"),
        sf.metrics.log_prob(sf.metrics.PerPrompt([[5, 9], [7], [30, 31]])),
        sf.metrics.kl("baseline"),
        sf.metrics.activation(sf.Neurons("resid_post.2", D).latents([3])),
    ],
    ids=repr,
)
def test_every_metric_has_a_checkpoint(metric, tmp_path):
    """The refusal paper's own metric was refused."""
    nn, base = wrapped(build("llama")), sf.Ablate(sf.Direction(unit(2), site="resid_post.0"))
    job = sf.Attribute(make_sae(), metric, base)
    first = job(nn, RAGGED, batch_size=2, checkpoint=tmp_path)
    again = job(nn, RAGGED, batch_size=2, checkpoint=tmp_path)
    assert torch.equal(first.score, again.score) and first.texts == again.texts


def test_dictionaries_that_share_a_site_share_its_gap():
    """Each was compared with the change that both make."""
    nn, eye = wrapped(build("llama", F64)), torch.eye(D, dtype=F64)
    halves = [sf.Direction(rows, site="resid_post.1") for rows in (eye[:16], eye[16:])]
    late = sf.Neurons("resid_post.2", D)
    start = sf.Ablate(sf.Direction.at_sites(unit(9), sites=["resid_post.0"]))
    target = halves[0].latents() | late.latents() | halves[1].latents()
    found = sf.Attribute(target, METRIC, start, sf.IG(24, "gauss"), one_site=True)(nn, RAGGED)
    assert found.gap_by_site.abs().max() < 1e-4
    assert (found.ends - found.clean[:, None]).abs().min() > 1e-3


def test_a_score_takes_as_many_bytes_as_the_page_says():
    found = attribute()
    names = ("prompt", "dictionary", "position", "latent", "score", "activation", "change")
    page = Path(__file__).parents[1] / "docs/guide/attribution.md"
    size = sum(getattr(found, name).element_size() for name in names)
    assert f"{size} bytes for each token" in page.read_text(encoding="utf-8")


# ---------------------------------------------------------------- continuations


def test_rules_mean_the_prompt_when_a_continuation_follows(tmp_path):
    """totals(where=last(2)) counted from the continuation's end, and found nothing."""
    nn, sae = wrapped(build("llama")), make_sae()
    metric = sf.metrics.log_prob(sf.metrics.PerPrompt([[5, 9, 4], [7], [30, 31]]))
    every = sf.Attribute(sae, metric)(nn, RAGGED)
    assert [len(row) for row in every.texts.ids] == [5, 6, 5]
    assert every.texts.prompts == every.texts.lengths == tuple(LENGTHS)
    last = sf.Attribute(sae, metric, where=sf.Tokens.last(2))(nn, RAGGED)
    loaded = sf.attribution.Attribution.load(every.save(tmp_path / "x.safetensors"), saes=[sae])
    assert loaded.texts == every.texts
    for found in (every, loaded):
        keys, values, _ = found.totals(where=sf.Tokens.last(2))
        wanted_keys, wanted, _ = last.totals()
        assert torch.equal(keys, wanted_keys) and len(keys) > 10
        torch.testing.assert_close(values, wanted, atol=1e-6, rtol=1e-5)
        assert list(found.by_position(origin="end")) == [-6, -5, -4, -3, -2, -1]
        assert found.by_position(origin="end")[-1] == pytest.approx(
            last.by_position(origin="end")[-1]
        )
    chosen = every.texts.select(sf.Tokens.generated())
    assert [row.tolist() for row in chosen] == [[False] * 3 + [True] * 2, [False] * 6,
                                                [False] * 4 + [True]]  # fmt: skip
    both = sf.Attribute(sae, metric, where=sf.Tokens.all())(nn, RAGGED)
    assert set(both.by_position(origin="end")) == {-6, -5, -4, -3, -2, -1, 0, 1}


def test_special_tokens_are_known_without_a_tokenizer():
    """An edit takes them from the configuration; totals forgot them, and BOS counted."""
    model = build("llama")
    model.config.bos_token_id = 2
    nn = nnsight.TransformersModel(model, tokenizer=wrapped(build("llama")).tokenizer)
    nn.tokenizer = None
    prompts = [[2, 10, 11, 12], [2, 13, 14]]
    every = sf.Attribute(make_sae(), METRIC)(nn, prompts)
    plain = sf.Attribute(make_sae(), METRIC, where=~sf.Tokens.special())(nn, prompts)
    assert every.tokens.tolist() == [4, 3] and plain.tokens.tolist() == [3, 2]
    keys, values, _ = every.totals(where=~sf.Tokens.special())
    assert torch.equal(keys, plain.totals()[0])
    torch.testing.assert_close(values, plain.totals()[1])


# ---------------------------------------------------------------- scores of whole prompts


@pytest.mark.parametrize(
    "method", [sf.attribution.Exact(), sf.attribution.FiniteDifference(1e-3)], ids=repr
)
def test_the_slope_of_a_score_of_all_tokens(method):
    """Its change is a mean over tokens, its score a sum: the slope was their number too steep."""
    nn = wrapped(build("gpt2", F64))
    few = make_sae(dtype=F64).latents(range(0, 48, 4))
    whole = sf.Attribute(few, METRIC, method=method, where=sf.Tokens.last(3))(nn, RAGGED)
    assert (whole.position == -1).all()
    by_token = sf.Attribute(
        few, METRIC, method=sf.attribution.Exact(per="token"), where=sf.Tokens.last(3)
    )(nn, RAGGED)
    change = torch.zeros(3, 48).index_put_(
        (by_token.prompt, by_token.latent), by_token.change, accumulate=True
    )
    wanted = whole.score / change[whole.prompt, whole.latent]
    torch.testing.assert_close(whole.slope, wanted, atol=1e-5, rtol=1e-4)


def test_scores_of_whole_prompts_through_every_view(tmp_path):
    nn, sae = wrapped(build("llama")), make_sae()
    few = sae.latents(range(0, 48, 4))
    whole = sf.Attribute(few, METRIC, method=sf.attribution.Exact())(
        nn, RAGGED, batch_size=2
    )  # joined
    loaded = sf.attribution.Attribution.load(whole.save(tmp_path / "x.safetensors"), saes=[sae])
    for found in (whole, loaded):
        assert (found.position == -1).all() and found.prompt.unique().tolist() == [0, 1, 2]
        assert found.top(3) == whole.top(3) and len(found.top(3)) == 3
        assert len(found.top(3, per="prompt")) == 3
        keys, values, prompts = found.totals(per="prompt")
        effects = torch.zeros(3, 48).index_put_((prompts, keys[:, 1]), values)
        for one in few.singles():
            (_, index) = next(iter(one))
            moved = sf.metrics.measure(nn, RAGGED, METRIC, sf.Ablate(one)) - found.clean
            torch.testing.assert_close(
                effects[:, index] * found.tokens, moved, atol=2e-5, rtol=1e-3
            )
        assert sum(found.by_site().values()) == pytest.approx(float(found.score.sum()) / 3)
        table = found.to_pandas()
        assert (table["position"] == -1).all() and table["token"].isna().all()
        assert "no token has a score of its own" in found.to_html()
        assert "mean score" in found.plot_latents(5).figure.axes[1].get_ylabel()
        found.plot_cumulative()
        for ask in (
            functools.partial(found.top, 3, where=sf.Tokens.last(1)),
            functools.partial(found.by_position, origin="end"),
            found.plot_tokens,
        ):
            with pytest.raises(sf.SaefeatError, match=r"of whole prompts.*per=\"token\""):
                ask()


# ---------------------------------------------------------------- scores made in a trace


def test_scores_of_a_trace_through_every_view(tmp_path):
    nn, sae = wrapped(build("llama")), make_sae(excluded=(2,))
    prompts = [f"<bos> {prompt}" for prompt in RAGGED]
    job = sf.Attribute(sae, METRIC)
    with nn.trace(prompts):
        watching = job.watch(nn)
        scores = nnsight.save(watching.scores(nn.output.logits))
        other = nnsight.save(watching.scores(nn.output.logits[:, -1, 5]))
    outside = job(nn, prompts)
    assert scores.texts == outside.texts and torch.equal(scores.scored, outside.scored)
    assert scores.metric == repr(METRIC) and other.metric == "values of the trace"
    loaded = sf.attribution.Attribution.load(scores.save(tmp_path / "x.safetensors"), saes=[sae])
    rule = sf.Tokens.last(2)
    for found in (scores, loaded):
        assert found.by_position() == pytest.approx(outside.by_position(), abs=1e-5)
        torch.testing.assert_close(
            found.totals(where=rule)[1], outside.totals(where=rule)[1], atol=1e-6, rtol=1e-4
        )
        assert found.top(3, per="prompt") == outside.top(3, per="prompt")
        assert found.to_pandas()["token"].equals(outside.to_pandas()["token"])
        assert found.to_html().count("<span") == outside.to_html().count("<span")
        assert "nan" not in repr(found) + found.to_html() and "→" not in repr(found)
        assert found.gap.isnan().all() and not found.degenerate.any()
        found.plot_tokens(1)


def test_scores_of_one_invoke_know_its_own_tokens():
    nn, job = wrapped(build("llama")), sf.Attribute(make_sae(), METRIC)
    with nn.trace() as tracer:
        with tracer.invoke(RAGGED[:1]):
            one = nnsight.save(job.watch(nn).scores(nn.output.logits))
        with tracer.invoke(RAGGED[1:]):
            two = nnsight.save(job.watch(nn).scores(nn.output.logits))
    outside = job(nn, RAGGED)
    assert one.texts.ids + two.texts.ids == outside.texts.ids
    assert one.scored.tolist() == [True] * 3 and two.scored.tolist() == [True] * 10


def test_a_name_of_ones_own_cannot_break_the_page():
    named = sf.metrics.custom(lambda logits: logits[:, 5], "a\n<script>")
    found = sf.Attribute(make_sae(), named)(wrapped(build("llama")), RAGGED)
    assert "metric: a <script>" in repr(found).splitlines()[1]
    assert "<script>" not in found.to_html() and "&lt;script&gt;" in found.to_html()


def test_the_page_says_which_way_the_colors_go():
    assert "going to the baseline" in attribute().to_html()


# ---------------------------------------------------------------- kernels without a gradient


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of eager quantization
        return torch.ao.quantization.quantize_dynamic(build("llama"), {torch.nn.Linear})


@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("method", [sf.attribution.AtP(), sf.IG(2)], ids=repr)
def test_a_kernel_without_a_gradient_is_refused(method):
    """Dynamic int8: torch warns and goes on without that kernel's part; AtP was exactly 0."""
    model = wrapped(quantized())
    sae = make_sae("jumprelu")
    with pytest.raises(sf.errors.GradientError, match="kernel that has no gradient"):
        sf.Attribute(sae, sf.logit_diff(5, 6), method=method)(model, RAGGED)
    exact = sf.Attribute(sae.latents([3, 8]), sf.logit_diff(5, 6), method=sf.attribution.Exact())
    assert exact(model, RAGGED).score.abs().max() > 0


def test_edges_refuse_such_a_kernel_too():
    model = wrapped(quantized())
    up = make_sae("jumprelu", layer=0).latents([3, 8])
    down = make_sae("jumprelu", layer=1).latents([5])
    with pytest.raises(sf.errors.GradientError, match=r"edges: .*kernel that has no gradient"):
        sf.validation.edges(model, RAGGED, up, down, check=0)


def cut_off(module):
    """The module, in a forward pass that leaves no graph; the residual stream still has one."""
    module.forward = torch.no_grad()(module.forward)


@pytest.mark.parametrize(
    "part", ["layers.1.mlp", "layers.1.mlp.act_fn", "norm", "layers.1.self_attn.o_proj"]
)
def test_a_module_that_gradients_do_not_cross_is_refused(part):
    """Its part was missing from every score, without a word."""
    hf, sae = build("llama"), make_sae("jumprelu", layer=0)
    attribute, model = sf.Attribute(sae, sf.logit_diff(5, 6)), wrapped(hf)
    with model.trace(RAGGED[0]):
        scores = nnsight.save(attribute.watch(model).scores(model.output.logits))
    assert scores.provenance.model == attribute(model, RAGGED).provenance.model
    before = hook_count(hf)
    cut_off(hf.model.get_submodule(part))
    with pytest.raises(sf.errors.GradientError, match=rf"Attribute: .* end at model.{part}"):
        attribute(model, RAGGED)
    with (
        pytest.raises(Exception, match=rf"Attribute.watch: .* end at model.{part}"),
        model.trace(RAGGED[0]),
    ):
        watching = attribute.watch(model)
        nnsight.save(watching.scores(model.output.logits))
    assert hook_count(hf) == before
    exact = sf.Attribute(sae.latents([3, 8]), sf.logit_diff(5, 6), method=sf.attribution.Exact())
    assert exact(model, RAGGED).score.abs().max() > 0


def test_edges_refuse_a_module_that_gradients_do_not_cross():
    hf = build("llama")
    up, down = (make_sae("jumprelu", layer=n).latents([3, 8]) for n in (0, 1))
    cut_off(hf.model.layers[1].mlp)
    with pytest.raises(sf.errors.GradientError, match=r"edges: .* end at model.layers.1.mlp"):
        sf.validation.edges(wrapped(hf), RAGGED, up, down, check=0)


def test_a_gradient_that_is_zero_everywhere_is_no_result():
    """A metric behind a threshold moves, and its slope says that nothing does."""
    model, sae = wrapped(build("llama")), make_sae("jumprelu")
    clean = sf.run(model, RAGGED).logits[:, 5]

    def behind(logits):
        rise = logits[:, 5] - clean
        return rise * (rise.abs() > 1e-3)

    step = sf.metrics.custom(behind)
    rise = sf.Clamp(sf.Direction(torch.ones(D), site="resid_post.0"), add=30.0)
    with pytest.raises(sf.errors.GradientError, match="zero at every site while it changes"):
        sf.Attribute(sae, step, baseline=rise, method=sf.attribution.AtP())(model, RAGGED)
