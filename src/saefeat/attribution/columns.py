"""The columns of an attribution, their sums, and what they must know to be summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import one_of
from ..dictionaries.latents import Dictionary, Latents
from ..errors import LatentError, SaefeatError
from ..model.sites import Site
from ..results.provenance import Provenance
from ..text.texts import Texts
from ..text.tokens import Tokens
from .convergence import Convergence


@dataclass(frozen=True)
class Columns:
    """The fields of an ``Attribution``, which documents them, and sums over its scores."""

    dictionaries: tuple[Dictionary, ...]
    prompt: Tensor
    dictionary: Tensor
    position: Tensor
    latent: Tensor
    score: Tensor
    activation: Tensor
    change: Tensor
    clean: Tensor
    baseline: Tensor
    tokens: Tensor
    ends: Tensor | None = None
    dropped: Tensor | None = None
    scored: Tensor | None = None
    texts: Texts | None = None
    metric: str = ""
    signed: bool = True
    provenance: Provenance | None = None
    convergence: Convergence | None = None

    def __len__(self) -> int:
        return len(self.score)

    @property
    def slope(self) -> Tensor:
        """[n]: score over change, the mean gradient's dot product with the latent's direction.

        The size of that product for scores without a sign. NaN where the activation is the same
        in both runs and the direction itself moved, as with SAEs that normalize their input.
        """
        moved = self.change if self.signed else self.change.abs()
        # a score of all tokens together stands beside their mean change
        moved = torch.where(self.position < 0, moved * self.tokens[self.prompt], moved)
        return torch.where(moved != 0, self.score / moved, torch.nan)

    @property
    def gap(self) -> Tensor:
        """[prompts]: Σ scores, dropped ones too, − (baseline − clean) of the metric.

        Zero for exact integrated gradients of a single site whose dictionary explains all of the
        change. Sites in a row each carry the same effect, so over many sites the sum overcounts.
        NaN where no baseline run was made.

        Raises:
            SaefeatError: for scores without a sign, which do not add up to a change.
        """
        require(self, "Attribution.gap", "signed")
        total = torch.zeros_like(self.clean).index_add_(0, self.prompt, self.score)
        left_out = 0.0 if self.dropped is None else self.dropped[:, 0]
        return total + left_out - (self.baseline - self.clean)

    @property
    def gap_by_site(self) -> Tensor:
        """[prompts, dictionaries]: Σ scores at each dictionary's site − the change the site makes.

        With ``one_site=True`` every site has a path of its own, so each gap is one of its own too:
        zero for exact integration and a dictionary that explains all of the change. Dictionaries
        that write at one site share its path, and its gap.

        Raises:
            SaefeatError: without ``one_site=True``, where ``keep`` left scores out, or for scores
                without a sign.
        """
        require(self, "Attribution.gap_by_site", "signed", "ends")
        ends = self.ends
        assert ends is not None
        cell = self.prompt * ends.shape[1] + self.dictionary
        total = ends.new_zeros(ends.numel()).index_add_(0, cell, self.score).view_as(ends)
        sites = [dictionary.write_site for dictionary in self.dictionaries]
        shared = ends.new_tensor([[float(one == other) for other in sites] for one in sites])
        return total @ shared - (ends - self.clean[:, None])

    @property
    def heaviest(self) -> tuple[Tensor, Tensor]:
        """Each prompt's token with the most of Σ|score|: its share and its position, [prompts].

        In many models the first token is an outlier that holds half of the scores' size. Of a
        prompt without scores, or with scores of no token, share and position are NaN and −1.
        """
        kept = self.position >= 0
        prompt, position = self.prompt[kept], self.position[kept]
        width = int(position.max()) + 1 if len(position) else 1
        table = torch.zeros(len(self.clean) * width, dtype=torch.float64)
        table.index_add_(0, prompt * width + position, self.score[kept].abs().double())
        sizes = table.view(len(self.clean), width)
        share, at = (sizes / sizes.sum(1, keepdim=True)).max(1)
        return share, torch.where(share.isnan(), -1, at)

    @property
    def degenerate(self) -> Tensor:
        """[prompts] bool: the metric is exactly the same in both runs: nothing to attribute.

        It happens when the baseline's own token is the very token it is compared with, which makes
        the metric zero in both, and where the baseline changes nothing.
        """
        return self.clean == self.baseline

    def totals(
        self, *, per: str = "dataset", where: Tokens | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores by latent: the mean over a prompt's scored tokens, then over prompts.

        Args:
            per: ``"dataset"``, or ``"prompt"`` to keep prompts apart.
            where: count only scored tokens that this rule selects, in sums and in means:
                ``~Tokens.special()`` leaves BOS and the template's markers out,
                ``Tokens.role("user")`` all of the template. A prompt without any counts as zero.

        Returns:
            keys [m, 2] (dictionary, latent), values, and the prompt of each row: [m] and [m]
            for ``"prompt"`` (for ``"dataset"`` the last is all zeros).

        Raises:
            SaefeatError: for a rule on a result that does not know its tokens, or whose scores
                belong to none.
        """
        one_of("Attribution.totals", "per", per, ("dataset", "prompt"))
        kept, tokens = self._kept(where)
        rows = self.prompt if per == "prompt" else torch.zeros_like(self.prompt)
        keys = torch.stack([rows, self.dictionary, self.latent], 1)[kept]
        unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
        share = (self.score / tokens.clamp(min=1)[self.prompt])[kept]
        if per != "prompt":
            share = share / len(self.tokens)
        values = share.new_zeros(len(unique)).index_add_(0, inverse, share)
        return unique[:, 1:], values, unique[:, 0]

    def by_site(self, *, where: Tokens | None = None) -> dict[Site, float]:
        """Σ scores of each site over latents and tokens, mean over prompts.

        Sites in a row carry the same effect: compare them, do not add them.

        Args:
            where: only scored tokens that this rule selects.
        """
        rows, _ = self._kept(where)
        sums = torch.zeros(len(self.dictionaries), dtype=torch.float64)
        sums.index_add_(0, self.dictionary[rows], self.score[rows].double())
        totals: dict[Site, float] = {}
        for dictionary, value in zip(self.dictionaries, sums.tolist(), strict=True):
            site = dictionary.site
            totals[site] = totals.get(site, 0.0) + value / max(len(self.tokens), 1)
        return dict(sorted(totals.items(), key=lambda item: item[0].order))

    def by_position(
        self, *, origin: str = "start", where: Tokens | None = None
    ) -> dict[int, float]:
        """Σ scores of each position over sites and latents, mean over the prompts that have it.

        Args:
            origin: ``"start"``: 0 is a prompt's first real token; ``"end"``: −1 is its last, and
                a continuation's tokens count from 0.
            where: only scored tokens that this rule selects.

        Returns:
            Position → mean, for positions that are scored in at least one prompt.

        Raises:
            SaefeatError: for scores of whole prompts, which have no position.
        """
        function = "Attribution.by_position"
        one_of(function, "origin", origin, ("start", "end"))
        texts, sums, counted = by_token(self, function, where)
        totals: dict[int, list[float]] = {}
        for n, prompt in enumerate(texts.prompts):
            first = prompt if origin == "end" else 0
            values = zip(sums[n].tolist(), counted[n].tolist(), strict=True)
            for position, (value, counts) in enumerate(values):
                if counts:
                    totals.setdefault(position - first, []).append(value)
        return {key: sum(values) / len(values) for key, values in sorted(totals.items())}

    def _kept(self, where: Tokens | None) -> tuple[Tensor, Tensor]:
        """Which rows count, [n] bool, and how many scored tokens of each prompt, [prompts]."""
        if where is None:
            return torch.ones(len(self), dtype=torch.bool), self.tokens
        _, token, counted = _tokens(self, "Attribution.totals", where)
        return torch.cat(list(counted))[token], torch.stack([mask.sum() for mask in counted])


