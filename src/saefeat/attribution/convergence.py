"""Convergence: whether the mean gradients of an attribution have settled.

The rule: an integral is believed where its own nodes agree on it, or where its true value is known
and met. What nodes disagree by is what the scores of a site, summed at each token, lose without
half of the nodes (for adaptive nodes, with the worse of two rules). The true value is known where
one site moves alone on its path and the path's end was run: there the slopes must add up to the
metric's change. Both are held against that change, prompt by prompt and site by site, and the worst
site decides, since ``top`` ranks latents of all sites together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import final

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import ConvergenceWarning
from .methods import Method

TOLERANCE = 0.1
"""The share of the metric's change that nodes given in advance may disagree by."""

FEW = 4
"""So few nodes, with half of them left out, leave one or two: nothing to tell a curve from."""

DWARFS = 10.0
"""An error of so many times the metric's change leaves nothing of the scores: it is warned of."""


@checked
@final
@dataclass(frozen=True, eq=False, repr=False)
class Convergence:
    """Whether the integrated gradients of an ``Attribution`` converged.

    Attributes:
        nodes: [prompts] long, at how many nodes of its path the gradients were taken.
        moved: [prompts, dictionaries] float32, what errors are held against: the size of the
            metric's change on the path of the dictionary's site, or a tenth of how far the metric
            went on the way, should the two ends be alike.
        disagreement: [prompts, dictionaries] float32, in units of the metric: what the site's
            scores lose without half of the nodes, in size, summed over scored tokens. NaN for one
            node.
        gap: [prompts, dictionaries] float32: the integral over the site's whole way − the metric's
            change on it, which are equal for exact integration. NaN where the end of the path was
            not run: several sites on one path, or a baseline with a run of its own.
        tolerance: the share of ``moved`` that an error may have.

    Examples:
        >>> one = torch.ones(1, 1)
        >>> sf.attribution.Convergence(torch.tensor([32]), one, one / 50, 0 * one, 0.1)
        Convergence(converged: with 32 nodes the error is about 2.0% of the metric's change)
    """

    nodes: Tensor
    moved: Tensor
    disagreement: Tensor
    gap: Tensor
    tolerance: float

    @property
    def error(self) -> Tensor:
        """[prompts, dictionaries]: the larger of disagreement and gap; of few nodes the gap alone,
        where it is known.
        """
        gap = self.gap.abs()
        return torch.where(self._few[:, None] & ~gap.isnan(), gap, gap.fmax(self.disagreement))

    @property
    def shares(self) -> Tensor:
        """[prompts]: the error as a share of the metric's change, at each prompt's worst site."""
        if not self.error.shape[1]:
            return self.error.new_zeros(len(self.error))
        return _ratio(self.error, self.moved).amax(1)

    @property
    def share(self) -> float:
        """The same over all prompts: their errors by their changes, at the worst site."""
        return float(_ratio(self.error.sum(0), self.moved.sum(0)).amax())

    @property
    def worst(self) -> int:
        """Which dictionary's site has the largest share."""
        return int(_ratio(self.error.sum(0), self.moved.sum(0)).argmax())

    @property
    def unsettled(self) -> Tensor:
        """[n] long: the prompts whose error is larger than the tolerance, or not known."""
        return (~(self.shares <= self.tolerance) | self._unsure).nonzero()[:, 0]

    @property
    def verdict(self) -> str:
        """``"converged"``, ``"not converged"``, or ``"unknown: 2 nodes, too few to say"``."""
        unsure = bool(self._unsure.any()) or math.isnan(self.share)
        if unsure and not self.share > DWARFS:
            return f"unknown: {self._count}, too few to say"
        return "converged" if self.share <= self.tolerance else "not converged"

    def line(self, sites: Sequence[str] = ()) -> str:
        """The verdict and its figures on one line; ``sites`` are the dictionaries' names."""
        if self.verdict.startswith("unknown"):
            return self.verdict
        said = f"{self.verdict}: with {self._count} the error is about {_times(self.share)} the"
        said += " metric's change"
        if self.verdict == "converged":
            return said
        where = f" at {sites[self.worst]}" if sites else ""
        missed = f"{len(self.unsettled)} of {len(self.nodes)} prompts miss it"
        return f"{said}{where} (at most {_times(self.tolerance)} it wanted; {missed})"

    def __repr__(self) -> str:
        return f"Convergence({self.line()})"

    @property
    def _few(self) -> Tensor:
        return self.nodes <= FEW

    @property
    def _unsure(self) -> Tensor:
        """[prompts] bool: few nodes, and no true value to hold them against."""
        return self._few & self.gap.isnan().any(1)

    @property
    def _count(self) -> str:
        least, most = int(self.nodes.min()), int(self.nodes.max())
        if least == most:
            return "1 node" if most == 1 else f"{most} nodes"
        return f"{least} to {most} nodes"

    def tensors(self) -> dict[str, Tensor]:
        """The columns by name, for files."""
        return {f"{PREFIX}{name}": getattr(self, name) for name in _COLUMNS}


