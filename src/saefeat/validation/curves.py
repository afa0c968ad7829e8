"""Faithfulness: the curves, with intervals over prompts and controls beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dictionaries.latents import Dictionary, Latents
from ..errors import SaefeatError
from ..results.plot import new_figure
from ..results.table import frame
from .ranking import selection
from .stats import Estimate, quantiles, resample

MEASURES = ("faithfulness", "completeness", "minimality")
SAMPLES = 1000

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness:
    """Faithfulness, completeness and minimality of the first k latents, for growing k.

    With m(S) the mean metric over prompts when only S is kept and all other latents are ablated
    (the error term is always kept), ∅ the empty set and M all latents, so that m(M) is clean:

    * faithfulness(S) = (m(S) − m(∅)) / (m(M) − m(∅))
    * completeness(S) = (m(M∖S) − m(∅)) / (m(M) − m(∅)), the faithfulness of what is left: low if
      nothing outside S can do the work (both as in Marks et al. 2024, section 4)
    * minimality(S) = min over v ∈ S of |m(S) − m(S∖v)| / |m(M) − m(∅)|: what the most dispensable
      member adds. Wang et al. 2022 allow more of S to be removed with v; this is the bound from
      removing v alone.

    Attributes:
        dictionaries: what the keys index.
        sizes: [n], ascending.
        sets: ``"top"``, ``"random"``, ``"matched"`` → keys [draws, largest size, 2]; the set of
            size k is the first k.
        clean: [prompts], m(M).
        empty: [prompts], m(∅).
        kept: for each of ``sets``, [n, draws, prompts], m(S).
        removed: for each of ``sets``, [n, draws, prompts], m(M∖S).
        marginals: for each size k, [k, prompts], m(S∖v) for the members v of the top set, in the
            order of ``latents(k)``.
        mass: for each of ``sets``, [draws, largest size], how much each member writes on these
            prompts, Σ |activation| · ‖direction‖.

    Examples:
        >>> v, one = sf.Neurons("resid_post.0", 4), torch.ones(1, 1, 2)
        >>> sets = {"top": torch.zeros(1, 1, 2).long()}
        >>> found = sf.validation.Faithfulness(
        ...     (v,), (1,), sets, 4 * torch.ones(2), torch.zeros(2),
        ...     {"top": 3 * one}, {"top": one}, (torch.zeros(1, 2),)
        ... )
        >>> found.curve("faithfulness")[0].value, found.curve("completeness")[0].value
        (0.75, 0.25)
    """

    dictionaries: tuple[Dictionary, ...]
    sizes: tuple[int, ...]
    sets: dict[str, Tensor]
    clean: Tensor
    empty: Tensor
    kept: dict[str, Tensor]
    removed: dict[str, Tensor]
    marginals: tuple[Tensor, ...]
    mass: dict[str, Tensor] = field(default_factory=dict)

    def latents(self, size: int) -> Latents:
        """The top set of this size, one of ``sizes`` or any below the largest.

        Raises:
            SaefeatError: for a size that was not reached.
        """
        if type(size) is not int or not 0 < size <= self.sizes[-1]:
            raise SaefeatError(
                f"Faithfulness.latents: `size` is {size!r}, wanted an integer in"
                f" 1..{self.sizes[-1]}, the largest size. Likely cause: a set larger than any that"
                f" was run. Try: faithfulness(..., sizes=(..., {size!r}))"
            )
        return selection(self.dictionaries, self.sets["top"][0, :size])

    def balance(self, of: str) -> tuple[float, ...]:
        """[n]: how much a control writes for each size, as a share of what the top writes.

        A matched control far below 1 is no match: no other latents write as much.

        Args:
            of: ``"random"`` or ``"matched"`` (means over draws).
        """
        self._require("mass", of, tuple(self.mass))
        return tuple(
            float(self.mass[of][:, :k].sum(1).mean() / self.mass["top"][:, :k].sum())
            for k in self.sizes
        )

    def curve(self, measure: str, of: str = "top", *, seed: int = 0) -> tuple[Estimate, ...]:
        """[n] values, each with the ends of its 95 % percentile bootstrap interval over prompts.

        Args:
            measure: ``"faithfulness"``, ``"completeness"`` or ``"minimality"``.
            of: ``"top"``, ``"random"`` or ``"matched"`` (means over draws). Minimality is known of
                the top alone.
            seed: of the bootstrap. With one prompt the ends are NaN.
        """
        known = ("top",) if measure == "minimality" else tuple(self.sets)
        self._require(measure, of, known)
        prompts = len(self.clean)
        weights = resample(prompts, SAMPLES, seed)
        every = torch.full((1, prompts), 1 / prompts, dtype=torch.float64)
        points = []
        for n in range(len(self.sizes)):
            value = float(self._value(measure, of, n, every))
            low, high = quantiles(self._value(measure, of, n, weights))
            ends = (float(low), float(high)) if prompts > 1 else (math.nan, math.nan)
            points.append(Estimate(value, *ends))
        return tuple(points)

    def _require(self, measure: str, of: str, known: tuple[str, ...]) -> None:
        if measure in (*MEASURES, "mass") and of in known:
            return
        function = "Faithfulness.balance" if measure == "mass" else "Faithfulness.curve"
        raise SaefeatError(
            f"{function}: `measure and of` is {measure!r} of {of!r}, wanted one of"
            f" {', '.join(MEASURES)}, of {' or '.join(known)}. Likely cause: a typing error, or"
            ' controls that were not run. Try: curve("completeness", "matched")'
        )

    def _value(self, measure: str, of: str, n: int, weights: Tensor) -> Tensor:
        """[samples]: one measure of one size, for weights [samples, prompts] of the prompts."""
        empty = weights @ self.empty.double()
        whole = weights @ self.clean.double() - empty
        if measure == "minimality":
            steps = self.kept["top"][n] - self.marginals[n]  # [k, prompts]
            return (weights @ steps.double().T).abs().amin(1) / whole.abs()
        table = self.kept if measure == "faithfulness" else self.removed
        return (weights @ table[of][n].double().mean(0) - empty) / whole

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame in long form, one row a point of a curve (needs the pandas extra)."""
        rows = [
            {"size": size, "measure": measure, "of": of, **point._asdict()}
            for measure, of in self._curves()
            for size, point in zip(self.sizes, self.curve(measure, of), strict=True)
        ]
        return frame(rows, "Faithfulness.to_pandas")

    def plot(self) -> Figure:
        """A matplotlib figure, one panel a measure (needs the plots extra)."""
        figure = new_figure("Faithfulness.plot", (10, 3.2))
        panels: dict[str, Any] = dict(zip(MEASURES, figure.subplots(1, 3), strict=True))
        styles = {"top": "-o", "matched": "--s", "random": ":^"}
        for measure, of in self._curves():
            points = self.curve(measure, of)
            axes = panels[measure]
            (line,) = axes.plot(self.sizes, [p.value for p in points], styles[of], label=of)
            ends = [[p.low for p in points], [p.high for p in points]]
            axes.fill_between(self.sizes, *ends, color=line.get_color(), alpha=0.15)
        for measure, axes in panels.items():
            axes.set_xscale("log", base=2)
            axes.set(title=measure, xlabel="latents in the set")
            axes.axhline(0, color="#999999", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        panels["faithfulness"].legend(frameon=False)
        return figure

    def _curves(self) -> list[tuple[str, str]]:
        both = [(measure, of) for measure in MEASURES[:2] for of in self.sets]
        return [*both, ("minimality", "top")]

    def __repr__(self) -> str:
        names = [f"{m[:5]}. {of}" for m, of in self._curves()]
        lines = [
            f"Faithfulness: the metric is {self.clean.mean():.3f} clean and "
            f"{self.empty.mean():.3f} with all latents ablated, over {len(self.clean)} prompts",
            "   size" + "".join(f"{name:>15}" for name in names),
        ]
        curves = [self.curve(measure, of) for measure, of in self._curves()]
        for size, *points in zip(self.sizes, *curves, strict=True):
            lines.append(f"{size:7}" + "".join(f"{point.value:15.2f}" for point in points))
        shares = [f"{of} {self.balance(of)[-1]:.2f}" for of in self.mass if of != "top"]
        if shares:
            lines.append(
                f"  at size {self.sizes[-1]} the controls write, as a share of what the top "
                f"writes: {', '.join(shares)}"
            )
        return "\n".join(lines)
