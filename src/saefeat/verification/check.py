"""The verdict on one dictionary, and the table of all of them.

A comparison with neighbors alone believes too much: at every site of a wrong model an SAE does
about equally badly. So the verdict is absolute as well: against the mean of the values, against
tokens mixed at random, and against what the files declare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..arguments import checked
from ..model.sites import Site
from ..results.provenance import Sourced

ENOUGH = 64
"""Tokens from which the null and the neighbors tell; below, chance decides too much."""
LEAST = 8
"""Tokens below which not even the mean is known."""
VERDICTS = ("ok", "doubtful", "WRONG")


class Finding(NamedTuple):
    """Something that speaks against a dictionary.

    Attributes:
        verdict: ``doubtful`` or ``WRONG``.
        reason: why, in one line.

    Examples:
        >>> sf.verification.Finding("doubtful", "21 tokens are too few to say, wanted 64").verdict
        'doubtful'
    """

    verdict: str
    reason: str


@checked
@dataclass(frozen=True)
class Check:
    """How well one dictionary explains its site, and what speaks against it.

    Numbers are of tokens that are no outliers (``results.outliers``), unless it says otherwise.

    Attributes:
        name: the dictionary.
        site: where it declares to read.
        fvu: fraction of variance unexplained there; 0 is perfect, 1 is no better than the mean.
        l0: mean active latents a token there.
        best: the candidate site with the lowest fvu.
        best_fvu: the fvu there.
        tokens: how many tokens these numbers are of.
        mixed_fvu: fvu of the same tokens mixed at random; None where there were too few.
        mixed_l0: likewise, active latents.
        outliers: how many tokens were set apart.
        outlier_share: the share of the variance that these hold.
        whole_fvu: fvu of all tokens, outliers too.
        declared: the L0 its files or release declare, where they do.
        missed: what of the declared L0 and variance explained is missed by much.
        notes: in what else the declarations differ from the model and the prompts.

    Examples:
        >>> site = sf.Site("resid_post", 1)
        >>> sf.verification.Check("sae", site, 0.1, 12.0, site, 0.1, 300, 0.4, 30.0).verdict
        'ok'
        >>> sf.verification.Check("sae", site, 0.4, 30.0, site, 0.4, 300, 0.4, 30.0).verdict
        'WRONG'
    """

    name: str
    site: Site
    fvu: float
    l0: float
    best: Site
    best_fvu: float
    tokens: int
    mixed_fvu: float | None = None
    mixed_l0: float | None = None
    outliers: int = 0
    outlier_share: float = 0.0
    whole_fvu: float | None = None
    declared: float | None = None
    missed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def elsewhere(self) -> bool:
        """Another candidate site is explained much better than its own."""
        much = self.best != self.site and self.fvu >= 1.5 * self.best_fvu + 0.01
        return much and self.tokens >= LEAST

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All that speaks against it, the worst first."""
        found = (*_count(self), *_mean(self), *_neighbor(self), *_null(self))
        found += tuple(Finding("doubtful", text) for text in self.missed)
        return tuple(sorted(found, key=lambda one: -VERDICTS.index(one.verdict)))

    @property
    def verdict(self) -> str:
        """``ok``, ``doubtful`` or ``WRONG``: the worst that was found."""
        return next((one.verdict for one in self.findings), "ok")

    @property
    def right(self) -> bool:
        """Nothing speaks against it."""
        return self.verdict == "ok"


def _count(check: Check) -> list[Finding]:
    if check.tokens >= ENOUGH:
        return []
    return [Finding("doubtful", f"{check.tokens} tokens are too few to say, wanted {ENOUGH}")]


def _mean(check: Check) -> list[Finding]:
    """A dictionary that explains nothing."""
    if check.fvu < 1 or check.tokens < LEAST:
        return []
    return [Finding("WRONG", f"leaves {check.fvu:.0%} unexplained, where their mean leaves 100%")]


def _neighbor(check: Check) -> list[Finding]:
    """Another site is explained much better, or a little: neighbors of a right one do worse."""
    if check.best == check.site or check.fvu <= 1.1 * check.best_fvu + 0.01:
        return []
    fits = f"leaves {check.fvu:.0%} unexplained, and {check.best_fvu:.0%} at {check.best}"
    return [Finding("WRONG" if check.elsewhere else "doubtful", fits)]