def by_token(
    columns: Columns, function: str, where: Tokens | None = None
) -> tuple[Texts, Sequence[Tensor], Sequence[Tensor]]:
    """The tokens; and a prompt, Σ scores of each [tokens] float64 over sites and latents, and
    whether it was scored and selected.
    """
    texts, token, counted = _tokens(columns, function, where)
    sums = torch.zeros(sum(map(len, counted)), dtype=torch.float64)
    sums.index_add_(0, token, columns.score.double())
    return texts, sums.split([len(mask) for mask in counted]), counted


def _tokens(
    columns: Columns, function: str, where: Tokens | None
) -> tuple[Texts, Tensor, Sequence[Tensor]]:
    """The tokens, the number of each row's among all [n], and a prompt which are scored and
    selected [tokens] bool.
    """
    require(columns, function, "texts", "positions")
    texts, scored = columns.texts, columns.scored
    assert texts is not None and scored is not None
    if where is not None:
        scored = torch.cat(texts.select(where)) & scored
    lengths = torch.tensor([len(row) for row in texts.ids])
    starts = lengths.cumsum(0) - lengths
    return texts, starts[columns.prompt] + columns.position, scored.split(lengths.tolist())


_NEEDS = {  # got, wanted, cause, call
    "texts": (
        "made without the prompts' tokens",
        "scores that know which tokens were scored",
        "an Attribution built by hand, or saved by an older version",
        "Attribute(saes, metric)(model, prompts)",
    ),
    "positions": (
        "of whole prompts: each latent was moved at all scored tokens together",
        "scores that belong to tokens",
        'Exact or FiniteDifference, whose default is per="latent"',
        'method=Exact(per="token"), or Attribute(..., where=...) before the run',
    ),
    "signed": (
        "sizes without a sign",
        "signed scores, whose sum estimates a change",
        "GradDrop, which averages absolute values",
        "backward=GradDrop(signed=True), or no backward=",
    ),
    "ends": (
        "made on a path that moves all sites, or without its smaller scores",
        "a path for each site, and all scores",
        "one_site=True was not asked for, or keep= was",
        "Attribute(saes, metric, method=IG(8, 'gauss'), one_site=True)",
    ),
}


