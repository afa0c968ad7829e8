"""One case's steps as plain forward hooks on full sequences of one prompt, rows of one length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Drawn, Numbers, Patch, Schedule, Step
from .formulas import Read, edge, largest, read
from .places import Place, epsilon, place, width
from .rules import SCORES, effective, picks

Action = Callable[[Tensor, "Pass"], Tensor]


@dataclass
class Pass:
    """What one forward pass of full sequences [b, t] is given and leaves behind."""

    ids: Tensor
    prompt: int  # how many tokens are the prompt's
    number: int  # of the prompt
    special: tuple[int, ...]
    pinned: dict[int, tuple[Tensor, Tensor]]  # by step: values and whether known, [s, k]
    drawn: Callable[[int, int, int, int], int]  # (seed, prompt, position, of how many) → row
    held: dict[tuple[int, int], Any] = field(default_factory=dict)
    stash: dict[str, Tensor] = field(default_factory=dict)
    met: dict[int, Tensor] = field(default_factory=dict)
    readings: dict[int, dict[int, Any]] = field(default_factory=dict)
    events: dict[int, dict[int, Any]] = field(default_factory=dict)
    near: float = float("inf")  # how close any decision was

    def close(self, distance: Tensor) -> None:
        if distance.numel():
            self.near = min(self.near, float(distance.min()))


@contextmanager
def hooks(model: torch.nn.Module, case: Case, now: Pass) -> Iterator[None]:
    """A case's actions on a model, in the order of its chain at each place."""
    actions: dict[tuple[str, str], list[Action]] = {}
    _collect(case, model, actions)
    handles = []
    for (path, end), listed in actions.items():
        handles.append(_hook(model.get_submodule(path), end, listed, now))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: torch.nn.Module, end: str, actions: list[Action], now: Pass) -> Any:
    def act(value: Any) -> Any:
        x = value[0] if isinstance(value, tuple) else value
        flat = x.shape
        x = x.reshape(*now.ids.shape, -1)
        for action in actions:
            x = action(x, now)
        x = x.reshape(flat)
        return (x, *value[1:]) if isinstance(value, tuple) else x

    if end == "output":
        return module.register_forward_hook(lambda _, __, output: act(output))

    def before(_: Any, args: tuple, kwargs: dict) -> Any:
        if args:
            return (act(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: act(kwargs[name])}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _collect(case: Case, model: torch.nn.Module, actions: dict) -> None:
    """Groups in order; in a group all reads and conditions before any write."""
    number, skips = 0, set()

    def add(site: str, action: Callable[..., Tensor]) -> None:
        where = place(case.family, site)
        if where.skip is not None:
            skips.add(where.skip)
        actions.setdefault((where.path, where.end), []).append(action(where))

    for group in case.groups:
        steps = [(number + n, step) for n, step in enumerate(group)]
        number += len(group)
        for n, step in steps:
            for part in range(len(step.parts)):
                _add_read(add, case, model, n, step, part)
            _add_tests(add, case, model, n, step)
        for n, step in steps:
            if step.verb != "probe":
                for part, (basis, _) in enumerate(step.parts):
                    one = case.bases[basis]
                    add(one.write or one.site, lambda _, n=n, s=step, p=part: _write(case, n, s, p))
    for block in skips:  # last: what is kept is what edits left there
        actions.setdefault((block, "input"), []).append(_keep(block))


def _keep(block: str) -> Action:
    def keep(x: Tensor, now: Pass) -> Tensor:
        now.stash[block] = x
        return x

    return keep


def _value(x: Tensor, where: Place, now: Pass, eps: float) -> Tensor:
    """The site's value of what lies at its place."""
    if where.skip is not None:
        x = x + now.stash[where.skip]
    if where.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x if where.norm is None else x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


# ---------------------------------------------------------------- reading


def _add_read(add: Any, case: Case, model: Any, n: int, step: Step, part: int) -> None:
    number, indices = step.parts[part]
    basis, eps = case.bases[number], epsilon(model.config)
    rule = effective(step.where, basis.excluded)
    spans = step.written == "span"

    def reading(where: Place) -> Action:
        def act(x: Tensor, now: Pass) -> Tensor:
            value = _value(x, where, now, eps)
            mask = picks(rule, now.ids, now.prompt, now.special)
            if spans:
                now.held[n, part] = value, mask
                return x
            found = read(basis, case.family, value)
            near = found.near[..., list(indices)] if found.near.shape[-1] > 1 else found.near
            now.close(near)
            now.held[n, part] = found, mask
            if step.verb == "probe":
                now.readings.setdefault(n, {})[part] = found.f[..., list(indices)], mask
            return x

        return act

    add((basis.write or basis.site) if spans else basis.site, reading)


def _add_tests(add: Any, case: Case, model: Any, n: int, step: Step) -> None:
    when, eps = step.when, epsilon(model.config)
    if when is None:
        return

    def within(f: Tensor, now: Pass) -> None:
        ok = torch.ones_like(f, dtype=torch.bool)
        if when.above is not None:
            now.close((f - when.above).abs())
            ok = ok & (f > when.above)
        if when.below is not None:
            now.close((f - when.below).abs())
            ok = ok & (f < when.below)
        hit = ok.all(-1) if when.match == "all" else ok.any(-1)
        before = now.met.get(n)
        if before is not None:
            hit = hit & before if when.match == "all" else hit | before
        now.met[n] = hit

    def testing(where: Place, part: Any) -> Action:
        def act(x: Tensor, now: Pass) -> Tensor:
            value = _value(x, where, now, eps)
            if part is None:
                within(SCORES[when.scorer](value).unsqueeze(-1), now)
            else:
                found = read(case.bases[part[0]], case.family, value)
                now.close(found.near)
                within(found.f[..., list(part[1])], now)
            return x

        return act

    if when.scorer is not None:
        add(when.site, lambda where: testing(where, None))
    for part in when.parts:
        add(case.bases[part[0]].site, lambda where, part=part: testing(where, part))


# ---------------------------------------------------------------- writing


def _write(case: Case, n: int, step: Step, part: int) -> Action:
    def act(x: Tensor, now: Pass) -> Tensor:
        held, mask = now.held[n, part]
        if step.when is not None:
            met = now.met[n]
            mask = mask & (met.cumsum(1) > 0 if step.when.hold else met)
        if step.written == "span":
            delta, was, new, known = _without_span(case, now, n, step, part)
        else:
            delta, was, new, known = _changed(case, now, n, step, part, held)
        mask = mask & known
        delta = torch.where(mask[..., None], delta, 0.0)
        now.events.setdefault(n, {})[part] = mask, was, new, delta.norm(dim=-1)
        return x + delta

    return act


def _without_span(case: Case, now: Pass, n: int, step: Step, part: int) -> tuple:
    """What a part takes away beyond those before it at its write site, latent by latent."""
    x, _ = now.held[n, part]
    rows, own = [], []
    site = case.bases[step.parts[part][0]]
    for p, (number, indices) in enumerate(step.parts[: part + 1]):
        basis = case.bases[number]
        if (basis.write or basis.site) == (site.write or site.site):
            w = read(
                basis, case.family, torch.zeros(1, 1, width(case.family, basis.site), dtype=x.dtype)
            )
            rows += list(w.directions[list(indices)])
            own += [p == part] * len(indices)
    delta, coordinates = torch.zeros_like(x), []
    for i, is_own in enumerate(own):
        if is_own:
            before, after = _projected(x, rows[:i]), _projected(x, rows[: i + 1])
            delta = delta - (after - before)
            gained = (after - before).norm(dim=-1)
            coordinates.append(gained)
    was = torch.stack(coordinates, -1)  # sizes: the sign is the basis's
    return delta, was, torch.zeros_like(was), torch.ones_like(was[..., 0], dtype=torch.bool)


def _projected(x: Tensor, rows: list[Tensor]) -> Tensor:
    """The part of x in the span of rows, by singular vectors."""
    if not rows:
        return torch.zeros_like(x)
    _, sizes, v = torch.linalg.svd(torch.stack(rows).double(), full_matrices=False)
    v = v[sizes > 1e-9 * sizes.max()].to(x.dtype)
    return x @ v.T @ v


def _changed(case: Case, now: Pass, n: int, step: Step, part: int, held: Read) -> tuple:
    indices = list(step.parts[part][1])
    was = held.f[..., indices]
    start = sum(len(own) for _, own in step.parts[:part])
    amount, known = _amount(step.value, slice(start, start + len(indices)), n, step, was, now)
    begin = held.open[..., indices] if step.written == "reselect" else was
    new = _new(step, begin, amount, slice(start, start + len(indices)), now)
    if step.active_only:
        now.close(was.abs() + (was == 0) * float("inf") if _sparse(case, step, part) else was.abs())
        new = torch.where(was != 0, new, begin)
    new = torch.where(known, new, begin)
    if step.written != "reselect":
        delta = (new - was) @ held.directions[indices] * held.scale
        return delta, was, new, known.any(-1)
    basis, after = case.bases[step.parts[part][0]], held.open.clone()
    after[..., indices] = new
    now.close(edge(basis.kind, basis.k, after))
    after = largest(basis.kind, basis.k, after)
    delta = (after - held.f) @ held.directions * held.scale
    return delta, was, after[..., indices], known.any(-1)


def _sparse(case: Case, step: Step, part: int) -> bool:
    """Whether zeros are exactly zero: where nothing but a ReLU or a selection makes them."""
    return case.bases[step.parts[part][0]].kind not in ("direction", "neurons", "prefix")


def _new(step: Step, f: Tensor, amount: Tensor, span: slice, now: Pass) -> Tensor:
    new = {
        "ablate": lambda: amount.expand_as(f),
        "set": lambda: amount.expand_as(f),
        "scale": lambda: f * amount,
        "add": lambda: f + amount,
        "bound": lambda: f,
    }[step.verb]()
    if step.low is not None:
        new = new.clamp(min=step.low)
    return new if step.high is None else new.clamp(max=step.high)


def _amount(value: Any, span: slice, n: int, step: Step, f: Tensor, now: Pass) -> tuple:
    """A value at every token [b, t, k], and where there is one."""
    _, columns, k = f.shape
    known = torch.ones_like(f, dtype=torch.bool)
    place = range(columns)
    if isinstance(value, Schedule):
        first = value.values[0] if value.prompt is None else value.prompt
        last = len(value.values) - 1
        line = [first if p < now.prompt else value.values[min(p - now.prompt, last)] for p in place]
        return torch.tensor(line, dtype=f.dtype)[None, :, None].expand_as(f), known
    if isinstance(value, Drawn):
        listed = [value.rows[now.drawn(value.seed, now.number, p, len(value.rows))] for p in place]
        return torch.tensor(listed, dtype=f.dtype)[None, :, span].expand_as(f), known
    if isinstance(value, Patch):
        values, some = now.pinned[n]
        amount, known = torch.zeros(columns, k, dtype=f.dtype), torch.zeros(columns, k).bool()
        there = min(columns, len(values))
        amount[:there], known[:there] = values[:there, span].to(f.dtype), some[:there, span]
        return amount.expand_as(f), known.expand_as(f)
    return numbers(value, now.number)(f, span), known


def numbers(value: Numbers, number: int) -> Callable[[Tensor, slice], Tensor]:
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        value = value[number]
    if not isinstance(value, tuple):
        return lambda f, span: torch.tensor(value, dtype=f.dtype)
    return lambda f, span: torch.tensor(value[span], dtype=f.dtype)
