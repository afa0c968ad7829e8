"""Metrics of Attribute: each against its plain formula, in runs and in gradients.

The oracle of a gradient is the neuron basis: with latents that are the coordinates of a site, a
score is minus the value times the metric's slope there, and autograd on the bare model gives it.
"""

from __future__ import annotations

import pytest
import torch

import saefeat as sf
from helpers import PAD, RAGGED, VOCAB, D, batch_of, build, make_sae, tokenizer, unit, wrapped

F64 = torch.float64
SITE = "resid_post.0"
NEURONS = sf.Neurons(SITE, D)


def prompt_rows(prompts=RAGGED) -> list[list[int]]:
    return [tokenizer()(p)["input_ids"] for p in prompts]


def slopes_by_hand(model, rows, function, layer=0):
    """[(value, slope) a prompt]: bare runs one prompt at a time, ``function(logits, hidden)``."""
    found = []
    for number, row in enumerate(rows):
        held = {}

        def start(_, __, out, held=held):
            held["x"] = out.detach().requires_grad_()
            return held["x"]

        def later(_, __, out, held=held):
            held["y"] = out

        blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
        hooks = [
            blocks[layer].register_forward_hook(start),
            blocks[2].register_forward_hook(later),
        ]
        try:
            logits = model(torch.tensor([row])).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        value = function(number, logits, held["y"][0])
        (slope,) = torch.autograd.grad(value, held["x"])
        found.append((value.item(), -(held["x"].detach() * slope)[0]))
    return found


def agree(scores, wanted, lengths=None):
    """Neuron scores against −x · slope on each prompt's own tokens."""
    for number, (value, table) in enumerate(wanted):
        length = len(table) if lengths is None else lengths[number]
        rows = scores.prompt == number
        found = torch.zeros(len(table), D)
        found[scores.position[rows], scores.latent[rows]] = scores.score[rows]
        assert not found[length:].any()
        torch.testing.assert_close(found[:length], table[:length].float(), atol=2e-5, rtol=1e-4)
        assert found.abs().max() > 1e-4
        torch.testing.assert_close(scores.clean[number], torch.tensor(value), atol=1e-5, rtol=1e-5)


def last(function):
    return lambda number, logits, hidden: function(number, logits[-1])


# ---------------------------------------------------------------- per prompt


def test_targets_that_differ_by_prompt():
    model = build("llama")
    wanted, wrong = [5, 9, 13], [[7, 8], [2], [40, 41, 42]]
    metric = sf.logit_diff(sf.metrics.PerPrompt(wanted), sf.metrics.PerPrompt(wrong))

    def by_hand(n, logits):
        return logits[wanted[n]] - logits[wrong[n]].logsumexp(0)

    scores = sf.Attribute(NEURONS, metric)(wrapped(model), RAGGED, batch_size=2)
    agree(scores, slopes_by_hand(model, prompt_rows(), last(by_hand)))
    words = sf.logit_diff(sf.metrics.PerPrompt(["w1", "w5", "w9"]), sf.metrics.PerPrompt(wrong))
    same = sf.Attribute(NEURONS, words)(wrapped(model), RAGGED)
    torch.testing.assert_close(same.clean, scores.clean)


def test_targets_follow_their_prompts_through_copies_of_rows():
    nn = wrapped(build("llama"))
    job = sf.Attribute(
        make_sae(), sf.metrics.logit(sf.metrics.PerPrompt([5, 9, 13])), method=sf.IG(4)
    )
    one = job(nn, RAGGED, steps_at_once=1)
    many = job(nn, RAGGED, steps_at_once=3)
    torch.testing.assert_close(many.score, one.score, atol=1e-6, rtol=1e-4)


def test_values_for_other_prompts():
    nn = wrapped(build("llama"))
    for metric in (
        sf.metrics.logit(sf.metrics.PerPrompt([5, 9])),
        sf.metrics.log_prob(sf.metrics.PerPrompt([[5], [9]])),
    ):
        with pytest.raises(sf.errors.PromptError, match="2 prompts"):
            sf.Attribute(NEURONS, metric)(nn, RAGGED)
        with pytest.raises(sf.errors.PromptError, match="2 prompts"):
            sf.metrics.measure(nn, RAGGED, metric)
    with pytest.raises(sf.errors.PromptError, match="2 and 3"):
        sf.logit_diff(sf.metrics.PerPrompt([1, 2]), sf.metrics.PerPrompt([1, 2, 3]))
    for empty in ([], "text"):
        with pytest.raises(sf.errors.PromptError, match="one value a prompt"):
            sf.metrics.PerPrompt(empty)


