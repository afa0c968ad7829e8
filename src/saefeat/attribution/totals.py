"""Scores summed by latent, site and position, over all scored tokens or some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import one_of
from ..dictionaries.base import Dictionary
from ..dictionaries.latents import Latents
from ..errors import LatentError, SaefeatError
from ..model.sites import Site
from ..text.tokens import Tokens

if TYPE_CHECKING:
    from .scores import Attribution


def kept(found: Attribution, where: Tokens | None) -> tuple[Tensor, Tensor]:
    """Which rows count, [n] bool, and how many scored tokens of each prompt, [prompts].

    Raises:
        SaefeatError: for a rule on a result that does not know its tokens.
    """
    if where is None:
        return torch.ones(len(found), dtype=torch.bool), found.tokens
    chosen = token_mask(found, where, "Attribution.totals")  # [all tokens]
    require_positions(found, "Attribution.totals")
    rows = chosen[token_place(found)]
    owner = torch.repeat_interleave(torch.arange(len(found.tokens)), lengths(found))
    return rows, torch.zeros_like(found.tokens).index_add_(0, owner, chosen.long())


def token_mask(found: Attribution, where: Tokens | None, what: str) -> Tensor:
    """[all tokens] bool: tokens that were scored and that a rule selects, prompt after prompt."""
    require_texts(found, what)
    assert found.texts is not None and found.scored is not None
    if where is None:
        return found.scored
    return torch.cat(found.texts.select(where)) & found.scored


def token_place(found: Attribution) -> Tensor:
    """[n]: each row's place among all tokens of all prompts."""
    start = lengths(found).cumsum(0) - lengths(found)
    return start[found.prompt] + found.position


def lengths(found: Attribution) -> Tensor:
    """[prompts]: real tokens of each prompt."""
    require_texts(found, "Attribution")
    assert found.texts is not None
    return torch.tensor([len(row) for row in found.texts.ids])


def require_texts(found: Attribution, what: str) -> None:
    """Refuse what needs the prompts' tokens where they are not known.

    Raises:
        SaefeatError: saying how to get them.
    """
    if found.texts is None or found.scored is None:
        raise SaefeatError(
            f"{what}: `scores` is made without the prompts' tokens, wanted scores that know which"
            " tokens were scored. Likely cause: an Attribution built by hand, or saved by an older"
            " version. Try: Attribute(saes, metric)(model, prompts)"
        )


def require_positions(found: Attribution, what: str) -> None:
    """Refuse to lay out by token what was moved at all tokens together.

    Raises:
        SaefeatError: saying how to get scores by token.
    """
    if bool((found.position < 0).any()):
        raise SaefeatError(
            f"{what}: `scores` is of whole prompts: each latent was moved at all scored tokens"
            " together, wanted scores that belong to tokens. Likely cause: Exact or"
            ' FiniteDifference, whose default is per="latent". Try: method=Exact(per="token"), or'
            " Attribute(..., where=...) before the run"
        )


def require_signed(found: Attribution, what: str) -> None:
    """Refuse what means nothing for sizes without a sign.

    Raises:
        SaefeatError: saying how to get signed scores.
    """
    if not found.signed:
        raise SaefeatError(
            f"{what}: `scores` is sizes without a sign, wanted signed scores, whose sum estimates a"
            " change. Likely cause: GradDrop, which averages absolute values. Try:"
            " backward=GradDrop(signed=True), or no backward="
        )


def by_site(found: Attribution, where: Tokens | None) -> dict[Site, float]:
    """Σ scores of each site over latents and tokens, mean over prompts."""
    rows, _ = kept(found, where)
    sums = torch.zeros(len(found.dictionaries), dtype=torch.float64)
    sums.index_add_(0, found.dictionary[rows], found.score[rows].double())
    totals: dict[Site, float] = {}
    for dictionary, value in zip(found.dictionaries, sums.tolist(), strict=True):
        at = dictionary.site
        totals[at] = totals.get(at, 0.0) + value / max(len(found.tokens), 1)
    return dict(sorted(totals.items(), key=lambda item: item[0].order))


def by_position(found: Attribution, origin: str, where: Tokens | None) -> dict[int, float]:
    """Σ scores of each position over sites and latents, mean over prompts that have it."""
    one_of("Attribution.by_position", "origin", origin, ("start", "end"))
    chosen, long = token_mask(found, where, "Attribution.by_position"), lengths(found)
    owner = torch.repeat_interleave(torch.arange(len(long)), long)
    place = torch.arange(len(owner)) - (long.cumsum(0) - long)[owner]
    if origin == "end" and found.texts is not None:
        place = place - torch.tensor(found.texts.prompts)[owner]
    sums = by_token(found, "Attribution.by_position")
    totals: dict[int, list[float]] = {}
    for position, value in zip(place[chosen].tolist(), sums[chosen].tolist(), strict=True):
        totals.setdefault(position, []).append(value)
    return {position: sum(v) / len(v) for position, v in sorted(totals.items())}


def by_token(found: Attribution, what: str) -> Tensor:
    """[all tokens] float64: Σ scores of each token over sites and latents, prompt after prompt.

    Raises:
        SaefeatError: for scores of whole prompts, which no token has.
    """
    require_positions(found, what)
    sums = torch.zeros(int(lengths(found).sum()), dtype=torch.float64)
    return sums.index_add_(0, token_place(found), found.score.double())


def members(dictionaries: Sequence[Dictionary], latents: Latents) -> list[tuple[int, int]]:
    """(dictionary, latent) pairs in order.

    Raises:
        LatentError: for a dictionary that was not attributed; the same file loaded twice is two.
    """
    place = {id(d): n for n, d in enumerate(dictionaries)}
    for basis, _ in latents.parts:
        if id(basis) not in place:
            raise LatentError(
                f"Attribution: `latents` is of {basis!r}, wanted latents of the dictionaries that"
                " were attributed. Likely cause: the dictionaries were loaded again, and are other"
                " objects. Try: select from the same saes that Attribute was given"
            )
    return [(place[id(basis)], index) for basis, indices in latents.parts for index in indices]
