"""Torch's settings change what the model computes, and nothing that is computed beside it."""

from __future__ import annotations

import copy
import threading
from contextlib import contextmanager
from functools import cache

import pytest
import torch

import saefeat as sf
from helpers import RAGGED, D, batch_of, build, forward, make_sae, unit, wrapped

MODEL, V, W = build("llama"), unit(), unit(3)
NN = wrapped(MODEL)
METRIC = sf.logit_diff(5, 6)


def sae():
    return make_sae("jumprelu")


def latents():
    return sae().latents([3, 8, 40])


def direction():
    return sf.Direction(V, site="resid_post.1")


def hooked():
    with torch.no_grad(), sf.hooked(MODEL, sf.Ablate(latents())):
        return forward(MODEL, batch_of())


def audited():
    attribute = sf.Attribute(sae(), METRIC)
    return sf.audit(attribute, NN, RAGGED, attribute(NN, RAGGED), budget=6).effects


def held():
    when = sf.When(make_sae(layer=0).latents([1, 4]), above=0.5, hold=True)
    return sf.run(NN, RAGGED, sf.Clamp(direction(), add=3.0, when=when), max_new_tokens=3)


def resampled():
    read = latents()
    seen = sf.run(NN, RAGGED, sf.Probe(read)).readings[0]
    return sf.run(NN, RAGGED, sf.Clamp(read, sf.values.Resample(seen, seed=0)))


CASES = {
    "ablate": lambda: sf.run(NN, RAGGED, sf.Ablate(latents())),
    "generate": lambda: sf.run(
        NN, RAGGED, sf.Clamp(latents(), 3.0) | sf.Probe(latents()), max_new_tokens=3
    ),
    "listed": lambda: sf.run(NN, RAGGED, sf.Clamp(latents(), [1.1, 2.345, 0.7])),
    "topk": lambda: sf.run(NN, RAGGED, sf.Ablate(make_sae("topk").latents([1, 2]).reselect())),
    "span": lambda: sf.run(NN, RAGGED, sf.Ablate(latents().span())),
    "joint": lambda: sf.run(NN, RAGGED, sf.Clamp(latents(), 2.0) & sf.Clamp(direction(), add=3.0)),
    "sweep": lambda: sf.sweep(NN, RAGGED, {1: sf.Ablate(latents()), 2: None})[1],
    "hooked": hooked,
    "held": held,
    "resampled": resampled,
    "attribute": lambda: sf.Attribute(sae(), METRIC)(NN, RAGGED),
    "kept": lambda: sf.Attribute(sae(), METRIC, keep=4)(NN, RAGGED),
    "ig": lambda: sf.Attribute(sae(), METRIC, method=sf.IG(4), one_site=True)(NN, RAGGED),
    "exact": lambda: sf.Attribute(latents(), METRIC, method=sf.attribution.Exact())(NN, RAGGED),
    "audit": audited,
    "verify": lambda: torch.tensor(
        [sf.verify(NN, sae(), RAGGED, strict=False).checks[0].fvu], dtype=torch.float64
    ),
    "random": lambda: sf.controls.random_directions(latents(), seed=0).parts[0][0].directions([3]),
    "drawn": lambda: sf.Direction.random(D, site="resid_post.1", seed=0).vectors,
}


def numbers(found) -> list[torch.Tensor]:
    """What a result holds: logits, readings and changes, or scores with their sums."""
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, sf.attribution.Attribution):
        gap = [] if found.dropped is not None else [found.gap]
        return [found.score, found.activation, found.clean, found.totals()[1], *gap]
    events = [row.events.norm for row in found.receipt.rows if row.events is not None]
    return [found.logits, *(reading.values for reading in found.readings), *events]


