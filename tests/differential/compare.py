"""What differs between a case's answers by the oracle and by saefeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import saefeat as sf

from . import ours
from .cases import Case, Step
from .oracle import Answer, answers
from .ways import Found, found

TOLERANCE = {"float64": 3e-5, "float32": 1e-3}
"""Relative to the largest number compared. Norms of transformers compute in float32 anyway."""


@dataclass(frozen=True)
class Verdict:
    """same, different, refused, or open: a decision so near that rounding may make it."""

    kind: str
    told: str = ""


def judge(case: Case) -> Verdict:
    """Run a case by both, and compare."""
    wanted = answers(case, ours.drawn)
    try:
        got = found(case)
    except Exception as error:  # a crash is no answer
        kind = "refused" if _ours(error) else "different"
        return Verdict(kind, f"{type(error).__name__}: {error}"[:400])
    told = list(differences(case, wanted, got))
    if not told:
        return Verdict("same")
    near = min(answer.seen.near for answer in wanted)
    size = max(1.0, max(float(a.logits.abs().max()) if a.logits.numel() else 0 for a in wanted))
    kind = "open" if near < 30 * TOLERANCE[case.dtype] * size / 100 else "different"
    return Verdict(kind, "; ".join(told[:4]) + f" (nearest decision {near:.2g})")


def _ours(error: Exception) -> bool:
    """Whether saefeat says so itself: the kernel raises what a server has too."""
    return isinstance(error, sf.SaefeatError) or "saefeat:" in str(error)


def differences(case: Case, wanted: list[Answer], got: Found) -> Any:
    """Sentences, one for each thing that differs."""
    if got.completions is not None:
        done = [answer.completion for answer in wanted]
        if got.completions != done:
            yield f"completions {got.completions} for {done}"
    for number, (first, logits) in enumerate(got.logits):
        theirs = wanted[number].logits[first : first + len(logits)]
        yield from _apart(case, f"logits of prompt {number} from {first}", logits, theirs)
    steps = case.steps
    if got.readings is not None:
        probes = [n for n, step in enumerate(steps) if step.verb == "probe"]
        for n, reading in zip(probes, got.readings, strict=True):
            yield from _reading(case, wanted, n, steps[n], reading)
    if got.receipt is not None:
        edits = [n for n, step in enumerate(steps) if step.verb != "probe"]
        for n, row in zip(edits, got.receipt.rows, strict=True):
            yield from _events(case, wanted, n, steps[n], row)


def _apart(case: Case, what: str, ours: Tensor, theirs: Tensor) -> Any:
    if ours.shape != theirs.shape:
        yield f"{what}: shape {list(ours.shape)} for {list(theirs.shape)}"
        return
    if not ours.numel():
        return
    a, b = ours.double(), theirs.double()
    off = (a - b).abs().max()
    if not off <= TOLERANCE[case.dtype] * max(1.0, float(b.abs().max())):
        yield f"{what}: {float(off):.3g} apart"


# ---------------------------------------------------------------- readings


def _reading(case: Case, wanted: list[Answer], n: int, step: Step, reading: Any) -> Any:
    for number, answer in enumerate(wanted):
        parts = [answer.seen.readings[n][part] for part in range(len(step.parts))]
        f = torch.cat([values[0] for values, _ in parts], -1)
        mask = torch.cat([m[0, :, None].expand_as(v[0]) for v, m in parts], -1)
        what = f"reading {n} of prompt {number}"
        if step.reduce is None:
            yield from _by_token(case, what, reading, number, f, mask)
        else:
            yield from _reduced(case, what, reading, number, step.reduce, f, mask)


def _by_token(case: Case, what: str, reading: Any, number: int, f: Tensor, mask: Tensor) -> Any:
    start, width = int(reading.starts[number]), reading.mask.shape[1]
    theirs = torch.zeros(width, f.shape[1], dtype=torch.bool)
    values = torch.zeros(width, f.shape[1], dtype=f.dtype)
    shown = min(len(f), width - start)
    theirs[start : start + shown], values[start : start + shown] = mask[:shown], f[:shown]
    own = reading.mask[number]
    if not torch.equal(own, theirs):
        yield f"{what}: selected at {own.nonzero().tolist()} for {theirs.nonzero().tolist()}"
        return
    yield from _apart(case, what, reading.values[number][own], values[own])


def _reduced(
    case: Case, what: str, reading: Any, number: int, how: str, f: Tensor, mask: Tensor
) -> Any:
    for column in range(f.shape[1]):
        kept = f[mask[:, column], column]
        own, there = reading.values[number, :, column], bool(reading.mask[number, 0, column])
        if there != bool(len(kept)):
            yield f"{what}: latent {column} read is {there}, for {len(kept)} tokens"
        elif there:
            theirs = {"max": kept.max(), "mean": kept.mean(), "last": kept[-1]}[how]
            yield from _apart(case, f"{what}, {how}", own, theirs[None])
        if reading.counts is not None and int(reading.counts[number, 0, column]) != len(kept):
            yield f"{what}: {int(reading.counts[number, 0, column])} tokens for {len(kept)}"


# ---------------------------------------------------------------- receipts


def _events(case: Case, wanted: list[Answer], n: int, step: Step, row: Any) -> Any:
    tokens = torch.zeros(len(step.parts))
    table = _table(case, wanted, n, step, tokens)
    if row.tokens != int(tokens.max()):
        yield f"receipt {n}: {row.tokens} tokens for {int(tokens.max())}"
    events = row.events
    if events is None:
        yield f"receipt {n}: no events"
        return
    names = ("prompt", "position", "dictionary", "latent")
    keys = zip(*(getattr(events, name).tolist() for name in names), strict=True)
    numbers = torch.stack([events.before, events.after, events.norm], 1).double()
    own = dict(zip(keys, numbers, strict=True))
    if len(own) != row.changed:
        yield f"receipt {n}: {row.changed} changed, and {len(own)} events"
    for key in sorted(set(own) | set(table)):
        yield from _event(case, f"receipt {n}, event {key}", own.get(key), table.get(key), step)
    yield from _places(case, f"receipt {n}", wanted, events)


def _event(case: Case, what: str, own: Tensor | None, theirs: Tensor | None, step: Step) -> Any:
    """A change of a rounding may be there or not."""
    small = TOLERANCE[case.dtype]
    if own is None or theirs is None:
        there = own if theirs is None else theirs
        assert there is not None
        if (there[1] - there[0]).abs() > small * max(1.0, float(there.abs().max())):
            yield f"{what}: {'extra' if theirs is None else 'missing'} {there.tolist()}"
        return
    if step.written == "span":  # the sign of a coordinate is the basis's
        own = own.abs()
    yield from _apart(case, what, own, theirs)


def _table(case: Case, wanted: list[Answer], n: int, step: Step, tokens: Tensor) -> dict:
    """(prompt, position, part, latent) → before, after, norm; counts tokens a part on the way."""
    table = {}
    for number, answer in enumerate(wanted):
        for part, (_, indices) in enumerate(step.parts):
            mask, was, new, norm = answer.seen.events[n][part]
            tokens[part] += mask.sum()
            for position in mask[0].nonzero()[:, 0].tolist():
                for column, latent in enumerate(indices):
                    before, after = was[0, position, column], new[0, position, column]
                    if before != after:
                        line = torch.stack([before, after, norm[0, position]]).double()
                        table[number, position, part, latent] = line
    return table


def _places(case: Case, what: str, wanted: list[Answer], events: Any) -> Any:
    """Each event's token and step, by its prompt and position."""
    columns = (events.prompt, events.position, events.step, events.token)
    for number, position, step, token in zip(*(c.tolist() for c in columns), strict=True):
        ids, prompt = wanted[number].seen.ids[0].tolist(), len(case.prompts[number])
        theirs = (ids[position], max(-1, position - prompt)) if position < len(ids) else None
        if (token, step) != theirs:
            yield f"{what}: token and step {(token, step)} for {theirs} at {position}"
