"""The ways of running a case in saefeat, each to logits, tokens, readings and a receipt."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnsight
import torch
from torch import Tensor

import saefeat as sf

from .cases import Case
from .ours import Made, batch, greedy

NEVER = 100
"""A stop token outside the vocabulary."""


@dataclass(frozen=True)
class Found:
    """What a way gives: for each prompt logits [n, v] from position ``first`` on, and the rest."""

    logits: list[tuple[int, Tensor]]
    completions: list[list[int]] | None = None
    readings: tuple[Any, ...] | None = None
    receipt: Any = None


def found(case: Case) -> Found:
    """A case, run by saefeat in its way."""
    return WAYS[case.way](case, Made(case))


def _of_run(case: Case, out: Any) -> Found:
    logits = [(len(p) - 1, row[None]) for p, row in zip(case.prompts, out.logits, strict=True)]
    assert out.prompts == case.prompts
    done = [list(row) for row in out.completions] if case.new else None
    return Found(logits, done, out.readings, out.receipt)


def _options(case: Case) -> dict[str, Any]:
    """Of run."""
    return {
        "max_new_tokens": case.new,
        "batch_size": case.batch_size,
        "allow_unfired": True,
        "decode": greedy(case) if case.new else None,
    }


def _run(case: Case, made: Made) -> Found:
    return _of_run(case, sf.run(made.nn, batch(case), made.intervention, **_options(case)))


def _saved(case: Case, made: Made) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        path = sf.save(made.intervention, Path(folder) / "it.safetensors", model=made.nn)
        again = sf.load(path, model=made.nn)
    return _of_run(case, sf.run(made.nn, batch(case), again, **_options(case)))


def _sweep(case: Case, made: Made) -> Found:
    beside = sf.Clamp(sf.Neurons("resid_post.0", 32).latents([3, 1]), 2.0, where=sf.Tokens.last(2))
    settings = {"beside": beside | sf.Probe(beside.latents), "it": made.intervention, "bare": None}
    options = {name: v for name, v in _options(case).items() if name != "decode"}
    return _of_run(case, sf.sweep(made.nn, batch(case), settings, **options)["it"])


def _beams(case: Case, made: Made) -> Found:
    options = _options(case) | {"decode": sf.generation.Beams(3, stop=case.stops)}
    out = sf.run(made.nn, batch(case), made.intervention, **options)
    return Found([], [list(row) for row in out.completions])


# ---------------------------------------------------------------- one forward pass


def _real(case: Case, logits: Tensor, right: bool = False) -> list[tuple[int, Tensor]]:
    mask = batch(case, right)["attention_mask"].bool()
    return [(0, row[real]) for row, real in zip(logits, mask, strict=True)]


def _trace(case: Case, made: Made) -> Found:
    with torch.no_grad(), made.nn.trace(batch(case)):
        log = nnsight.save(made.intervention(made.nn))
        logits = nnsight.save(made.nn.output.logits)
    return Found(_real(case, logits), None, *_told(made, log))


def _edit(case: Case, made: Made) -> Found:
    edited = sf.edit(made.nn, made.intervention)
    if case.new:
        return _decoded(case, made, edited)
    with torch.no_grad(), edited.trace(batch(case)):
        logits = nnsight.save(edited.output.logits)
    return Found(_real(case, logits))


def _forward(case: Case, made: Made, right: bool = False) -> Found:
    given, module = batch(case, right), made.nn._module
    places = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), sf.hooked(module, made.intervention) as log:
        logits = module(**given, position_ids=places).logits
    return Found(_real(case, logits, right), None, *_told(made, log))


def _told(made: Made, log: Any) -> tuple[Any, Any]:
    return made.intervention.readings(log), made.intervention.receipt(log)


# ---------------------------------------------------------------- decoding


def _arguments(case: Case) -> dict[str, Any]:
    """Of generate."""
    stops = list(case.stops) or NEVER
    return {
        "max_new_tokens": case.new, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0
    }  # fmt: skip


def _until(case: Case, tokens: Tensor) -> list[list[int]]:
    rows = tokens[:, -(tokens.shape[1] - batch(case)["input_ids"].shape[1]) :].tolist()
    cut = [next((n + 1 for n, t in enumerate(r) if t in case.stops), len(r)) for r in rows]
    return [row[:n] for row, n in zip(rows, cut, strict=True)]


def _decoded(case: Case, made: Made, nn: Any, inline: bool = False) -> Found:
    with nn.generate(**_arguments(case)) as tracer:
        with tracer.invoke(batch(case)):
            log = nnsight.save(made.intervention(nn) if inline else {})
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return Found([], _until(case, tokens), *(_told(made, log) if inline else ()))


def _inline(case: Case, made: Made) -> Found:
    return _decoded(case, made, made.nn, inline=True)


def _hooked(case: Case, made: Made, again: bool = False, cached: bool = True) -> Found:
    if not case.new:
        return _forward(case, made)
    module = made.nn._module
    with sf.hooked(module, made.intervention) as log:
        if again:  # another text of other lengths before, in the same block
            other = {"input_ids": torch.full((len(case.prompts), 4), 9)}
            other["attention_mask"] = torch.ones_like(other["input_ids"])
            module.generate(**other, **_arguments(case))
        out = module.generate(
            **batch(case), **_arguments(case), use_cache=cached, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    done, steps = _until(case, out.sequences), torch.stack(out.logits, 1)
    logits = [
        (len(prompt) - 1, row[: len(own)])
        for prompt, row, own in zip(case.prompts, steps, done, strict=True)
    ]
    readings, receipt = _told(made, log)
    counted = not again and cached  # both records would count other passes as well
    return Found(logits, done, readings if cached else None, receipt if counted else None)


def _loop(case: Case, made: Made) -> Found:
    """A loop of one's own, over a cache, every row to the end."""
    module, given = made.nn._module, batch(case)
    mask, ids, cache = given["attention_mask"], given["input_ids"], None
    places, chosen, steps = (mask.cumsum(1) - 1).clamp(min=0), [], []
    with torch.no_grad(), sf.hooked(module, made.intervention) as log:
        for _ in range(case.new):
            out = module(
                input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            steps.append(out.logits[:, -1])
            chosen.append(steps[-1].argmax(-1, keepdim=True))
            cache, ids = out.past_key_values, chosen[-1]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            places = places[:, -1:] + 1
    starts = [len(prompt) - 1 for prompt in case.prompts]
    logits = list(zip(starts, torch.stack(steps, 1), strict=True))
    return Found(logits, torch.cat(chosen, 1).tolist(), *_told(made, log))


WAYS: dict[str, Callable[[Case, Made], Found]] = {
    "run": _run,
    "saved": _saved,
    "sweep": _sweep,
    "beams": _beams,
    "trace": _trace,
    "edit": _edit,
    "inline": _inline,
    "hooked": _hooked,
    "right": lambda case, made: _forward(case, made, right=True),
    "again": lambda case, made: _hooked(case, made, again=True),
    "uncached": lambda case, made: _hooked(case, made, cached=False),
    "loop": _loop,
}
