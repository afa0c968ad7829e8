"""Which tokens a rule selects: by position in one unpadded text, of which a part is the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Rule

SCORES = {
    "norm": lambda x: x.norm(dim=-1),
    "first": lambda x: x[..., 0],
    "squares": lambda x: x.pow(2).mean(-1) - x[..., 1],
}
"""Functions of a site's value, for conditions."""

FUNCTIONS = {
    "even ids": lambda ids, position: ids % 2 == 0,
    "every third": lambda ids, position: position % 3 == 1,
}
"""Functions of ids and positions, for rules."""


def picks(rule: Rule, ids: Tensor, prompt: int, special: tuple[int, ...]) -> Tensor:
    """[b, t] bool for rows of one length, whose first ``prompt`` tokens are the prompt."""
    kind, *rest = rule
    place = torch.arange(ids.shape[1]).expand_as(ids)
    if kind in ("and", "or"):
        a, b = (picks(part, ids, prompt, special) for part in rest)
        return a & b if kind == "and" else a | b
    if kind == "not":
        return ~picks(rest[0], ids, prompt, special)
    if kind == "where":
        return FUNCTIONS[rest[0]](ids, place)
    if kind in ("ids", "special"):
        wanted = special if kind == "special" else rest[0]
        return torch.tensor([[i in wanted for i in row] for row in ids.tolist()])
    span = {
        "all": lambda: range(10**6),
        "prompt": lambda: range(prompt),
        "first": lambda: range(min(rest[0], prompt)),
        "last": lambda: range(max(0, prompt - rest[0]), prompt),
        "positions": lambda: range(rest[0], 10**6 if rest[1] is None else rest[1]),
        "generated": lambda: range(
            prompt + rest[0], 10**6 if rest[1] is None else prompt + rest[1]
        ),
    }[kind]()
    return torch.tensor([[p in span for p in row] for row in place.tolist()])


def names(rule: Rule, kinds: tuple[str, ...]) -> bool:
    """Whether a rule asks for tokens so, not only for others than those."""
    kind, *rest = rule
    if kind in ("and", "or"):
        return any(names(part, kinds) for part in rest)
    return kind in kinds


def effective(where: Rule | None, excluded: Rule) -> Rule:
    """Where a verb acts on a dictionary that was not trained on ``excluded``.

    Rules that say all tokens, or name tokens by their ids, mean them; one that names positions
    means those, whatever positions are excluded.
    """
    if not excluded:
        return where or ("all",)
    if where is None:
        return ("not", excluded)
    if where == ("all",) or names(where, ("ids", "special")):
        return where
    left = excluded
    if names(where, ("positions",)):
        parts = excluded[1:] if excluded[0] == "or" else (excluded,)
        kept = [part for part in parts if part[0] != "positions"]
        if not kept:
            return where
        left = kept[0] if len(kept) == 1 else ("or", *kept)
    return ("and", where, ("not", left))
