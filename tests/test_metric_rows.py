"""A metric is one number a row, and each row's own: for one prompt as for many.

Exact effects, and what validation measures, put copies of one prompt in a batch: a metric that
mixes rows gave every latent the same score there, while a single prompt's looked right.
"""

from __future__ import annotations

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import RAGGED, VOCAB, D, build, make_sae, wrapped

ONE, TWO = RAGGED[:1], ["w1 w2 w3", "w4 w5 w6"]
EXACT, FINITE = sf.attribution.Exact(), sf.attribution.FiniteDifference()
METHODS = [EXACT, FINITE, sf.attribution.AtP(), sf.IG(2), sf.IG(16, "gauss", tolerance=0.5)]
MIXING = {
    "mean that keeps": lambda x: x[:, 3].mean(0, keepdim=True),
    "first row": lambda x: x[:1, 3],
    "last row": lambda x: x[-1:, 3],
    "mean for all": lambda x: x[:, 3].mean().expand(len(x)),
    "half centered": lambda x: x[:, 3] - 0.5 * x[:, 3].mean(),
    "centered, no gradient": lambda x: x[:, 3] - 0.5 * x[:, 3].mean().detach(),
    "normalized": lambda x: (x / x.norm())[:, 3],
    "softmax over rows": lambda x: x.softmax(0)[:, 3],
    "running sum": lambda x: x[:, 3].cumsum(0),
    "largest of all": lambda x: x[:, 3] - x.max(),
    "first row's token": lambda x: x[:, x[0].argmax()],
    "divided by the count": lambda x: x[:, 3] / len(x),
    "by its place": lambda x: x[:, 3] * torch.arange(1, len(x) + 1),
    "above the mean": lambda x: (x[:, 3] > x[:, 3].mean()).float(),
    "below the mean": lambda x: (x[:, 3] < x[:, 3].mean()).float(),
    "rank": lambda x: x[:, 3].argsort().argsort(),
    "reversed": lambda x: x[:, 3].flip(0),
    "random": lambda x: x[:, 3] + torch.rand(len(x)),
    "in place": lambda x: x.mul_(2)[:, 3],
}
SHAPES = {
    "scalar": lambda x: x[:, 3].mean(),
    "a column": lambda x: x[:, 3:4],
    "everything": lambda x: x,
    "vocabulary": lambda x: x.mean(0),
    "a list": lambda x: x[:, 3].tolist(),
    "numpy": lambda x: x[:, 3].detach().numpy(),
    "numpy of a graph": lambda x: x[:, 3].numpy(),
    "none": lambda x: None,
    "complex": lambda x: x[:, 3].to(torch.complex64),
    "outside": lambda x: x[:, 10**6],
}


@pytest.fixture(scope="module")
def nn():
    return wrapped(build("llama"))


@pytest.fixture(scope="module")
def few():
    return make_sae().latents(range(0, 48, 6))


@pytest.mark.parametrize("name", MIXING)
def test_a_metric_that_mixes_rows_is_refused_for_one_prompt(nn, few, name):
    metric = sf.metrics.custom(MIXING[name], name)
    for method in METHODS:
        with pytest.raises(sf.errors.GradientError, match="metric"):
            sf.Attribute(few, metric, method=method)(nn, ONE)
    for size in (1, 2):  # the last batch of three has one prompt
        with pytest.raises(sf.SaefeatError, match="metric"):
            sf.metrics.measure(nn, RAGGED, metric, batch_size=size)
    with pytest.raises(sf.errors.GradientError, match="metric"):
        sf.Attribute(few, metric, method=EXACT)(nn, RAGGED, batch_size=1)


@pytest.mark.parametrize("name", ["first row", "half centered", "in place"])
def test_validation_refuses_it_too(nn, few, name):
    metric = sf.metrics.custom(MIXING[name], name)
    scores = sf.Attribute(few, sf.metrics.logit(3))(nn, ONE)
    with pytest.raises(sf.SaefeatError, match="audit: `metric`"):
        sf.audit(sf.Attribute(few, metric), nn, ONE, scores, budget=4)
    with pytest.raises(sf.SaefeatError, match="interactions: `metric`"):
        sf.validation.interactions(nn, ONE, few, metric)
    with pytest.raises(sf.SaefeatError, match="minimal_set: `metric`"):
        sf.validation.minimal_set(nn, ONE, few, metric, holds=lambda x: x > -50)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("prompts", [ONE, TWO], ids=["one", "two"])
def test_what_is_not_one_real_number_a_prompt(nn, few, name, prompts):
    metric = sf.metrics.custom(SHAPES[name], name)
    for method in METHODS:
        with pytest.raises(sf.errors.GradientError, match="Attribute: `metric`"):
            sf.Attribute(few, metric, method=method)(nn, prompts)
    with pytest.raises(sf.SaefeatError, match="measure: `metric`"):
        sf.metrics.measure(nn, prompts, metric)
    with pytest.raises(sf.SaefeatError, match="interactions: `metric`"):
        sf.validation.interactions(nn, prompts, few, metric)