def _null(check: Check) -> list[Finding]:
    """Mixed tokens are explained as well, by as many latents: see ``null``."""
    if check.mixed_fvu is None or check.mixed_l0 is None or check.tokens < ENOUGH:
        return []
    ratio = (check.fvu + EXACT) / (min(check.mixed_fvu, 1.0) + EXACT)
    # Fewer latents count for a dictionary, to a limit: one that explains nothing may need few.
    ratio *= min(1.0, max(0.7, check.l0 / max(check.mixed_l0, 1e-12)))
    declared = check.declared or check.l0
    missed = not declared / 2 <= check.l0 <= declared * 2
    if ratio < (MISSED if missed else DOUBTFUL):
        return []
    reason = (
        f"does little better than on tokens mixed at random: FVU {check.fvu:.2f} for"
        f" {check.mixed_fvu:.2f}, L0 {check.l0:.1f} for {check.mixed_l0:.1f}"
    )
    return [Finding("WRONG" if ratio >= WRONG or missed else "doubtful", reason)]


WRONG, DOUBTFUL, MISSED = 0.6, 0.45, 0.4
"""Of the null's unexplained variance times its latents; ``MISSED`` is WRONG for a dictionary that
misses its declared L0 too. Random dictionaries are at .95 to 1.01. SAEs of a model tuned further
are at .48 to .98 and miss their L0. In a model of 30 layers SAEs that were trained briefly, to 16
and to 8 active latents, are at .37 to .44 at their own layer and at .63 to .90 four to six off."""
EXACT = 1e-4
"""FVU that is as good as none: what explains even mixed tokens so well tells nothing apart."""


@checked
@dataclass(frozen=True, repr=False)
class Verification(Sourced):
    """The table ``verify`` makes; prints as plain text.

    Attributes:
        checks: one a dictionary.
        tokens: how many tokens were measured, outliers too.

    Examples:
        >>> sf.verification.Verification((), tokens=0).right
        True
    """

    checks: tuple[Check, ...]
    tokens: int

    @property
    def verdict(self) -> str:
        """The worst of its checks'."""
        return max((check.verdict for check in self.checks), key=VERDICTS.index, default="ok")

    @property
    def right(self) -> bool:
        """Nothing speaks against any dictionary. ``strict`` raises for less: one that is WRONG."""
        return self.verdict == "ok"

    def __repr__(self) -> str:
        rows = [HEAD, *map(_row, self.checks)]
        widths = [max(len(row[n]) for row in rows) for n in range(len(HEAD))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        below = [line for check in self.checks for line in _below(check)]
        head = f"verified on {self.tokens} tokens"
        return "\n".join([head, *(line.rstrip() for line in lines), *below]) + self.origin


HEAD = ("dictionary", "site", "FVU", "if mixed", "L0", "if mixed", "declared", "best site")
HEAD += ("its FVU", "")
"""The columns; ``if mixed`` is the same of tokens mixed at random."""


def _row(check: Check) -> tuple[str, ...]:
    return (
        check.name,
        str(check.site),
        f"{check.fvu:.3f}",
        "-" if check.mixed_fvu is None else f"{check.mixed_fvu:.3f}",
        f"{check.l0:.1f}",
        "-" if check.mixed_l0 is None else f"{check.mixed_l0:.1f}",
        "-" if check.declared is None else f"{check.declared:g}",
        str(check.best),
        f"{check.best_fvu:.3f}",
        check.verdict,
    )


def _below(check: Check) -> list[str]:
    """What is said of one dictionary below the table: reasons, outliers, notes."""
    lines = [f"{one.verdict}: {check.name}: {one.reason}" for one in check.findings]
    if check.outliers:
        every = check.tokens + check.outliers
        lines.append(
            f"outliers: {check.name}: {check.outliers} of {every} tokens hold"
            f" {check.outlier_share:.0%} of the variance and are set apart; with them FVU is"
            f" {check.whole_fvu:.3f}"
        )
    return lines + [f"note: {check.name}: {note}" for note in check.notes]
