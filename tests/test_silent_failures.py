"""The silent failures of this field, one named test each.

Every one of them was met in a published tool or paper, gave numbers, and said nothing. Each test
shows that our number is the right one and, where that is cheap, what the wrong way gives, so that
it cannot pass for the wrong reason.
"""

from __future__ import annotations

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import (
    BOS,
    D_SAE,
    EOS,
    PAD,
    RAGGED,
    D,
    batch_of,
    build,
    capture_inputs_outputs,
    forward,
    hook_count,
    make_sae,
    raw_hooks,
    tensors_for,
    tokenizer,
    unit,
    wrapped,
)

F64 = torch.float64
NEW = 5


def V(layer=1, seed=5):
    return sf.Direction(unit(seed), site=f"resid_post.{layer}")


def logits(model, batch, step=None):
    """[b, t, v], edited by the step; whole batch, pads and all."""
    if step is None:
        return forward(model, batch)
    with torch.no_grad(), sf.hooked(model, step):
        return forward(model, batch)


def readings(model, batch, step):
    with torch.no_grad(), sf.hooked(model, step) as log:
        forward(model, batch)
    return step.readings(log)


def residual(model, batch, layer=1):
    """The residual stream after a block, by a plain hook."""
    block = model.model.layers[layer]
    return capture_inputs_outputs(model, {"x": block}, batch)["x"]["output"]


def positioned(batch):
    """With the positions that generate, nnsight and ``forward`` give."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def close(found, wanted, tolerance=1e-4):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- the wrong tensor


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_wrong_tensor_on_sandwich_norm_models(family):
    """mlp_out is what is added to the stream: the norm's output (FVU 9.8 instead of .26)."""
    model, batch = build(family), batch_of()
    layer = model.model.layers[1]
    modules = {"mlp": layer.mlp, "norm": layer.post_feedforward_layernorm, "block": layer}
    seen = capture_inputs_outputs(model, modules, positioned(batch))
    (found,) = readings(model, batch, sf.Probe(sf.Neurons("mlp_out.1", D)))
    assert torch.equal(found.values, seen["norm"]["output"])
    assert (found.values - seen["mlp"]["output"]).abs().max() > 0.1


def test_transcoder_fed_the_wrong_norm():
    """hook_normalized is the norm without its weight; with it, latents are others'."""
    model, batch = build("llama"), batch_of()
    sae = make_sae("transcoder")
    norm = model.model.layers[1].post_attention_layernorm
    seen = capture_inputs_outputs(model, {"n": norm}, positioned(batch))["n"]
    x = seen["input"]
    plain = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    (found,) = readings(model, batch, sf.Probe(sae.latents([1, 2])))
    close(found.values, sae.encode(plain, [1, 2]))
    assert (found.values - sae.encode(seen["output"], [1, 2])).abs().max() > 0.05


def test_gradient_of_the_norms_input_read_as_that_of_its_output():
    """hook_normalized is computed, not passed on: no gradient is taken there."""
    nn = wrapped(build("llama"))
    v = sf.Direction(unit(), site="mlp_norm.1")
    with pytest.raises(sf.errors.SiteError, match="not passed on"):
        sf.Attribute(v, sf.logit_diff(5, 6))(nn, RAGGED)
    with pytest.raises(sf.errors.SiteError, match="not passed on"):
        sf.run(nn, RAGGED, sf.Ablate(v))


# ---------------------------------------------------------------- the wrong token