def test_a_site_metric_that_mixes_rows(nn, few):
    def mixing(x, mask):
        return x[:, -1, 0].mean(0, keepdim=True)

    def other_mask(x, mask):  # all rows by the first row's mask
        return x[:, mask[0].sum() - 1, 0]

    for function in (mixing, other_mask):
        metric = sf.metrics.at_site("resid_post.2", function)
        for method in (EXACT, sf.attribution.AtP()):
            with pytest.raises(sf.errors.GradientError, match="another prompt"):
                sf.Attribute(few, metric, method=method)(nn, ONE)


OWN = {
    "logit": lambda x: x[:, 3],
    "probability": lambda x: x.softmax(-1)[:, 3],
    "normalized": lambda x: ((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True))[:, 3],
    "entropy": lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1),
    "largest": lambda x: x.amax(-1),
    "likeliest": lambda x: x.argmax(-1),
    "whether": lambda x: x[:, 3] > x[:, 5],
    "constant": lambda x: torch.ones(len(x)),
    "product": lambda x: x @ torch.linspace(-1, 1, VOCAB),
    "wide": lambda x: x[:, 3].double(),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("method", [EXACT, FINITE], ids=repr)
def test_rows_of_their_own_have_their_exact_effects(nn, few, name, method):
    """Without gradients too; the oracle ablates one latent at a time, one prompt at a time."""
    metric = sf.metrics.custom(OWN[name], name)
    scores = sf.Attribute(few, metric, method=EXACT)(nn, RAGGED)
    for number, prompt in enumerate(RAGGED):
        clean = OWN[name](sf.run(nn, [prompt]).logits).double()
        assert sf.metrics.measure(nn, [prompt], metric)[0] == pytest.approx(float(clean), abs=1e-4)
        for i in range(0, 48, 6):
            edited = sf.run(nn, [prompt], sf.Ablate(make_sae().latents([i]))).logits
            chosen = (scores.prompt == number) & (scores.latent == i)
            found, wanted = scores.score[chosen].sum(), OWN[name](edited).double() - clean
            assert float(found) == pytest.approx(float(wanted), abs=2e-4)
    assert sf.Attribute(few, metric, method=method)(nn, RAGGED).score.isfinite().all()


def test_finite_differences_of_whole_numbers_are_not_cut_off(nn, few):
    """A score of ±½ was made a whole number between two moves."""
    whole = sf.metrics.custom(lambda x: (x[:, 3] * 1e4).round().long())
    plain = sf.metrics.custom(lambda x: (x[:, 3] * 1e4).round())
    one, other = (sf.Attribute(few, m, method=FINITE)(nn, RAGGED).score for m in (whole, plain))
    assert torch.equal(one, other) and other.abs().max() > 0


def test_a_function_that_holds_a_target_for_each_prompt(nn, few):
    """Right for all prompts in order; refused where rows are others."""
    targets = torch.tensor([5, 7])
    held = sf.metrics.custom(lambda x: x[torch.arange(len(targets)), targets])
    same = sf.metrics.logit(sf.metrics.PerPrompt([5, 7]))
    one, other = (sf.Attribute(few, metric)(nn, TWO).score for metric in (held, same))
    assert torch.allclose(one, other, atol=1e-6)
    assert torch.allclose(sf.metrics.measure(nn, TWO, held), sf.metrics.measure(nn, TWO, same))
    for method in (EXACT, FINITE, sf.IG(4)):
        for latents in (few, make_sae().latents([6])):  # of one latent a pass has as many rows
            job = sf.Attribute(latents, held, method=method)
            with pytest.raises(sf.errors.GradientError, match="metric"):
                job(nn, [*TWO, *TWO], batch_size=2)
    with pytest.raises(sf.SaefeatError, match="PerPrompt"):
        sf.metrics.measure(nn, [*TWO, *TWO], held, batch_size=2)


def test_measured_numbers_are_finite(nn):
    def zero(x):
        return (x[:, 3] * 0).log()

    metrics = {"nan": lambda x: x[:, 3] * float("nan"), "zero": zero}
    for name, function in metrics.items():
        with pytest.raises(sf.SaefeatError, match=r"measure: `metric` .* finite number"):
            sf.metrics.measure(nn, RAGGED, sf.metrics.custom(function, name))
    whether = sf.metrics.measure(nn, RAGGED, sf.metrics.custom(lambda x: x[:, 3] > x[:, 5]))
    assert whether.dtype == torch.float32 and set(whether.tolist()) <= {0.0, 1.0}


def test_the_functions_arguments():
    with pytest.raises(sf.SaefeatError, match=r"called with \(logits\)"):
        sf.metrics.custom(lambda x, mask: x[:, 3])
    with pytest.raises(sf.SaefeatError, match=r"called with \(logits, mask\)"):
        sf.metrics.custom(lambda x: x[:, -1, 3], tokens="all")
    with pytest.raises(sf.SaefeatError, match=r"called with \(value, mask\)"):
        sf.metrics.at_site("resid_post.2", lambda x: x[:, -1, 3])
    sf.metrics.custom(lambda *all_of_them: all_of_them[0][:, 3])


