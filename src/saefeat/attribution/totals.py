"""Scores summed by latent, site and position, over all scored tokens or some of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import one_of
from ..dictionaries.latents import Dictionary, Latents
from ..errors import LatentError, SaefeatError
from ..model.sites import Site
from ..text.tokens import Tokens
from .columns import Columns, known_texts, require_positions, require_signed


def slope(columns: Columns) -> Tensor:
    """[n]: score over change; see ``Attribution.slope``."""
    moved = columns.change if columns.signed else columns.change.abs()
    # a score of all tokens together stands beside their mean change
    moved = torch.where(columns.position < 0, moved * columns.tokens[columns.prompt], moved)
    return torch.where(moved != 0, columns.score / moved, torch.nan)


def gap(columns: Columns) -> Tensor:
    """[prompts]: Σ scores less the metric's change; see ``Attribution.gap``."""
    require_signed(columns, "Attribution.gap")
    total = torch.zeros_like(columns.clean).index_add_(0, columns.prompt, columns.score)
    left_out = 0.0 if columns.dropped is None else columns.dropped[:, 0]
    return total + left_out - (columns.baseline - columns.clean)


def gap_by_site(columns: Columns) -> Tensor:
    """[prompts, dictionaries]; see ``Attribution.gap_by_site``."""
    require_signed(columns, "Attribution.gap_by_site")
    ends = columns.ends
    if ends is None or columns.dropped is not None:
        raise SaefeatError(
            "Attribution.gap_by_site: `scores` is made on a path that moves all sites, or without"
            " its smaller scores, wanted a path for each site, and all scores. Likely cause:"
            " one_site=True was not asked for, or keep= was. Try: Attribute(saes, metric,"
            " method=IG(8, 'gauss'), one_site=True)"
        )
    cell = columns.prompt * ends.shape[1] + columns.dictionary
    total = torch.zeros(ends.numel()).index_add_(0, cell, columns.score).view_as(ends)
    sites = [dictionary.write_site for dictionary in columns.dictionaries]
    shared = torch.tensor([[float(one == other) for other in sites] for one in sites])
    return total @ shared - (ends - columns.clean[:, None])