# ---------------------------------------------------------------- continuations


MORE = [[5, 9, 4], [7], [30, 31]]


def log_prob_by_hand(model, row, more) -> torch.Tensor:
    logits = model(torch.tensor([row + more])).logits[0].log_softmax(-1)
    return sum(logits[len(row) - 1 + n, token] for n, token in enumerate(more))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_log_probability_of_a_continuation(family):
    model, rows = build(family), prompt_rows()
    metric = sf.metrics.log_prob(sf.metrics.PerPrompt(MORE))
    with torch.no_grad():
        wanted = torch.stack(
            [log_prob_by_hand(model, row, more) for row, more in zip(rows, MORE, strict=True)]
        )
    found = sf.metrics.measure(wrapped(model), RAGGED, metric)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    fed = [row + more[:-1] for row, more in zip(rows, MORE, strict=True)]

    def by_hand(n, logits, hidden):
        logits = logits.log_softmax(-1)[-len(MORE[n]) :]
        return sum(logits[k, token] for k, token in enumerate(MORE[n]))

    scores = sf.Attribute(NEURONS, metric)(wrapped(model), RAGGED)
    assert scores.tokens.tolist() == [3, 6, 4], "only the prompt's own tokens are scored"
    agree(scores, slopes_by_hand(model, fed, by_hand), [3, 6, 4])
    every = sf.Attribute(NEURONS, metric, where=sf.Tokens.all())(wrapped(model), RAGGED)
    assert every.tokens.tolist() == [5, 6, 5]
    agree(every, slopes_by_hand(model, fed, by_hand))


def test_token_rules_see_a_continuation_as_generated():
    nn, metric = wrapped(build("llama")), sf.metrics.log_prob(sf.metrics.PerPrompt(MORE))
    where = sf.Tokens.last(1) | sf.Tokens.generated()
    scores = sf.Attribute(NEURONS, metric, where=where)(nn, RAGGED)
    places = [sorted(set(scores.position[scores.prompt == n].tolist())) for n in range(3)]
    assert places == [[2, 3, 4], [5], [3, 4]]


def test_one_continuation_for_all_and_as_text():
    nn = wrapped(build("llama"))
    shared = sf.metrics.measure(nn, RAGGED, sf.metrics.log_prob([5, 9]))
    text = sf.metrics.measure(nn, RAGGED, sf.metrics.log_prob("w1 w5"))
    each = sf.metrics.measure(
        nn, RAGGED, sf.metrics.log_prob(sf.metrics.PerPrompt([[5, 9]] * 3)), batch_size=1
    )
    torch.testing.assert_close(shared, text)
    torch.testing.assert_close(shared, each, atol=1e-5, rtol=1e-5)
    single = sf.metrics.measure(nn, RAGGED, sf.metrics.log_prob([5]))
    wanted = sf.run(nn, RAGGED).logits.log_softmax(-1)[:, 5]
    torch.testing.assert_close(single, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", ["", [], 5, [VOCAB], [-1], ["w1", "w2"]])
def test_a_continuation_that_is_none(wrong):
    with pytest.raises(sf.errors.PromptError, match="continuation"):
        sf.Attribute(NEURONS, sf.metrics.log_prob(wrong))(wrapped(build("llama")), RAGGED)


# ---------------------------------------------------------------- distributions


def test_kl_to_the_clean_run():
    model, nn = build("llama"), wrapped(build("llama"))
    edit = sf.Clamp(sf.Direction(unit(3), site="resid_post.0"), add=3.0)
    clean, edited = sf.run(nn, RAGGED).logits, sf.run(nn, RAGGED, edit).logits
    p, q = clean.log_softmax(-1), edited.log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1)
    assert wanted.min() > 1e-3
    torch.testing.assert_close(
        sf.metrics.measure(nn, RAGGED, sf.metrics.kl(), edit), wanted, atol=1e-5, rtol=1e-4
    )
    scores = sf.Attribute(NEURONS, sf.metrics.kl(), baseline=edit, method=sf.IG(64, "gauss"))(
        wrapped(model), RAGGED
    )
    torch.testing.assert_close(scores.clean, torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.baseline, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.gap, torch.zeros(3), atol=2e-4, rtol=0)