def test_values_of_a_trace_that_mix_prompts(nn, few):
    job = sf.Attribute(make_sae(), sf.metrics.logit(3))
    mixing = {
        "centered": lambda x: x[:, 3] - 0.5 * x[:, 3].mean(),
        "running sum": lambda x: x[:, 3].cumsum(0),
        "softmax": lambda x: x[:, 3].softmax(0),
    }
    for function in mixing.values():
        refused = pytest.raises(sf.errors.GradientError, match="other prompts")
        with refused, nn.trace(RAGGED):
            job.watch(nn).scores(function(nn.output.logits[:, -1]))
    with nn.trace(RAGGED):
        scores = nnsight.save(job.watch(nn).scores(nn.output.logits[:, -1, 3]))
    assert torch.allclose(scores.score, job(nn, RAGGED).score, atol=1e-6)


# ---------------------------------------------------------------- groups of tokens


@pytest.mark.parametrize(
    "make",
    [
        lambda: sf.metrics.logit([3, 3]),
        lambda: sf.metrics.logit(["w3", "w5", "w3"]),
        lambda: sf.logit_diff(["w3", "w3", "w5"], 7),
        lambda: sf.logit_diff(7, ["w3", "w5", "w3"]),
        lambda: sf.metrics.logit(sf.metrics.PerPrompt([3, [5, 5], 7])),
    ],
)
def test_a_token_twice_in_a_group(nn, make):
    with pytest.raises(sf.errors.PromptError, match=r"token \d+ twice"):
        sf.metrics.measure(nn, RAGGED, make())


def test_a_word_beside_its_own_id(nn):
    number = nn.tokenizer("w3")["input_ids"][0]
    with pytest.raises(sf.errors.PromptError, match=f"token {number} twice, as 'w3' and {number}"):
        sf.metrics.measure(nn, RAGGED, sf.metrics.logit(["w3", number]))
    with pytest.raises(sf.errors.PromptError, match=f"token {number}, which `negative` has"):
        sf.metrics.measure(nn, RAGGED, sf.logit_diff(["w3", 9], number))


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        (5, 5),
        ([5, 6], [7, 6]),
        (sf.metrics.PerPrompt([5, 6, 7]), 6),
        (9, sf.metrics.PerPrompt([5, [6, 9], 7])),
        (sf.metrics.PerPrompt([5, 6, 7]), sf.metrics.PerPrompt([6, 7, [8, 7]])),
        (sf.metrics.BASELINE_TOP, sf.metrics.BASELINE_TOP),
    ],
)
def test_a_token_on_both_sides(nn, positive, negative):
    with pytest.raises(sf.errors.PromptError, match="which `negative` has as well"):
        sf.metrics.measure(nn, RAGGED, sf.logit_diff(positive, negative))


def test_the_same_tokens_for_different_prompts(nn):
    each = sf.metrics.PerPrompt
    values = sf.metrics.measure(nn, RAGGED, sf.logit_diff(each([5, 6, 5]), each([6, 5, 7])))
    logits = sf.run(nn, RAGGED).logits
    wanted = torch.stack(
        [logits[n, a] - logits[n, b] for n, (a, b) in enumerate([(5, 6), (6, 5), (5, 7)])]
    )
    assert torch.allclose(values, wanted, atol=1e-5)


# ---------------------------------------------------------------- KL


def test_what_kl_compares_with(nn):
    nothing = torch.full((VOCAB,), float("nan"))
    for wrong in (nothing, torch.full((VOCAB,), -torch.inf), torch.full((3, VOCAB), torch.inf)):
        with pytest.raises(sf.SaefeatError, match="no distribution in row 0"):
            sf.metrics.kl(wrong)
    with pytest.raises(sf.SaefeatError, match="probabilities"):
        sf.metrics.kl(torch.randn(3, VOCAB).softmax(-1))
    with pytest.raises(sf.SaefeatError, match=f"{VOCAB + 1} tokens, wanted the model's {VOCAB}"):
        sf.metrics.measure(nn, RAGGED, sf.metrics.kl(torch.zeros(VOCAB + 1)))
    with pytest.raises(sf.SaefeatError, match="1 tokens, wanted"):
        sf.metrics.measure(nn, RAGGED, sf.metrics.kl(torch.zeros(1)))


def test_kl_from_a_run_in_which_a_token_cannot_come(nn, few):
    """0 · log 0 is 0, in the number and in its gradient."""
    reference = torch.linspace(-1, 1, VOCAB)
    reference[3] = -torch.inf
    log_probs = sf.run(nn, RAGGED).logits.double().log_softmax(-1)
    p, others = reference.double().softmax(-1), torch.arange(VOCAB) != 3
    wanted = (p * (p.log() - log_probs))[:, others].sum(-1)
    metric = sf.metrics.kl(reference)
    assert torch.allclose(sf.metrics.measure(nn, RAGGED, metric).double(), wanted, atol=1e-5)
    neurons = sf.Neurons("resid_post.2", D)
    gradient = sf.Attribute(neurons, metric)(nn, RAGGED)
    assert gradient.score.isfinite().all() and gradient.score.abs().max() > 0