@pytest.mark.parametrize("way", ["edit", "inline", "run", "hooked"])
def test_steering_fires_once(way):
    """On every token, not on the first pass of a generation alone (1 of 6)."""
    model, batch = build("llama"), batch_of()
    v, step = unit(5), sf.Clamp(V(), 40.0)

    def push(x):
        return x + (40.0 - x @ v)[..., None] * v

    def once(x):
        return push(x) if x.shape[1] > 1 else x

    def generated(nn):
        return nn.generate(**batch, max_new_tokens=NEW, do_sample=False)[:, 6:]

    with raw_hooks(model, {1: push}):
        wanted = generated(model)
    with raw_hooks(model, {1: once}):
        wrong = generated(model)
    if way == "hooked":
        with sf.hooked(model, step):
            found = generated(model)
    elif way == "run":
        found = torch.tensor(sf.run(wrapped(model), batch, step, max_new_tokens=NEW).completions)
    else:
        nn = wrapped(model) if way == "inline" else sf.edit(wrapped(model), step)
        with nn.generate(max_new_tokens=NEW, do_sample=False) as tracer:
            with tracer.invoke(batch):
                if way == "inline":
                    step(nn)
            with tracer.invoke():
                found = nnsight.save(tracer.result)
        found = found[:, 6:]
    assert torch.equal(found, wanted) and not torch.equal(found, wrong)


def test_off_by_one_at_the_first_new_token():
    """The first new token comes of the prompt's last; what `generated` edits comes later."""
    model = build("llama")
    nn = wrapped(model)
    bare = sf.run(nn, RAGGED, max_new_tokens=2)
    late = sf.run(nn, RAGGED, sf.Clamp(V(2), 60.0, where=sf.Tokens.generated()), max_new_tokens=2)
    last = sf.run(nn, RAGGED, sf.Clamp(V(2), 60.0, where=sf.Tokens.last(1)), max_new_tokens=2)
    first = [[row[0] for row in out.completions] for out in (bare, late, last)]
    assert torch.equal(bare.logits, late.logits) and first[0] == first[1] != first[2]
    assert late.completions != bare.completions


def test_column_index_hits_a_left_pad():
    """first(1) is a row's first real token; column 0 of a padded row is a pad (.29 apart)."""
    model, batch = build("llama"), batch_of()
    step = sf.Clamp(V(), 40.0, where=sf.Tokens.first(1))
    found = logits(model, batch, step)[:, -1]
    alone = [logits(model, batch_of([p]), step)[:, -1] for p in RAGGED]
    close(found, torch.cat(alone))

    def column(x):
        v = unit(5)
        x = x.clone()
        x[:, 0] += (40.0 - x[:, 0] @ v)[:, None] * v
        return x

    with torch.no_grad(), raw_hooks(model, {1: column}):
        wrong = forward(model, batch)[:, -1]
    apart = (wrong - found).abs().amax(-1)
    assert apart[1] < 1e-3 and apart[0] > 0.1 and apart[2] > 0.1  # row 1 has no pad


def test_bos_and_special_tokens_are_included():
    """BOS has a norm and latents of its own; a dictionary says what it was not trained on."""
    model = build("llama")
    batch = batch_of([[BOS, 10, 11, EOS, 12], [20, 21]])
    sae, naive = make_sae(excluded="special"), make_sae()
    ours = sf.run(wrapped(model), batch, sf.Probe(sae.latents([4, 9]))).readings[0]
    wrong = sf.run(wrapped(model), batch, sf.Probe(naive.latents([4, 9]))).readings[0]
    f = sae.encode(residual(model, batch), [4, 9])
    kept = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 1, 1]]).bool()
    assert torch.equal(ours.mask[..., 0], kept)
    close(ours.mean(), f[kept].mean(0), 1e-3)
    assert (ours.mean() - wrong.mean()).abs().max() > 1e-3


def test_double_bos():
    """A string that begins with BOS already gets no second one."""
    text = tokenizer()
    for prompt in ("<bos> w1 w2", "w1 w2"):
        ids = sf.text.prompts.encode_prompts(text, [prompt])["input_ids"]
        assert (ids == BOS).sum() == prompt.count("<bos>")


def test_padding_side_changed():
    """Somebody set padding_side; prompts still end in the last column, and rows stay themselves."""
    text, nn = tokenizer(), wrapped(build("llama"))
    step = sf.Clamp(V(), 40.0, where=sf.Tokens.last(1)) | sf.Probe(V())
    wanted = sf.run(nn, RAGGED, step, max_new_tokens=3)
    try:
        text.padding_side = "right"
        wrong = text(RAGGED, padding=True, return_tensors="pt")["attention_mask"][:, -1]
        found = sf.run(nn, RAGGED, step, max_new_tokens=3)
    finally:
        text.padding_side = "left"
    assert not wrong.all(), "the tokenizer alone would pad on the right"
    assert found.completions == wanted.completions
    assert torch.equal(found.readings[0].values, wanted.readings[0].values)


