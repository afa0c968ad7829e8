"""Plots of a result: which latents, which tokens, how many. They need the ``plots`` extra."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import SaefeatError
from ..results.formats import new_figure
from ..results.outliers import robust_top
from .columns import Columns, by_token

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _axes(given: Axes | None, function: str, size: tuple[float, float]) -> Axes:
    """The axes to draw on; a new figure's by default."""
    if given is not None:
        return given
    return new_figure(function, size).add_subplot()


def _means(columns: Columns, function: str) -> tuple[Tensor, Tensor]:
    """Keys [m, 2] and mean scores [m]."""
    if len(columns):
        return columns.totals()[:2]
    raise SaefeatError(
        f"{function}: `scores` is empty, wanted at least one score. Likely cause: no latent moved"
        " between the clean and the baseline run. Try: another baseline, or where="
    )


def latents(columns: Columns, k: int, ax: Axes | None) -> Axes:
    """The k latents with the largest mean scores, site by latent, as a heat map."""
    keys, values = _means(columns, "Attribution.plot_latents")
    order = values.abs().argsort(descending=True, stable=True)[:k]
    sites = list(dict.fromkeys(d.site for d in columns.dictionaries))
    grid = torch.full((len(sites), len(order)), torch.nan, dtype=torch.float32)
    for column, row in enumerate(order.tolist()):
        site = columns.dictionaries[int(keys[row, 0])].site
        grid[sites.index(site), column] = values[row]
    ax = _axes(ax, "Attribution.plot_latents", (max(4.0, 0.35 * len(order)), 1 + 0.4 * len(sites)))
    _image(ax, grid, "mean score" if columns.signed else "mean size of score")
    ax.set_xticks(range(len(order)), [str(int(keys[i, 1])) for i in order], rotation=90)
    ax.set_yticks(range(len(sites)), [str(site) for site in sites])
    ax.set_xlabel("latent")
    return ax


def tokens(columns: Columns, prompt: int, ax: Axes | None) -> Axes:
    """One prompt's tokens by their summed scores; tokens that were not scored have none."""
    texts, sums, scored = by_token(columns, "Attribution.plot_tokens")
    if not 0 <= prompt < len(sums):
        raise SaefeatError(
            f"Attribution.plot_tokens: `prompt` is {prompt!r}, wanted a number in"
            f" 0..{len(sums) - 1}. Likely cause: another data set's prompt. Try:"
            " scores.plot_tokens(0)"
        )
    values = torch.where(scored[prompt], sums[prompt], torch.nan)
    ax = _axes(ax, "Attribution.plot_tokens", (max(4.0, 0.4 * len(values)), 1.8))
    _image(ax, values[None], "score")
    ax.set_xticks(range(len(values)), [_plain(w) for w in texts.tokens(prompt)], rotation=90)
    ax.set_yticks([])
    return ax


def cumulative(columns: Columns, ax: Axes | None) -> Axes:
    """How much of all scores' size the n largest latents hold, n from 0."""
    _, values = _means(columns, "Attribution.plot_cumulative")
    sizes = values.abs().sort(descending=True).values.double()
    share = torch.cat([torch.zeros(1, dtype=torch.float64), sizes.cumsum(0)]) / sizes.sum().clamp(
        min=1e-30
    )
    ax = _axes(ax, "Attribution.plot_cumulative", (4.5, 3.0))
    ax.plot(range(len(share)), share.numpy())
    ax.set_xlabel("latents, largest first")
    ax.set_ylabel("share of Σ |mean score|")
    ax.set_ylim(0, 1.02)
    return ax


def _image(ax: Axes, grid: Tensor, label: str) -> None:
    """A heat map whose white is zero. A cell that would wash all others out is cut and named."""
    most = robust_top(grid.abs().flatten()) or 1.0
    image = ax.imshow(grid.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    beyond = grid.abs() > most
    for row, column in beyond.nonzero().tolist():
        value = float(grid[row, column])
        ax.text(column, row, f"{value:+.2g}", ha="center", va="center", color="white", fontsize=7)
    ends = {(True, True): "both", (True, False): "max", (False, True): "min"}
    cut = (bool((beyond & (grid > 0)).any()), bool((beyond & (grid < 0)).any()))
    ax.figure.colorbar(image, ax=ax, label=label, extend=ends.get(cut, "neither"))


def _plain(word: str) -> str:
    """A token as a label; matplotlib takes what stands between dollar signs for mathematics."""
    return word.replace("$", r"\$").replace("\n", "⏎")