def by_latent(
    columns: Columns, per: str = "dataset", where: Tokens | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [m, 2], mean scores [m] and prompts [m]; see ``Attribution.totals``."""
    one_of("Attribution.totals", "per", per, ("dataset", "prompt"))
    kept, tokens = _kept(columns, where)
    rows = columns.prompt if per == "prompt" else torch.zeros_like(columns.prompt)
    keys = torch.stack([rows, columns.dictionary, columns.latent], 1)[kept]
    unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
    share = (columns.score / tokens.clamp(min=1)[columns.prompt])[kept]
    if per != "prompt":
        share = share / len(columns.tokens)
    values = torch.zeros(len(unique)).index_add_(0, inverse, share)
    return unique[:, 1:], values, unique[:, 0]


def by_site(columns: Columns, where: Tokens | None) -> dict[Site, float]:
    """Σ scores of each site over latents and tokens, mean over prompts."""
    rows, _ = _kept(columns, where)
    sums = torch.zeros(len(columns.dictionaries), dtype=torch.float64)
    sums.index_add_(0, columns.dictionary[rows], columns.score[rows].double())
    totals: dict[Site, float] = {}
    for dictionary, value in zip(columns.dictionaries, sums.tolist(), strict=True):
        site = dictionary.site
        totals[site] = totals.get(site, 0.0) + value / max(len(columns.tokens), 1)
    return dict(sorted(totals.items(), key=lambda item: item[0].order))


def by_position(columns: Columns, origin: str, where: Tokens | None) -> dict[int, float]:
    """Σ scores of each position over sites and latents, mean over prompts that have it."""
    function = "Attribution.by_position"
    one_of(function, "origin", origin, ("start", "end"))
    texts, _ = known_texts(columns, function)
    counted, lengths = token_mask(columns, where, function), token_counts(columns, function)
    prompt = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    position = torch.arange(len(prompt)) - _starts(lengths)[prompt]
    if origin == "end":
        position = position - torch.tensor(texts.prompts)[prompt]
    sums = by_token(columns, function)
    totals: dict[int, list[float]] = {}
    for key, value in zip(position[counted].tolist(), sums[counted].tolist(), strict=True):
        totals.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in sorted(totals.items())}


def by_token(columns: Columns, function: str) -> Tensor:
    """[all tokens] float64: Σ scores of each token over sites and latents, prompt after prompt.

    Raises:
        SaefeatError: for scores of whole prompts, which no token has.
    """
    require_positions(columns, function)
    lengths = token_counts(columns, function)
    token = _starts(lengths)[columns.prompt] + columns.position
    sums = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    return sums.index_add_(0, token, columns.score.double())


def token_mask(columns: Columns, where: Tokens | None, function: str) -> Tensor:
    """[all tokens] bool: tokens that were scored and that a rule selects, prompt after prompt."""
    texts, scored = known_texts(columns, function)
    return scored if where is None else torch.cat(texts.select(where)) & scored


def token_counts(columns: Columns, function: str) -> Tensor:
    """[prompts]: real tokens of each prompt."""
    texts, _ = known_texts(columns, function)
    return torch.tensor([len(row) for row in texts.ids])


def _starts(lengths: Tensor) -> Tensor:
    """[prompts]: the number of each prompt's first token among all tokens."""
    return lengths.cumsum(0) - lengths


def _kept(columns: Columns, where: Tokens | None) -> tuple[Tensor, Tensor]:
    """Which rows count, [n] bool, and how many scored tokens of each prompt, [prompts].

    Raises:
        SaefeatError: for a rule on a result that does not know its tokens.
    """
    if where is None:
        return torch.ones(len(columns), dtype=torch.bool), columns.tokens
    function = "Attribution.totals"
    counted, lengths = token_mask(columns, where, function), token_counts(columns, function)
    require_positions(columns, function)
    rows = counted[_starts(lengths)[columns.prompt] + columns.position]
    prompt = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return rows, torch.zeros_like(columns.tokens).index_add_(0, prompt, counted.long())


def ranked(
    columns: Columns, keys: Tensor, values: Tensor, k: int, within: Latents | None
) -> list[tuple[int, int, float]]:
    """(dictionary, latent, score) of the k highest positive scores, best first.

    Raises:
        LatentError: for k below 1 or not whole, or ``within`` of other dictionaries.
    """
    if type(k) is not int or k < 1:
        raise LatentError(
            f"Attribution.top: `k` is {k!r}, wanted a whole number, at least 1. Likely cause: a"
            " budget of no latents, or a share of them. Try: scores.top(20)"
        )
    allowed = None if within is None else set(members(columns.dictionaries, within))
    best: list[tuple[int, int, float]] = []
    for row in values.argsort(descending=True, stable=True).tolist():
        pair = (int(keys[row, 0]), int(keys[row, 1]))
        if len(best) == k or values[row] <= 0:
            break
        if allowed is None or pair in allowed:
            best.append((*pair, float(values[row])))
    return best


def members(dictionaries: Sequence[Dictionary], latents: Latents) -> list[tuple[int, int]]:
    """(dictionary, latent) pairs in order.

    Raises:
        LatentError: for a dictionary that was not attributed; the same file loaded twice is two.
    """
    number = {id(d): n for n, d in enumerate(dictionaries)}
    for basis, _ in latents.parts:
        if id(basis) not in number:
            raise LatentError(
                f"Attribution: `latents` is of {basis!r}, wanted latents of the dictionaries that"
                " were attributed. Likely cause: the dictionaries were loaded again, and are other"
                " objects. Try: select from the same saes that Attribute was given"
            )
    return [(number[id(basis)], index) for basis, indices in latents.parts for index in indices]