def require(columns: Columns, function: str, *needs: str) -> None:
    """Refuse to sum scores that do not know what the sum takes, or mean nothing in it."""
    lacking = {
        "texts": columns.texts is None or columns.scored is None,
        "positions": bool((columns.position < 0).any()),
        "signed": not columns.signed,
        "ends": columns.ends is None or columns.dropped is not None,
    }
    for need in needs:
        if lacking[need]:
            got, wanted, cause, call = _NEEDS[need]
            raise SaefeatError(
                f"{function}: `scores` is {got}, wanted {wanted}. Likely cause: {cause}. Try:"
                f" {call}"
            )


def ranked(
    columns: Columns,
    keys: Tensor,
    values: Tensor,
    k: int,
    within: Latents | None,
    exactly: bool = False,
) -> list[tuple[int, int, float]]:
    """(dictionary, latent, score) of the k highest scores, best first.

    Positive ones alone, unless ``exactly`` asks for k whatever they are.
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
        if len(best) == k or (values[row] <= 0 and not exactly):
            break
        if allowed is None or pair in allowed:
            best.append((*pair, float(values[row])))
    if exactly and len(best) < k:
        raise LatentError(
            f"Attribution.top: `k` is {k}, exactly, where {len(best)} latents have a score, wanted"
            " at most as many. Likely cause: few of the latents in `within` moved, or few tokens"
            f" are scored. Try: scores.top({max(1, len(best))}, exactly=True), or a wider `within`"
        )
    return best


def members(dictionaries: Sequence[Dictionary], latents: Latents) -> list[tuple[int, int]]:
    """(dictionary, latent) pairs in order, of dictionaries that were attributed."""
    number = {id(d): n for n, d in enumerate(dictionaries)}
    for basis, _ in latents.parts:
        if id(basis) not in number:
            raise LatentError(
                f"Attribution: `latents` is of {basis!r}, wanted those attributed. Likely cause:"
                " they were loaded again, and are other objects. Try: select from the saes"
                " that Attribute was given"
            )
    return [(number[id(basis)], index) for basis, indices in latents.parts for index in indices]