def test_pads_counted_in_sums():
    """A mean over columns divides by padding too."""
    model, batch = build("llama"), batch_of()
    (found,) = readings(model, batch, sf.Probe(make_sae().latents([4, 9, 11])))
    alone = [readings(model, batch_of([p]), sf.Probe(make_sae().latents([4, 9, 11])))[0].values[0]
             for p in RAGGED]  # fmt: skip
    close(found.mean(), torch.cat(alone).mean(0))
    assert (found.values.mean((0, 1)) - found.mean()).abs().max() > 1e-3


def test_attribution_averaged_over_pads_and_bos():
    """Only scored tokens are scored, and they alone divide."""
    model = build("llama")
    nn = wrapped(model)
    sae = make_sae(excluded=(BOS,))
    prompts = [[BOS, 10, 11, 12, 13, 14], [BOS, 20, 21]]
    scores = sf.Attribute(sae, sf.logit_diff(5, 6))(nn, prompts)
    assert scores.tokens.tolist() == [5, 2]
    pairs = set(zip(scores.prompt.tolist(), scores.position.tolist(), strict=True))
    assert pairs <= {(0, p) for p in range(1, 6)} | {(1, 1), (1, 2)} and (1, 1) in pairs
    alone = [sf.Attribute(sae, sf.logit_diff(5, 6))(nn, [p]) for p in prompts]
    for row, one in enumerate(alone):
        mine = scores.score[scores.prompt == row]
        close(mine.sum(), one.score.sum())


# ---------------------------------------------------------------- the wrong dictionary


def test_sae_of_another_model():
    """Width cannot tell two models of one size apart: verify can."""
    model = build("llama")
    nn = wrapped(model)
    with pytest.raises(sf.errors.SiteError, match="32, as LlamaForCausalLM"):
        sf.run(nn, RAGGED, sf.Ablate(sf.Direction(torch.ones(48), site="resid_post.1")))
    with pytest.raises(sf.errors.SiteError, match="another model"):
        sf.verify(nn, make_sae(), RAGGED)  # random: explains nothing of this model


def test_sae_of_another_layer():
    """A layer the model lacks is refused; one it has is a matter for verify."""
    nn = wrapped(build("llama"))
    with pytest.raises(sf.errors.SiteError, match=r"0\.\.2"):
        sf.run(nn, RAGGED, sf.Ablate(sf.Direction(torch.ones(D), site="resid_post.3")))
    model = build("llama")
    found = {}
    for layer in (0, 1):
        x = residual(model, batch_of(), layer)[batch_of()["attention_mask"].bool()]
        (reading,) = readings(model, batch_of(), sf.Probe(V(layer)))
        found[layer] = reading.values[reading.mask]
        close(found[layer], x @ unit(5))
    assert (found[0] - found[1]).abs().max() > 0.1


def test_latent_index_of_another_width():
    """Index 40,000 of a 65k dictionary means nothing in one of 16k."""
    with pytest.raises(sf.errors.LatentError, match=rf"0\.\.{D_SAE - 1}"):
        make_sae().latents([D_SAE])


@pytest.mark.parametrize("index", [-1, 10**9, 2.5, True])
def test_latent_index_negative_or_out_of_range(index):
    """tensor[-1] is the last latent, and tensor[True] a mask: no error in torch."""
    with pytest.raises(sf.errors.LatentError):
        make_sae().latents([index])


