"""Nothing is left behind: after success, an error and Ctrl-C, in every way of running."""

from __future__ import annotations

import nnsight
import pytest
import torch

import saefeat as sf
from helpers import RAGGED, batch_of, build, forward, hook_count, make_sae, unit, wrapped
from saefeat.generation import Beams, Sample

WAYS = ["run", "run, sampled", "run, beams", "stream", "edit", "hooked", "inline", "sweep"]
TROUBLES = {"none": None, "a module that raises": RuntimeError, "Ctrl-C": KeyboardInterrupt}
SAMPLE = {"max_new_tokens": 4, "decode": Sample(1.0, seed=0)}


def chain() -> sf.verbs.base.Chain:
    """Edits and a condition that must be remembered, at three sites."""
    held = sf.When(sf.Direction(unit(3), site="resid_pre.0"), above=-9.0, hold=True)
    return sf.Clamp(make_sae().latents([1, 2]), 30.0, when=held) | sf.Ablate(
        make_sae("transcoder", layer=2).latents([7])
    )


def use(way: str, nn, batch) -> None:
    model = nn._module
    if way == "run":
        sf.run(nn, batch, chain() | sf.Probe(make_sae(seed=4)), max_new_tokens=4, batch_size=2)
    elif way == "run, sampled":
        sf.run(nn, batch, chain(), **SAMPLE)
    elif way == "run, beams":
        sf.run(nn, batch, chain(), max_new_tokens=4, decode=Beams(2))
    elif way == "stream":
        list(sf.run(nn, RAGGED, chain(), max_new_tokens=4, batch_size=2, stream=True))
    elif way == "sweep":
        sf.sweep(nn, batch, {1: chain(), 2: None}, max_new_tokens=4)
    elif way == "hooked":
        with sf.hooked(model, chain()):
            model.generate(**batch, max_new_tokens=4, do_sample=False)
    elif way == "edit":
        with sf.edit(nn, chain()).generate(**batch, max_new_tokens=4, do_sample=False) as tracer:
            nnsight.save(tracer.result)
    else:
        with nn.generate(**batch, max_new_tokens=4, do_sample=False):
            nnsight.save(chain()(nn))


def state(nn) -> dict:
    """All that a run could leave behind, but for the values of a plain run."""
    model = nn._module
    with nn.trace(batch_of()):
        logits = nnsight.save(nn.output.logits)
    return {
        "logits": logits,
        "bare": forward(model, batch_of()),
        "tokens": model.generate(**batch_of(), max_new_tokens=4, do_sample=False),
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "generator": torch.get_rng_state(),
        "hooks": hook_count(model),
        "edits": len(nn._edits),
        "settings": model.generation_config.to_dict(),
        "training": model.training,
        "grad": torch.is_grad_enabled(),
    }


def require_same(before: dict, after: dict) -> None:
    for name, value in before.items():
        same = torch.equal(value, after[name]) if torch.is_tensor(value) else value == after[name]
        assert same, name


@pytest.mark.parametrize("when", ["first pass", "third pass"])
@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_behind(way, trouble, when):
    if trouble == "none" and when == "third pass":
        return
    model, calls = build("llama"), []
    nn, batch = wrapped(model), batch_of()
    layer = model.model.layers[2]
    plain = layer.forward

    def forward_then(*args, **kwargs):
        calls.append(1)
        if TROUBLES[trouble] is not None and len(calls) == (1 if when == "first pass" else 3):
            raise TROUBLES[trouble]("in the middle")
        return plain(*args, **kwargs)

    before = state(nn)
    layer.forward = forward_then
    if TROUBLES[trouble] is None:
        use(way, nn, batch)
    else:
        with pytest.raises(TROUBLES[trouble], match="in the middle"):
            use(way, nn, batch)
    assert calls
    del layer.forward
    require_same(before, state(nn))
    again = sf.run(nn, batch, chain(), max_new_tokens=4)
    fresh = sf.run(wrapped(build("llama")), batch, chain(), max_new_tokens=4)
    assert again.completions == fresh.completions and torch.equal(again.logits, fresh.logits)


def test_a_stream_that_is_dropped_leaves_nothing():
    nn = wrapped(build("llama"))
    before = state(nn)
    found = sf.run(nn, RAGGED, chain(), **SAMPLE, batch_size=1, stream=True)
    next(found)
    require_same(before, state(nn))
    del found
    require_same(before, state(nn))


def test_the_callers_own_hooks_and_edits_stay():
    model = build("llama")
    handle = model.model.layers[0].register_forward_hook(lambda m, a, out: None)
    nn = wrapped(model)
    edited = sf.edit(nn, sf.Ablate(make_sae().latents([1])))
    count, edits = hook_count(model), len(edited._edits)
    assert edits == 1
    sf.run(edited, RAGGED, chain(), max_new_tokens=2)
    assert hook_count(model) == count and len(edited._edits) == edits and not nn._edits
    handle.remove()