@cache
def plain(case: str) -> list[torch.Tensor]:
    return numbers(CASES[case]())


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_another_default_dtype_changes_nothing(case, dtype):
    """Zeros made in it broke attributions, and seeded directions were others."""
    wanted = plain(case)
    with default_dtype(dtype):
        found = numbers(CASES[case]())
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", sorted(set(CASES) - {"kept"}))  # which latents are kept may change
def test_under_autocast_the_model_alone_is_cast(case):
    """Every edit failed in its receipt, and lowering folded biases in bfloat16."""
    wanted = plain(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = numbers(CASES[case]())
    for got, want in zip(found, wanted, strict=True):
        if got.shape == want.shape:  # a latent near its threshold may be on in one of them
            size = want.float().abs().max().clamp(min=1.0)
            assert (got.float() - want.float()).abs().max() <= 0.1 * size


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_dictionaries_compute_alike_under_autocast(architecture):
    x, basis = (
        torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0)),
        make_sae(architecture),
    )
    index = torch.arange(4)

    def values():
        columns = basis.columns(index)
        tensors = [value for value in columns.values() if isinstance(value, torch.Tensor)]
        return [basis.encode(x), basis.reconstruct(x), basis.directions([1, 2]), *tensors]

    wanted, mark = values(), basis.fingerprint([1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values()
        assert basis.fingerprint([1, 2]) == mark
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_a_receipts_norms_are_those_of_its_changes():
    """They are summed when the receipt is asked for, which may be under autocast."""
    step = sf.Clamp(sf.Direction(V, site="resid_post.1"), add=1.234567)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        events = sf.run(NN, RAGGED, step).receipt.rows[0].events
    torch.testing.assert_close(events.norm, torch.full((13,), 1.234567), atol=1e-6, rtol=0)


@pytest.mark.parametrize("way", ["run", "sweep", "hooked", "attribute", "verify", "edit"])
def test_another_default_device_is_refused(way):
    step, basis, prompts = sf.Ablate(latents()), sae(), batch_of()
    attribute = sf.Attribute(basis, METRIC)
    calls = {
        "run": lambda: sf.run(NN, prompts, step),
        "sweep": lambda: sf.sweep(NN, prompts, {1: step}),
        "hooked": lambda: sf.hooked(MODEL, step).__enter__(),
        "attribute": lambda: attribute(NN, prompts),
        "verify": lambda: sf.verify(NN, basis, prompts),
        "edit": lambda: sf.edit(NN, step),
    }
    with torch.device("meta"), pytest.raises(sf.errors.ModelError, match="device is 'meta'"):
        calls[way]()


@pytest.mark.parametrize("value", [2.0, [1.0, 2.0], sf.values.Schedule([1.0, 2.0, 3.0])], ids=repr)
def test_verbs_made_under_another_default_device_are_the_same(value):
    """A model is often built under ``torch.device("meta")``, and verbs beside it."""
    basis = sae()
    with torch.device("meta"):
        step = sf.Clamp(basis.latents([3, 8]), value) | sf.Ablate(basis.latents(range(2)))
    plainly = sf.Clamp(basis.latents([3, 8]), value) | sf.Ablate(basis.latents(range(2)))
    assert torch.equal(sf.run(NN, RAGGED, step).logits, sf.run(NN, RAGGED, plainly).logits)


GRADIENTS = ("attribute", "kept", "ig", "audit")


@pytest.mark.parametrize("case", sorted(set(CASES) - set(GRADIENTS)))
def test_inference_mode_changes_nothing(case):
    wanted = plain(case)
    with torch.inference_mode():
        found = numbers(CASES[case]())
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_are_refused_in_inference_mode(case):
    with torch.inference_mode(), pytest.raises(sf.errors.GradientError, match="switched off"):
        CASES[case]()


# ---------------------------------------------------------------- threads


def at_once(*calls):
    """What each call gives or raises, each in a thread of its own."""
    found, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def go(n: int) -> None:
        barrier.wait()
        try:
            found[n] = calls[n]()
        except Exception as error:
            found[n] = error

    threads = [threading.Thread(target=go, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_block_of_another_thread_is_refused():
    """Its edits would act on this thread's passes as well."""
    model, batch = build("llama"), batch_of()
    entered, leave = threading.Event(), threading.Event()
    edit = sf.Clamp(sf.Direction(torch.ones(D), site="resid_post.1"), add=3.0)

    def other():
        with sf.hooked(model, edit):
            entered.set()
            leave.wait(60)
            model(**batch)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    with pytest.raises(sf.errors.ModelError, match="two threads"), sf.hooked(model, edit):
        model(**batch)
    with pytest.raises(sf.errors.ModelError, match="two threads"):
        sf.run(wrapped(model), RAGGED)
    leave.set()
    thread.join()
    with sf.hooked(model, edit):
        model(**batch)


@pytest.mark.parametrize("case", CASES)
def test_two_threads_on_one_model_are_refused_or_right(case):
    """nnsight mixes them: results were lost, or another run's, without a word."""
    wanted = plain(case)
    for found in at_once(CASES[case], CASES[case]):
        if isinstance(found, Exception):
            assert isinstance(found, sf.errors.ModelError) and "two threads" in str(found), found
            continue
        for got, want in zip(numbers(found), wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_two_threads_on_two_models_are_right():
    step, models = sf.Clamp(latents(), 3.0), [NN, wrapped(build("gpt2"))]

    def go(model):
        return lambda: sf.run(model, RAGGED, step, max_new_tokens=3).completions

    wanted = [go(model)() for model in models]
    assert at_once(*map(go, models)) == wanted


def test_a_run_marks_its_model_no_longer_than_it_takes():
    model, step = build("llama"), sf.Ablate(direction())
    copies = []
    handle = model.model.layers[1].register_forward_hook(
        lambda *_: copies.append(copy.deepcopy(model))
    )
    sf.run(wrapped(model), RAGGED, step)
    handle.remove()
    assert not [name for name in vars(model) if "saefeat" in name]
    copied = copies[0]
    assert torch.isfinite(sf.run(wrapped(copied), RAGGED, step).logits).all()
    assert not [name for name in vars(copied) if "saefeat" in name]
