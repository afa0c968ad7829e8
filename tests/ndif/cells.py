"""The matrix's rows and columns: what is done, and in which way, here or on a server."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import torch
from served import CHATS

import saefeat as sf
from helpers import make_sae, unit
from saefeat.remote import Server

NEW = 3
SAMPLE = sf.generation.Sample(1.2, seed=3)


def latents(layer: int = 1) -> sf.Latents:
    return make_sae("jumprelu", f"resid_post.{layer}", layer).latents([3, 40, 17])


def direction(layer: int = 1) -> sf.Direction:
    return sf.Direction(unit(), site=f"resid_post.{layer}")


def by_prompt() -> torch.Tensor:
    return torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 4.0], [9.0, 9.0, 9.0]])


def reduced(how: str) -> sf.Probe:
    return sf.Probe(latents(), reduce=how)


def inside() -> sf.When:
    return sf.When(direction(0), above=0.2)


def held() -> sf.When:
    return sf.When(direction(0), above=0.2, hold=True)


Tokens = sf.Tokens
VERBS: dict[str, Callable[[], sf.Ablate | Any]] = {
    "Ablate": lambda: sf.Ablate(latents()),
    "Clamp, values": lambda: sf.Clamp(latents(), torch.tensor([1.0, 0.0, 5.0])),
    "Clamp, add": lambda: sf.Clamp(latents(), add=2.0),
    "Clamp, scale": lambda: sf.Clamp(latents(), scale=-1.5),
    "Clamp, by prompt": lambda: sf.Clamp(latents(), by_prompt()),
    "Schedule": lambda: sf.Clamp(latents(), add=sf.values.Schedule([4.0, 2.0, 0.0])),
    "When": lambda: sf.Clamp(latents(2), 5.0, when=inside()),
    "When, held": lambda: sf.Clamp(latents(2), 5.0, when=held()),
    "Probe": lambda: sf.Probe(latents(), where=Tokens.last(2) | Tokens.generated()),
    "Probe, reduced": lambda: reduced("max") | reduced("mean"),
    "joint &": lambda: sf.Clamp(latents(), 3.0) & sf.Clamp(direction(), add=2.0),
    "chain |": lambda: sf.Clamp(latents(0), 3.0) | sf.Probe(latents(1)) | sf.Ablate(latents(2)),
    "Direction": lambda: sf.Ablate(direction()) | sf.Clamp(direction(2), add=3.0),
    "token rule": lambda: sf.Clamp(latents(), add=2.0, where=~Tokens.first(1) & Tokens.prompt()),
    "role": lambda: sf.Clamp(latents(), add=2.0, where=Tokens.role("user")),
    "transcoder": lambda: sf.Clamp(make_sae("transcoder").latents([1, 5]), 4.0),
}  # fmt: skip

# ---------------------------------------------------------------- ways: (model, verb, server)

OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "allow_unfired": True}


def run(model, verb, on):
    return sf.run(model, CHATS, verb, allow_unfired=True, on=on)


def generation(model, verb, on):
    return sf.run(model, CHATS, verb, on=on, **OPTIONS)


def samples(model, verb, on):
    return sf.run(model, CHATS, verb, decode=SAMPLE, on=on, **OPTIONS)


def submitted(model, verb, on):
    """Sent off with a file, and taken up from the file alone."""
    if on is None:
        return sf.run(model, CHATS, verb, batch_size=2, **OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        sf.remote.submit(model, CHATS, verb, batch_size=2, on=on, file=file, **OPTIONS)
        return sf.remote.Job.load(file, model, on=on).wait(timeout=180)


def awaited(model, verb, on):
    if on is None:
        return sf.run(model, CHATS, verb, **OPTIONS)

    async def job():
        return await sf.remote.submit(model, CHATS, verb, on=on, **OPTIONS)

    return asyncio.run(job())


def swept(model, verb, on):
    return sf.sweep(model, CHATS, {"it": verb}, on=on, **OPTIONS)["it"]


def batch_of(model) -> dict[str, torch.Tensor]:
    return dict(
        model.tokenizer.apply_chat_template(
            CHATS, add_generation_prompt=True, padding=True, padding_side="left",
            return_dict=True, return_tensors="pt",
        )
    )  # fmt: skip


def how(on: Server | None) -> dict[str, str]:
    return {} if on is None else {"remote": on.url}


def inline(model, verb, on):
    bound, batch = verb.bind(model), batch_of(model)
    with torch.no_grad(), model.trace(batch, **how(on)):
        log = nnsight.save(bound(model))
        logits = nnsight.save(model.output.logits.detach())
    return verb, log, logits


def session(model, verb, on):
    bound, batch = verb.bind(model), batch_of(model)
    with model.session(**how(on)):  # noqa: SIM117  (a trace in a session)
        with model.trace(batch):
            log = nnsight.save(bound(model))
            logits = nnsight.save(model.output.logits.detach())
    return verb, log, logits


def generate(model, verb, on):
    bound, batch = verb.bind(model), batch_of(model)
    with model.generate(max_new_tokens=NEW, do_sample=False, **how(on)) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save(bound(model))
        with tracer.invoke():
            tokens = nnsight.save(tracer.result)
    return verb, log, tokens


def edited(model, verb, on):
    copy, batch = sf.edit(model, verb), batch_of(model)
    with torch.no_grad(), copy.trace(batch, **how(on)):
        logits = nnsight.save(copy.output.logits.detach())
    return verb, None, logits


WAYS = {
    "run": run, "generation": generation, "samples": samples, "submit": submitted,
    "async": awaited, "sweep": swept, "trace": inline, "session": session,
    "generate": generate, "edit": edited,
}  # fmt: skip

# ---------------------------------------------------------------- the same, or not


def same(here: Any, there: Any, tolerance: float) -> None:
    """Equal in everything that a way gives: logits, tokens, readings, counts, events."""
    if isinstance(here, sf.results.Run):
        close(here.logits, there.logits, tolerance)
        assert here.completions == there.completions
        same_receipts(here.receipt, there.receipt, tolerance)
        same_readings(here.readings, there.readings, tolerance)
        return
    (verb, log, values), (_, their_log, their_values) = here, there
    close(values, their_values, tolerance)
    if log is not None:
        same_receipts(verb.receipt(log), verb.receipt(their_log), tolerance)
        same_readings(verb.readings(log), verb.readings(their_log), tolerance)


def close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(theirs, mine, atol=tolerance, rtol=tolerance)


def same_receipts(mine: Any, theirs: Any, tolerance: float) -> None:
    assert mine.passes == theirs.passes
    for one, other in zip(mine.rows, theirs.rows, strict=True):
        assert (one.edit, one.tokens, one.changed) == (other.edit, other.tokens, other.changed)
        assert (one.events is None) == (other.events is None)
        if one.events is not None:
            for name, column in one.events.columns().items():
                close(column, other.events.columns()[name], tolerance)


def same_readings(mine: Any, theirs: Any, tolerance: float) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.mask, b.mask)
        close(a.values[a.mask], b.values[b.mask], tolerance)
