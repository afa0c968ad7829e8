"""Scores by central finite differences in float64, prompt by prompt, by plain hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from .asked import Asked
from .cases import Case, Step
from .formulas import Read, read
from .hand import Pass, hooks
from .places import Place, epsilon, place
from .rules import effective, picks
from .weights import model

STEP = 1e-4
SPECIAL = (0, 1, 2, 3)
Table = dict[tuple[int, int, int], float]
"""(part, position, latent) → score."""


class Norm(nn.Module):
    """A norm in the model's own precision; transformers' RMS norms compute in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


@cache
def precise(family: str) -> nn.Module:
    """The oracle's model with norms in float64."""
    found = copy.deepcopy(model(family, "float64", "oracle"))
    for module in list(found.modules()):
        for name, child in list(module.named_children()):
            if "RMSNorm" in type(child).__name__:
                one = 1.0 if "Gemma" in type(child).__name__ else 0.0
                eps = getattr(child, "variance_epsilon", getattr(child, "eps", None))
                setattr(module, name, Norm(child.weight.detach() + one, eps))
    return found


def _softmax(x: Tensor, dim: int, dtype: object = None) -> Tensor:
    """In x's own precision; Gemma 2's attention asks for float32."""
    return x.softmax(dim)


def metric(asked: Asked, logits: Tensor) -> Tensor:
    """[b] from last logits [b, v]."""
    kind, *tokens = asked.metric
    if kind == "mass":
        return logits.logsumexp(-1)
    return logits[:, tokens[0]] - (logits[:, tokens[1]] if kind == "logit_diff" else 0.0)


def nodes(asked: Asked) -> list[tuple[float, float]]:
    """Where gradients are taken, with their weights."""
    n = asked.steps
    if n == 0:
        return [(0.0, 1.0)]
    if asked.rule == "gauss":
        points, weights = np.polynomial.legendre.leggauss(n)
        return [((p + 1) / 2, w / 2) for p, w in zip(points, weights, strict=True)]
    return [((k + 0.5 * (asked.rule == "midpoint")) / n, 1 / n) for k in range(n)]