def test_kl_to_the_baseline_and_to_given_logits():
    nn = wrapped(build("llama"))
    edit = sf.Clamp(sf.Direction(unit(3), site="resid_post.0"), add=3.0)
    base = sf.run(nn, RAGGED, edit).logits
    to_base = sf.Attribute(NEURONS, sf.metrics.kl("baseline"), baseline=edit)(
        nn, RAGGED, batch_size=2
    )
    given = sf.Attribute(NEURONS, sf.metrics.kl(base), baseline=edit)(nn, RAGGED, batch_size=2)
    torch.testing.assert_close(given.score, to_base.score, atol=1e-6, rtol=1e-4)
    assert to_base.clean.min() > 1e-3 and to_base.baseline.abs().max() < 1e-5
    probabilities = sf.metrics.measure(nn, RAGGED, sf.metrics.kl(base[0].log_softmax(-1)))
    logits = sf.metrics.measure(nn, RAGGED, sf.metrics.kl(base[0]))
    torch.testing.assert_close(probabilities, logits)


def test_kl_where_it_has_no_slope_or_no_reference():
    """The gradient of a divergence is zero where it is: zeros would read as 'no effect'."""
    with pytest.raises(sf.errors.GradientError, match="no slope"):
        sf.Attribute(NEURONS, sf.metrics.kl())
    with pytest.raises(sf.SaefeatError, match="baseline"):
        sf.metrics.measure(wrapped(build("llama")), RAGGED, sf.metrics.kl("baseline"))
    for wrong in ("steered", torch.zeros(2, 3, 4), torch.zeros(4, dtype=torch.long)):
        with pytest.raises(sf.SaefeatError, match="clean"):
            sf.metrics.kl(wrong)


# ---------------------------------------------------------------- all logits, and sites


def test_a_function_of_all_logits():
    model, rows = build("llama"), prompt_rows()

    def loss(logits, mask):  # the text's own log-probability: pads must not count
        ids = batch_of()["input_ids"][-len(logits) :] if len(logits) == 3 else None
        log_probs = logits[:, :-1].log_softmax(-1)
        chosen = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (chosen * (mask[:, :-1] & mask[:, 1:])).sum(1)

    def by_hand(n, logits, hidden):
        log_probs = logits[:-1].log_softmax(-1)
        return log_probs.gather(-1, torch.tensor(rows[n])[1:, None]).sum()

    scores = sf.Attribute(NEURONS, sf.metrics.custom(loss, "text", tokens="all"))(
        wrapped(model), RAGGED
    )
    agree(scores, slopes_by_hand(model, rows, by_hand))
    with pytest.raises(sf.SaefeatError, match="all"):
        sf.metrics.custom(loss, tokens="every")


def test_only_the_logits_that_are_read_are_computed():
    """Memory of [b, t, vocabulary] is for metrics that look there."""
    model, widths = build("llama"), []
    model.lm_head.register_forward_hook(lambda m, a, out: widths.append(out.shape[1]))
    for metric in (
        sf.metrics.logit(5),
        sf.metrics.log_prob([5, 9, 4]),
        sf.metrics.custom(lambda x, m: x[:, -1, 5], tokens="all"),
    ):
        sf.Attribute(NEURONS, metric)(wrapped(model), RAGGED)
    assert widths == [1, 1, 3, 3, 6, 6]


def test_a_function_of_a_sites_value():
    model = build("llama")

    def norm(x, mask):
        return (x.norm(dim=-1) * mask).sum(1)

    def by_hand(n, logits, hidden):
        return hidden.norm(dim=-1).sum()

    scores = sf.Attribute(NEURONS, sf.metrics.at_site("resid_post.2", norm))(wrapped(model), RAGGED)
    agree(scores, slopes_by_hand(model, prompt_rows(), by_hand))


def test_a_downstream_latent_and_a_projection():
    model, v = build("llama"), sf.Direction(unit(4), site="resid_post.2")
    sae = make_sae(layer=2)

    def projected(n, logits, hidden):
        return hidden[-1] @ unit(4)

    scores = sf.Attribute(NEURONS, sf.metrics.activation(v))(wrapped(model), RAGGED)
    agree(scores, slopes_by_hand(model, prompt_rows(), projected))
    chosen = sae.latents([3, 8, 17, 20, 21, 33])

    def active(n, logits, hidden):
        return sae.encode(hidden[-2:], [3, 8, 17, 20, 21, 33]).sum()

    metric = sf.metrics.activation(chosen, sf.Tokens.last(2))
    scores = sf.Attribute(NEURONS, metric)(wrapped(model), RAGGED)
    agree(scores, slopes_by_hand(model, prompt_rows(), active))
    assert sf.metrics.measure(wrapped(model), RAGGED, metric).tolist() == pytest.approx(
        scores.clean.tolist(), abs=1e-5
    )


