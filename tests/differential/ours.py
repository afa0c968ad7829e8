"""A case as objects of saefeat, made from its plain description by the public names."""

from __future__ import annotations

from functools import cache, reduce
from operator import and_, or_
from typing import Any

import torch

import saefeat as sf
from helpers import wrapped
from saefeat.dictionaries.weights import InMemory

from .cases import Basis, Case, Drawn, Parts, Patch, Rule, Schedule, Step, When
from .rules import FUNCTIONS, SCORES
from .weights import inner, model, tensors


@cache
def nn_model(family: str, dtype: str) -> Any:
    """An nnsight model, one for all cases."""
    return wrapped(model(family, dtype, "ours"))


def rule_of(rule: Rule | None) -> sf.Tokens | None:
    """A rule by the class's methods."""
    if rule is None:
        return None
    kind, *rest = rule
    if kind in ("and", "or"):
        return (and_ if kind == "and" else or_)(*map(rule_of, rest))
    if kind == "not":
        return ~rule_of(rest[0])
    if kind == "where":
        return sf.Tokens.where(FUNCTIONS[rest[0]])
    if kind == "ids":
        return sf.Tokens.ids(*rest[0])
    return getattr(sf.Tokens, kind)(*rest)


def dictionary(basis: Basis, family: str) -> Any:
    """A dictionary; always another object."""
    w = tensors(basis, family)
    if basis.kind == "direction":
        rows = w["rows"]
        made = sf.Direction.orthonormal(rows, site=basis.site) if len(rows) > 1 else None
        made = made or sf.Direction(3 * rows[0], site=basis.site)
    elif basis.kind == "neurons":
        from .places import width

        made = sf.Neurons(basis.site, width(family, basis.site))
    elif basis.kind in ("function", "prefix"):
        made = sf.dictionaries.Function(
            _encoder(basis, w["A"]), w["directions"], site=basis.site, write_site=basis.write,
            width=len(w["A"]), prefix=basis.kind == "prefix",
        )  # fmt: skip
    else:
        made = sf.SAE(
            InMemory(w), architecture=inner(basis), site=basis.site, write_site=basis.write,
            norm=basis.norm, subtract_bias=basis.subtract, centered=basis.centered,
            k=basis.k or None, rescale=basis.rescale, excluded=_excluded(basis.excluded),
        )  # fmt: skip
        made = made.error() if basis.kind.startswith("error of ") else made
    if basis.excluded:
        made.excluded = _excluded(basis.excluded)
    return made


def _encoder(basis: Basis, a: torch.Tensor) -> Any:
    def squares(x: torch.Tensor) -> torch.Tensor:
        return (x @ a.to(x.dtype)) ** 2

    def means(x: torch.Tensor) -> torch.Tensor:
        count = torch.arange(1, x.shape[-2] + 1, dtype=x.dtype).unsqueeze(-1)
        return (x @ a.to(x.dtype)).cumsum(-2) / count

    return squares if basis.kind == "function" else means


def _excluded(rule: Rule) -> Any:
    if not rule:
        return ()
    if rule[0] == "ids":
        return rule[1]
    return "special" if rule[0] == "special" else rule_of(rule)


class Made:
    """The dictionaries of a case, its intervention, and whatever runs its values need."""

    def __init__(self, case: Case) -> None:
        self.case, self.nn = case, nn_model(case.family, case.dtype)
        self.bases = [dictionary(basis, case.family) for basis in case.bases]
        links = [reduce(and_, map(self._step, group)) for group in case.groups]
        self.intervention = reduce(or_, links)

    def latents(self, parts: Parts) -> Any:
        return reduce(or_, [self.bases[n].latents(list(indices)) for n, indices in parts])

    def _step(self, step: Step) -> Any:
        latents, where = self.latents(step.parts), rule_of(step.where)
        if step.verb == "probe":
            return sf.Probe(latents, where=where, reduce=step.reduce)
        if step.written != "frozen":
            latents = getattr(latents, step.written)()
        how: dict[str, Any] = {"where": where, "when": self._when(step.when)}
        value = self._value(step)
        if step.verb == "ablate":
            return sf.Ablate(latents, to=value, **how)
        how |= {"low": step.low, "high": step.high, "active_only": step.active_only}
        if step.verb == "bound":
            return sf.Clamp(latents, **how)
        return sf.Clamp(latents, **{"value" if step.verb == "set" else step.verb: value}, **how)

    def _when(self, when: When | None) -> Any:
        if when is None:
            return None
        how = {"above": when.above, "below": when.below, "match": when.match, "hold": when.hold}
        if when.scorer is not None:
            return sf.When(SCORES[when.scorer], site=when.site, **how)
        return sf.When(self.latents(when.parts), **how)

    def _value(self, step: Step) -> Any:
        value = step.value
        if isinstance(value, Schedule):
            return sf.values.Schedule(list(value.values), prompt=value.prompt)
        if isinstance(value, Drawn):
            rows = torch.tensor(value.rows, dtype=torch.float64)
            return sf.values.Resample(rows, seed=value.seed)
        if isinstance(value, Patch):
            probe = sf.Probe(self.latents(step.parts), where=rule_of(value.where))
            clean = sf.run(
                self.nn, batch(self.case), probe, max_new_tokens=value.new,
                batch_size=self.case.batch_size, decode=greedy(self.case),
            )  # fmt: skip
            return sf.values.Patch(clean.readings[0])
        return torch.tensor(value, dtype=torch.float64) if isinstance(value, tuple) else value


def greedy(case: Case) -> Any:
    return sf.generation.Greedy(stop=case.stops) if case.stops else None


def batch(case: Case, right: bool = False) -> dict[str, torch.Tensor]:
    """The prompts padded by hand, with more padding than is needed where the case says so."""
    wide = max(map(len, case.prompts)) + case.pads
    ids, mask = [], []
    for prompt in case.prompts:
        pad, own = [7] * (wide - len(prompt)), list(prompt)
        ids.append([*own, *pad] if right else [*pad, *own])
        ones, zeros = [1] * len(own), [0] * len(pad)
        mask.append([*ones, *zeros] if right else [*zeros, *ones])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@cache
def draws(
    seed: int, rows: int, prompts: int = 4, positions: int = 24
) -> tuple[tuple[int, ...], ...]:
    """Which row a seed draws for each prompt and position, read off one plain run."""
    nn = nn_model("llama", "float64")
    first = sf.Neurons("resid_post.0", 32).latents([0])
    numbers = torch.arange(rows, dtype=torch.float64)[:, None]
    step = sf.Clamp(first, sf.values.Resample(numbers, seed=seed)) | sf.Probe(first)
    ids = torch.full((prompts, positions), 5)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = sf.run(nn, given, step).readings[0].values[..., 0]
    return tuple(tuple(round(v) for v in row) for row in found.tolist())


def drawn(seed: int, prompt: int, position: int, rows: int) -> int:
    return draws(seed, rows)[prompt][position]