def test_topk_read_as_relu():
    """Without the k-th largest as a bar, every positive pre-activation counts (L0 600 for 80)."""
    tensors, x = tensors_for("topk"), torch.randn(4, D)
    sae = make_sae("topk", k=7)
    found = sae.encode(x)
    relu = torch.relu((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"])
    assert (found > 0).sum(-1).max() <= 7 < (relu > 0).sum(-1).min()
    kept = found > 0
    close(found[kept], relu[kept], 1e-5)
    some = sae.encode(x, [3, 40, 17])  # a selection still competes with all the others
    assert torch.equal(some, found[:, [3, 40, 17]])


NORMED = ["layer_norm", "constant_norm_rescale"]


def by_the_book(norm, x, tensors):
    """(latents, reconstruction) with the normalization written out."""
    if norm == "layer_norm":
        mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        z = (x - mean) / (scale + 1e-5)
    else:
        mean, scale = 0.0, x.norm(dim=-1, keepdim=True) / D**0.5
        z = x / scale
    f = torch.relu((z - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"])
    return f, (f @ tensors["W_dec"] + tensors["b_dec"]) * scale + mean


@pytest.mark.parametrize("norm", NORMED)
def test_normalization_skipped(norm):
    """The SAE was trained on normalized inputs."""
    x, tensors = 5 + 9 * torch.randn(3, D, dtype=F64), tensors_for("standard", dtype=F64)
    sae = make_sae(norm=norm, dtype=F64)
    close(sae.encode(x), by_the_book(norm, x, tensors)[0], 1e-9)
    assert (sae.encode(x) - make_sae(dtype=F64).encode(x)).abs().max() > 1


@pytest.mark.parametrize("norm", NORMED)
def test_normalization_half_folded(norm):
    """A normalized input needs its directions scaled back."""
    x, tensors = 5 + 9 * torch.randn(3, D, dtype=F64), tensors_for("standard", dtype=F64)
    sae = make_sae(norm=norm, dtype=F64)
    f, wanted = by_the_book(norm, x, tensors)
    close(sae.reconstruct(x), wanted, 1e-9)
    assert (f @ tensors["W_dec"] + tensors["b_dec"] - wanted).abs().max() > 1
    x, f = x[None], f[None]
    moved = f[..., [3, 40]] @ tensors["W_dec"][[3, 40]]
    sizes = {"layer_norm": x.std(-1), "constant_norm_rescale": x.norm(dim=-1) / D**0.5}
    close(edited_by(sf.Ablate(sae.latents([3, 40])), x), x - moved * sizes[norm][..., None], 1e-9)


@pytest.mark.parametrize("norm", NORMED)
def test_normalization_is_stateful(norm):
    """The scale of one input decodes another where it is kept between the two."""
    small, large = torch.randn(1, 3, D, dtype=F64), 50 * torch.randn(1, 3, D, dtype=F64)
    sae = make_sae(norm=norm, dtype=F64)
    before = sae.reconstruct(small)
    sae.encode(large)
    assert torch.equal(sae.reconstruct(small), before)


# ---------------------------------------------------------------- the wrong edit


def edited_by(step, x, layer=1):
    """The kernel's x' at a site, for one batch [b, t, d] without padding."""
    from saefeat.kernel.frozen import Placed
    from saefeat.kernel.state import Log, Memory, State, window
    from saefeat.verbs.lower import lower

    program = lower(step, build("llama"))
    ids = torch.full(x.shape[:2], 7)
    view = window(ids, None, tuple(ids.shape), 0, Memory(), None)
    (stop,) = program.visits
    return stop.act(x, State(view, Log(), Placed()))


def test_error_term_recomputed_from_edited_latents():
    """x' = decode(f') + (x − decode(f)); with the error of f' the edit cancels (1e-6, not 26.7)."""
    sae, x = make_sae(dtype=F64), torch.randn(2, 3, D, dtype=F64)
    tensors, index = tensors_for("standard", dtype=F64), [3, 40, 17]
    f = sae.encode(x)
    changed = f.clone()
    changed[..., index] = 0
    error = x - sae.reconstruct(x)
    wanted = changed @ tensors["W_dec"] + tensors["b_dec"] + error
    found = edited_by(sf.Ablate(sae.latents(index)), x)
    close(found, wanted, 1e-9)
    assert (found - x).abs().max() > 0.1  # the wrong way leaves x where it was


def test_reconstruction_written_without_the_error():
    """Splicing the SAE in moves the model even where no latent was touched."""
    sae, x = make_sae(dtype=F64), torch.randn(2, 3, D, dtype=F64)
    assert torch.equal(edited_by(sf.Clamp(sae.latents([3, 40]), scale=1.0), x), x)
    assert (sae.reconstruct(x) - x).abs().max() > 0.5


def test_dtype_is_cast_in_place():
    """A float32 dictionary turns no bfloat16 stream to float32, and rounds no untouched token."""
    model, batch = build("llama", torch.bfloat16), batch_of()
    step = sf.Ablate(make_sae().latents([3, 40]), where=sf.Tokens.last(1))
    seen = []
    model.model.layers[2].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    bare = logits(model, batch)
    found = logits(model, batch, step)
    assert {x.dtype for x in seen} == {torch.bfloat16} and found.dtype == bare.dtype
    assert torch.equal(seen[0][:, :-1], seen[1][:, :-1])
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_before_aliases_the_edited_tensor():
    """A saved view shows the edited value: all zeros."""
    model, batch = build("llama"), batch_of()
    before, after = readings(model, batch, sf.Probe(V()) | sf.Ablate(V()) | sf.Probe(V()))
    real = batch["attention_mask"].bool()
    close(before.values[real], (residual(model, positioned(batch)) @ unit(5))[real][:, None])
    assert before.values[real].abs().min() > 1e-4 > after.values[real].abs().max()


def test_clamp_writes_to_a_copy():
    """`acts[:, :, i][mask] = v` assigns to a copy: a no-op in a well-known harness."""
    model, batch = build("llama"), batch_of()
    wrong = torch.zeros(2, 3, 4)
    wrong[:, :, [1, 2]][torch.ones(2, 3, dtype=torch.bool)] = 5.0
    assert wrong.abs().max() == 0  # the trap is real
    step = sf.Clamp(V(), 40.0)
    (reading,) = readings(model, batch, step | sf.Probe(V()))[:1]
    close(reading.values[reading.mask], torch.full((13,), 40.0))
    assert (logits(model, batch, step) - logits(model, batch))[:, -1].abs().min(-1).values.max() > 0


def test_two_saes_at_one_site_overwrite_each_other():
    """Both act; the second hook of a dictionary of hooks replaces the first elsewhere."""
    a, b, x = make_sae(seed=1, dtype=F64), make_sae(seed=2, dtype=F64), torch.randn(2, 3, D).to(F64)
    step = sf.Clamp(a.latents([3]), 2.0) | sf.Clamp(b.latents([4]), 3.0)
    one = x + (2.0 - a.encode(x, [3])) @ a.directions([3]).to(F64)
    two = one + (3.0 - b.encode(one, [4])) @ b.directions([4]).to(F64)
    found = edited_by(step, x)
    close(found, two, 1e-6)
    last_only = x + (3.0 - b.encode(x, [4])) @ b.directions([4]).to(F64)
    assert (found - last_only).abs().max() > 0.1
    with pytest.raises(sf.errors.SiteError, match="two at"):
        sf.dictionaries.Dictionaries([a, b])


def test_late_bound_closures():
    """Hooks made in a loop all see its last value: every layer, and every row, has its own."""
    model, batch = build("llama"), batch_of()
    step = sf.verbs.base.Chain(tuple(sf.Clamp(V(layer), float(layer + 1)) for layer in range(3)))
    probe = sf.verbs.base.Chain(tuple(sf.Probe(V(layer)) for layer in range(3)))
    for layer, reading in enumerate(readings(model, batch, step | probe)):
        close(reading.values[reading.mask], torch.full((13,), layer + 1.0))
    rows = sf.Clamp(V(), torch.tensor([[1.0], [2.0], [3.0]])) | sf.Probe(V())
    (reading,) = readings(model, batch, rows)
    close(reading.last()[:, 0], torch.tensor([1.0, 2.0, 3.0]))


# ---------------------------------------------------------------- the wrong state


def test_gradient_under_no_grad_read_as_no_effect():
    """Zeros come back where no graph was recorded."""
    nn = wrapped(build("llama"))
    attribute = sf.Attribute(make_sae(), sf.logit_diff(5, 6))
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.raises(sf.errors.GradientError, match="switched off"):
            attribute(nn, RAGGED)
    detached = sf.Attribute(make_sae(), sf.metrics.custom(lambda logits: logits[:, 5].detach()))
    with pytest.raises(sf.errors.GradientError, match="requires_grad=False"):
        detached(nn, RAGGED)
    assert attribute(nn, RAGGED).score.abs().max() > 1e-3


def test_edits_survive_an_exception():
    """Hooks that an error leaves behind edit every later run."""
    model, batch = build("llama"), batch_of()
    bare, hooks = logits(model, batch), hook_count(model)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), torch.no_grad(), sf.hooked(model, sf.Clamp(V(), 40.0)):
            assert (forward(model, batch) - bare).abs().max() > 0.1
            raise error
    assert torch.equal(logits(model, batch), bare) and hook_count(model) == hooks


def test_train_mode():
    """Dropout: two identical runs differ."""
    model, batch = build("gpt2"), batch_of()
    model.train()
    assert not torch.equal(forward(model, batch), forward(model, batch)), "the trap is real"
    nn = wrapped(model)
    for act in (
        lambda: sf.run(nn, RAGGED, sf.Ablate(V())),
        lambda: sf.edit(nn, sf.Ablate(V())),
        lambda: sf.Attribute(make_sae(), sf.logit_diff(5, 6))(nn, RAGGED),
        lambda: logits(model, batch, sf.Probe(V())),
    ):
        with pytest.raises(sf.errors.ModelError, match=r"model\.eval\(\)"):
            act()


def never_called():
    with sf.hooked(build("llama"), sf.Ablate(V())):
        pass


def test_a_missing_hook_only_logs():
    """A misspelt site, a module that is not there, an edit that selects nothing: all are errors."""
    nn = wrapped(build("llama"))
    with pytest.raises(sf.errors.SiteError, match="hook_resid_post"):
        sf.Site.parse("blocks.3.hook_residual_post")
    with pytest.raises(sf.errors.SiteError, match="no such value"):
        sf.run(
            wrapped(build("gpt_neox")), RAGGED, sf.Ablate(sf.Direction(unit(), site="resid_mid.1"))
        )
    with pytest.raises(sf.errors.FiringError, match="selected no token"):
        sf.run(nn, RAGGED, sf.Ablate(V(), where=sf.Tokens.ids(99)))
    with pytest.raises(sf.errors.FiringError, match="never called"):
        never_called()


def test_padding_is_not_taken_for_tokens():
    """Without a mask a pad is a token like any other."""
    ids = batch_of()["input_ids"]
    assert (ids == PAD).any()
    with pytest.raises(sf.errors.PromptError, match="without an attention mask"):
        sf.run(wrapped(build("llama")), ids)


def test_unmatched_random_controls():
    """Random latents that move the site many times more than the selection make it look inert."""
    nn, tensors = wrapped(build("llama")), tensors_for("standard", d_sae=400)
    tensors["W_dec"] *= torch.logspace(-1, 1, 400)[:, None]  # decoder rows differ a hundredfold
    sae = sf.SAE.from_tensors(tensors, site="resid_post.1")
    chosen = sae.latents(range(0, 60, 6))  # the shorter rows

    def moved(latents: sf.Latents) -> float:
        """Mean ‖Δ‖ a token when each latent is pushed by one."""
        row = sf.run(nn, RAGGED, sf.Clamp(latents, add=1.0)).receipt.rows[0]
        return float(row.events.norms()[1].mean())

    for seed in range(3):
        assert moved(sae.latents().sample(10, seed=seed)) > 5 * moved(chosen), "the trap is real"
        control = sf.controls.matched(chosen, seed=seed)
        assert not len(control & chosen) and len(control) == len(chosen)
        assert 0.5 <= moved(control) / moved(chosen) <= 2.0