def of_one_node(prompts: int, dictionaries: int) -> Convergence:
    """What is known of a single gradient: nothing."""
    nothing = torch.full((prompts, dictionaries), torch.nan)
    one = torch.ones(prompts, dtype=torch.long)
    return Convergence(one, nothing, nothing, nothing, TOLERANCE)


PREFIX = "convergence."
_COLUMNS = tuple(field.name for field in fields(Convergence) if field.name != "tolerance")


def held_against(change: Tensor, reach: Tensor) -> Tensor:
    """What errors are held against, from the metric's change and how far it went on the way."""
    return torch.maximum(change.abs(), reach / 10)


def taken(tensors: dict[str, Tensor], tolerance: float | None) -> Convergence | None:
    """From ``Convergence.tensors``, which are taken out; None if there are none of them.

    Raises:
        KeyError: if some are there and one is not.
    """
    if not any(name.startswith(PREFIX) for name in tensors):
        return None
    columns = [tensors.pop(f"{PREFIX}{name}") for name in _COLUMNS]
    return Convergence(*columns, tolerance=TOLERANCE if tolerance is None else tolerance)


def joined(pieces: Sequence[Convergence | None]) -> Convergence | None:
    """Those of batches as one; None if one has none."""
    known = [piece for piece in pieces if piece is not None]
    if not known or len(known) < len(pieces):
        return None
    columns = [torch.cat([getattr(piece, name) for piece in known]) for name in _COLUMNS]
    return Convergence(*columns, tolerance=known[0].tolerance)


def warn_of(found: Convergence | None, sites: Sequence[str], method: Method) -> None:
    """Warn of an error that dwarfs the metric's change, or is above a tolerance asked for."""
    asked = getattr(method, "tolerance", None) is not None
    if found is None or not (found.share > DWARFS or (asked and found.verdict != "converged")):
        return
    warnings.warn(
        f"Attribute: the integrated gradients are {found.line(sites)}. Likely cause: a baseline far"
        " from anything the model computes, such as all latents at zero: the norms behind an"
        " emptied site turn what little is left. Try: baseline=Paired(other_prompts) or"
        " Fixed(latents, means), which stay on the model's own ground; AtP(); or more nodes where"
        " the slope varies, IG(256, 'gauss', tolerance=0.1)",
        ConvergenceWarning,
        stacklevel=4,  # past the check of arguments, to the caller's line
    )


def _ratio(error: Tensor, moved: Tensor) -> Tensor:
    """Errors by what they are held against; where nothing moved and nothing is off, zero."""
    return torch.where(error == 0, 0.0, error / moved)


def _times(share: float) -> str:
    return f"{share:.1%} of" if share < 1 else f"{share:.3g} times"
