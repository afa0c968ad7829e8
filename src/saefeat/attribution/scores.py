"""Attribution: the sparse result of ``Attribute``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from ..arguments import checked
from ..checks import whole
from ..dictionaries.by_site import Dictionaries
from ..dictionaries.latents import Dictionary, Latents
from ..files.container import MAX_BYTES
from ..results.result import Result, kept
from ..text.tokens import Tokens
from . import file, plots, show
from .columns import Columns, members, ranked

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


@checked(own=("k",))
@dataclass(frozen=True, repr=False)
class Attribution(Columns, Result):
    """Scores by (prompt, site, position, latent), for latents that moved; all else is zero.

    A score estimates the change of the metric when the latent alone goes from its clean to its
    baseline value: (f_base − f) · mean gradient · direction. So with the zero baseline, removing a
    latent that supports the metric scores below zero.

    Attributes:
        dictionaries: what ``dictionary`` indexes.
        prompt: [n] long, which prompt.
        dictionary: [n] long, index into ``dictionaries``.
        position: [n] long, absolute position among the prompt's real tokens; −1 where one score
            stands for all scored tokens together (``Exact(per="latent")``). Such scores have
            totals by latent and site, and none by position or token.
        latent: [n] long.
        score: [n] float32.
        activation: [n] float32, the clean activation.
        change: [n] float32, baseline minus clean activation.
        clean: [prompts] float32, the metric in the clean run.
        baseline: [prompts] float32, the metric in the baseline run; NaN if none was made.
        tokens: [prompts] long, how many tokens of each prompt were scored, for one of the
            dictionaries at least; what means over tokens divide by.
        ends: [prompts, dictionaries] float32, the metric with that dictionary's site alone at the
            baseline; only with ``one_site=True``.
        dropped: [prompts, 2] float32, the sum and the sum of sizes of scores that ``keep=`` left
            out; only with ``keep``.
        scored: [all real tokens] bool, which of them were scored, prompt after prompt.
        texts: the prompts' tokens, for masks, tables and pages; None for a result made by hand.
        metric: the metric, as it prints.
        signed: False where scores are sizes without a sign (``GradDrop``). ``top`` then finds the
            largest, whichever way they act, and there is no gap.
        provenance: model, dictionaries, method and all settings; None for a result made by hand,
            or read from a file of version 1.
        convergence: whether the integrated gradients converged; None for other methods.

    Examples:
        >>> v = sf.Direction(torch.ones(2), site="resid_post.0")
        >>> one, zero = torch.ones(1), torch.zeros(1, dtype=torch.long)
        >>> at = (zero, zero, zero, zero)  # prompt, dictionary, position, latent
        >>> sf.attribution.Attribution((v,), *at, 2 * one, one, -one, one, one, zero + 4).top(1)
        Latents(1: resid_post.0 [0])
    """

    @overload
    def top(
        self,
        k: int,
        *,
        per: Literal["dataset"] = "dataset",
        within: Latents | None = None,
        where: Tokens | None = None,
        exactly: bool = False,
    ) -> Latents: ...

    @overload
    def top(
        self,
        k: int,
        *,
        per: Literal["prompt"],
        within: Latents | None = None,
        where: Tokens | None = None,
        exactly: bool = False,
    ) -> tuple[Latents, ...]: ...

    def top(
        self,
        k: int,
        *,
        per: str = "dataset",
        within: Latents | None = None,
        where: Tokens | None = None,
        exactly: bool = False,
    ) -> Latents | tuple[Latents, ...]:
        """The k latents with the highest mean score.

        Args:
            k: how many; fewer come back if fewer have a positive score.
            per: ``"dataset"``, or ``"prompt"`` for the best of each prompt on its own.
            within: only these latents compete.
            where: only scored tokens that this rule selects, as in ``totals``.
            exactly: k latents of those that moved, whatever their scores: for a budget that is to
                be the same for every method.

        Returns:
            Latents, best first within each dictionary; for ``"prompt"`` a tuple, one a prompt.

        Raises:
            LatentError: for k below 1 or not whole, ``within`` of other dictionaries, or fewer than
                k latents to have ``exactly``.
            SaefeatError: as in ``totals``.
        """
        keys, values, prompts = self.totals(per=per, where=where)
        if per == "dataset":
            return self._best(keys, values, k, within, exactly)
        return tuple(
            self._best(keys[prompts == p], values[prompts == p], k, within, exactly)
            for p in range(len(self.tokens))
        )

    def save(self, path: str | Path | None = None) -> Any:
        """Write the result to one safetensors file, with fingerprints in place of dictionaries.

        Args:
            path: the file. Without one, inside a trace, the result is kept as ``nnsight.save``
                keeps it.

        Returns:
            The path; without one the result.

        Raises:
            FileError: for a folder that is not there, or no path and no trace.
        """
        if path is None:
            return kept(self, 'scores.save("scores.safetensors")')
        return file.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        saes: Dictionaries | Iterable[Dictionary] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> Attribution:
        """Read a result that ``save`` wrote.

        Args:
            path: the file.
            saes: the dictionaries it was made with, found by site and fingerprint, so that
                ``top`` gives latents one can edit. Without them it gives stand-ins that have
                names and widths and nothing else: good for tables, refused by every edit.
            max_bytes: refuse to read a file larger than this.

        Raises:
            FileError: for a file that is missing, broken, of another kind or from a later
                version, and for a dictionary that is not among ``saes``.
        """
        return file.load(cls, path, saes, max_bytes)

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame, one row a score: prompt, position, token, site, dictionary, latent, score,
        activation, change, slope. A score of a whole prompt has position −1 and no token.

        Raises:
            SaefeatError: without pandas.
        """
        return show.table(self)

    def to_html(self, *, prompts: int = show.PROMPTS) -> str:
        """A self-contained page: the best latents, and prompts with their tokens shaded by score.

        Args:
            prompts: how many prompts to show.
        """
        whole("Attribution.to_html", "prompts", prompts, 0)
        return show.page(self, prompts)

    def _repr_html_(self) -> str:
        return self.to_html()

    def plot_latents(self, k: int = 20, *, ax: Axes | None = None) -> Axes:
        """The k latents with the largest mean scores as a heat map, sites by latents.

        Args:
            k: how many.
            ax: matplotlib axes to draw on; a new figure's by default.

        Returns:
            The axes; ``.figure.savefig(...)`` writes them.
        """
        return plots.latents(self, k, ax)

    def plot_tokens(self, prompt: int = 0, *, ax: Axes | None = None) -> Axes:
        """One prompt's tokens by their scores, summed over sites and latents.

        Args:
            prompt: which.
            ax: as in ``plot_latents``.

        Returns:
            The axes.
        """
        return plots.tokens(self, prompt, ax)

    def plot_cumulative(self, *, ax: Axes | None = None) -> Axes:
        """The share of all mean scores' size that the n largest latents hold.

        Args:
            ax: as in ``plot_latents``.

        Returns:
            The axes.
        """
        return plots.cumulative(self, ax)

    def scores_of(self, latents: Latents) -> Tensor:
        """[k]: the mean score over the data set of each latent, zero where it never moved."""
        keys, values, _ = self.totals()
        table = {(int(d), int(i)): float(v) for (d, i), v in zip(keys, values, strict=True)}
        pairs = members(self.dictionaries, latents)
        return values.new_tensor([table.get(pair, 0.0) for pair in pairs])

    def ranking(
        self, k: int, *, within: Latents | None = None
    ) -> tuple[tuple[Latents, float], ...]:
        """The k best latents of the data set one by one, each with its mean score, best first."""
        keys, values, _ = self.totals()
        return tuple(
            (Latents(((self.dictionaries[d], (i,)),)), score)
            for d, i, score in ranked(self, keys, values, k, within)
        )

    def _best(
        self, keys: Tensor, values: Tensor, k: int, within: Latents | None, exactly: bool
    ) -> Latents:
        chosen: dict[Dictionary, list[int]] = {}
        for number, index, _ in ranked(self, keys, values, k, within, exactly):
            chosen.setdefault(self.dictionaries[number], []).append(index)
        ordered = sorted(chosen.items(), key=lambda item: item[0].site.order)
        return Latents(tuple((basis, tuple(indices)) for basis, indices in ordered))

    def __repr__(self) -> str:
        return "\n  ".join(show.lines(self))