class Watched:
    """Raw values at sites, and moves there, by hooks on the modules."""

    def __init__(self, family: str) -> None:
        self.family, self.model = family, precise(family)

    def run(
        self,
        ids: Tensor,
        sites: set[str],
        moves: dict[str, Callable[[Tensor], Tensor]] | None = None,
        edit: Case | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Last logits [b, v], and the values [b, t, d] of sites behind moves and edits.

        A move is given the site's value and gives what is added to it.
        """
        seen: dict[str, Tensor] = {}
        with torch.no_grad(), ExitStack() as stack:
            for site in sites:
                where = place(self.family, site)
                if where.skip is not None:
                    self._at(stack, Place(where.skip, "input"), f"block of {site}", seen, None)
            if edit is not None:
                now = Pass(ids, ids.shape[1], 0, SPECIAL, {}, lambda *_: 0)
                stack.enter_context(hooks(self.model, edit, now))
            for site in sites:
                move = (moves or {}).get(site)
                self._at(stack, place(self.family, site), site, seen, move)
            stack.enter_context(patch.object(nn.functional, "softmax", _softmax))
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -1]
        return logits, seen

    def _at(self, stack: ExitStack, where: Place, site: str, seen: dict, move: object) -> None:
        def act(x: Tensor) -> Tensor:
            added = seen.get(f"block of {site}", 0.0) if where.skip is not None else 0.0
            if callable(move):
                x = x + move(x + added)
            seen[site] = x + added
            return x

        def after(_: object, __: object, out: object) -> object:
            return (act(out[0]), *out[1:]) if isinstance(out, tuple) else act(out)

        def before(_: object, args: tuple, kwargs: dict) -> tuple:
            if args:
                return (act(args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, kwargs | {name: act(kwargs[name])}

        module = self.model.get_submodule(where.path)
        if where.end == "output":
            stack.callback(module.register_forward_hook(after).remove)
        else:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)


def scores(asked: Asked, number: int) -> tuple[Table, float, float]:
    """One prompt's scores, and its metric in the clean and in the baseline run."""
    ids, watched = torch.tensor([asked.prompts[number]]), Watched(asked.family)
    bases = [asked.bases[n] for n, _ in asked.target]
    writes = [basis.write or basis.site for basis in bases]
    sites = {basis.site for basis in bases} | set(writes)
    clean, values = watched.run(ids, sites)
    masks = [picks(effective(asked.where, b.excluded), ids, ids.shape[1], SPECIAL) for b in bases]
    before = [_read(asked, watched, part, values) for part in range(len(bases))]
    after, ends, last = _baseline(asked, watched, number, ids, values, before, masks, sites)
    table: Table = {}
    for alpha, weight in nodes(asked):
        for part, write in enumerate(writes):
            moved = [write] if asked.one_site else writes
            moves = {w: (lambda x, w=w, a=alpha: a * (ends[w] - x)) for w in moved}
            ways = _ways(asked, part, before[part], after[part], masks[part])
            if ways:
                slopes = _differences(asked, watched, ids, sites, moves, write, ways)
                for key, slope in zip(ways, slopes, strict=True):
                    table[key] = table.get(key, 0.0) + weight * slope
    if last is None:
        moves = {w: (lambda x, w=w: ends[w] - x) for w in writes}
        last = watched.run(ids, sites, moves)[0]
    return table, float(metric(asked, clean)), float(metric(asked, last))


def _read(asked: Asked, watched: Watched, part: int, values: dict[str, Tensor]) -> Read:
    """A part's latents of the values of a run."""
    basis = asked.bases[asked.target[part][0]]
    where, x = place(asked.family, basis.site), values[basis.site]
    if where.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if where.norm is not None:
        x = x / (x.pow(2).mean(-1, keepdim=True) + epsilon(watched.model.config)).sqrt()
    return read(basis, asked.family, x)


def _baseline(
    asked: Asked, watched: Watched, number: int, ids: Tensor, values: dict, before: list[Read],
    masks: list[Tensor], sites: set[str],
) -> tuple:  # fmt: skip
    """What latents and their scales become, where each written site goes, and that run's logits."""
    parts = range(len(before))
    if isinstance(asked.baseline, Step):
        step = asked.baseline
        edit = Case(asked.family, asked.bases, ((step,),), asked.prompts, "run")
        last, moved = watched.run(ids, sites, edit=edit)
        after = [_read(asked, watched, part, moved) for part in parts]
        return [(one.f, one.scale) for one in after], moved, last
    if asked.others:
        last, moved = watched.run(torch.tensor([asked.others[number]]), sites)
        after = [_read(asked, watched, part, moved) for part in parts]
        return [(one.f, one.scale) for one in after], moved, last
    ends, after, start = dict(values), [], 0
    for part, one in enumerate(before):
        basis, indices = asked.target[part]
        given = 0.0 if asked.baseline is None else asked.baseline
        own = given[start : start + len(indices)] if isinstance(given, tuple) else given
        new, start = one.f.clone(), start + len(indices)
        new[..., list(indices)] = torch.tensor(own, dtype=new.dtype)
        write = asked.bases[basis].write or asked.bases[basis].site
        delta = (new - one.f) @ one.directions * one.scale
        ends[write] = ends[write] + torch.where(masks[part][..., None], delta, 0.0)
        after.append((new, one.scale))
    return after, ends, None


def _ways(asked: Asked, part: int, before: Read, after: tuple, mask: Tensor) -> dict:
    """(part, position, latent) → the vector that moving it adds at its token."""
    found = {}
    for position in mask[0].nonzero()[:, 0].tolist():
        for i in asked.target[part][1]:
            will = after[0][0, position, i] * after[1][0, position]
            was = before.f[0, position, i] * before.scale[0, position]
            found[part, position, i] = (will - was) * before.directions[i]
    return found


def _differences(
    asked: Asked, watched: Watched, ids: Tensor, sites: set, moves: dict, write: str, ways: dict
) -> list[float]:
    """The metric's slope along each vector at its token of the written site, at one node."""
    listed = list(ways.items())
    sizes = [max(float(vector.norm()), 1e-12) for _, vector in listed]
    shape = (2 * len(listed), ids.shape[1], listed[0][1].shape[-1])
    added = torch.zeros(shape, dtype=torch.float64)
    for n, (((_, position, _), vector), size) in enumerate(zip(listed, sizes, strict=True)):
        added[2 * n, position] = STEP * vector / size
        added[2 * n + 1, position] = -STEP * vector / size
    shifts: dict[str, Tensor] = {}

    def noted(site: str, x: Tensor) -> Tensor:
        shifts[site] = moves[site](x)
        return shifts[site]

    watched.run(ids, sites, {site: partial(noted, site) for site in moves})
    # a gradient passes a moved site as it is: by how much that moves is constant
    fixed = {site: (lambda _, shift=shift: shift) for site, shift in shifts.items()}
    fixed[write] = lambda _: shifts[write] + added
    logits, _ = watched.run(ids.expand(len(added), -1), sites, fixed)
    values = metric(asked, logits)
    slopes = (values[::2] - values[1::2]) / (2 * STEP)
    return [float(s) * size for s, size in zip(slopes, sizes, strict=True)]