@pytest.mark.parametrize("site", ["resid_mid.2", "mlp_norm.2"])
def test_sites_that_are_no_modules_output(site):
    """resid_mid is a sum, mlp_norm is computed: the metric sees what a Probe reads."""
    nn, sae = wrapped(build("gemma2")), make_sae(site=site, write_site=site)
    metric = sf.metrics.activation(sae.latents([3, 8, 17]), sf.Tokens.all())
    readings = sf.run(nn, RAGGED, sf.Probe(sae.latents([3, 8, 17]))).readings[0]
    wanted = torch.where(readings.mask, readings.values, 0.0).sum((1, 2))
    scores = sf.Attribute(sf.Neurons("resid_post.1", D), metric)(nn, RAGGED)
    torch.testing.assert_close(scores.clean, wanted, atol=1e-4, rtol=1e-4)
    assert scores.score.abs().max() > 1e-3


def test_sites_behind_the_metrics_own_are_refused():
    nn, v = wrapped(build("llama")), sf.Direction(unit(4), site="resid_post.1")
    with pytest.raises(sf.errors.SiteError, match=r"resid_post\.2"):
        sf.Attribute(sf.Neurons("resid_post.2", D), sf.metrics.activation(v))(nn, RAGGED)
    with pytest.raises(sf.errors.LatentError, match="2 dictionaries"):
        sf.metrics.activation(make_sae(layer=0).latents([1]) | make_sae(layer=2).latents([1]))


# ---------------------------------------------------------------- degenerate samples


def test_degenerate_samples_are_counted():
    nn = wrapped(build("llama"))
    nothing = sf.Clamp(make_sae(), scale=1.0)
    found = sf.Attribute(make_sae(), sf.metrics.logit(5), baseline=nothing)(nn, RAGGED)
    assert found.degenerate.all() and "3 degenerate" in repr(found)
    moved = sf.Attribute(make_sae(), sf.metrics.logit(5))(nn, RAGGED)
    assert not moved.degenerate.any() and "degenerate" not in repr(moved)


def test_values_by_prompt_meet_their_own_prompts():
    nn, metric = wrapped(build("llama")), sf.logit_diff(sf.metrics.PerPrompt([0, 1]), 2)
    logits = sf.run(nn, RAGGED[:2]).logits
    found = sf.metrics.measure(nn, RAGGED[:2], metric, batch_size=1)
    torch.testing.assert_close(found, logits[[0, 1], [0, 1]] - logits[:, 2], atol=1e-5, rtol=1e-5)
    with pytest.raises(sf.errors.PromptError, match="2 prompts"):
        sf.metrics.measure(nn, RAGGED, metric)


def test_pads_do_not_matter():
    """The same prompt alone, and padded beside longer ones."""
    nn = wrapped(build("gemma2"))
    sae = make_sae(layer=2)
    metrics = [
        sf.metrics.log_prob([5, 9, 4]),
        sf.metrics.kl(torch.zeros(VOCAB)),
        sf.metrics.activation(sae, sf.Tokens.all()),
        sf.metrics.at_site("resid_post.2", lambda x, mask: (x.norm(dim=-1) * mask).sum(1)),
    ]
    assert PAD == 0
    for metric in metrics:
        together = sf.metrics.measure(nn, RAGGED, metric)
        alone = torch.cat([sf.metrics.measure(nn, [prompt], metric) for prompt in RAGGED])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("token", ["do.", " do.", "bake bread", "doyou", "qqqq", "", "."])
def test_a_suggested_token_is_one_token(token):
    """It suggested " I'm", which is as many tokens as "I'm"."""
    import re

    from test_roles import tokenizer as bpe

    text = bpe("ChatML")
    if len(text(token)["input_ids"]) == 1:
        return
    with pytest.raises(sf.errors.PromptError, match="wanted one known token") as caught:
        sf.logit_diff(token, 5).reader(text)
    call = str(caught.value).partition("Try: ")[2]
    named = re.search(r"logit_diff\((['\"])(.*)\1, \.\.\.\)", call)
    assert named or "an id" in call
    if named:
        assert len(text(named[2], add_special_tokens=False)["input_ids"]) == 1


def test_words_need_a_tokenizer():
    with pytest.raises(sf.errors.PromptError, match="without a tokenizer"):
        sf.logit_diff("Here", 5).reader(None)
