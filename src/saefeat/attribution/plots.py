"""Plots of a result: which latents, which tokens, how many. They need the ``plots`` extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import SaefeatError
from .show import heat

if TYPE_CHECKING:
    from .scores import Attribution


def axes(given: Any, where: str, size: tuple[float, float]) -> Any:
    """The axes to draw on; a figure of its own, outside pyplot's list of figures, by default."""
    if given is not None:
        return given
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SaefeatError(
            f"{where}: `matplotlib` is not installed, wanted matplotlib 3.9 or later. Likely cause:"
            " it is an extra. Try: pip install 'saefeat[plots]'"
        ) from error
    return Figure(figsize=size, layout="constrained").add_subplot()


def some(found: Attribution, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The totals of a result that has any.

    Raises:
        SaefeatError: for one without a score.
    """
    if len(found):
        return found.totals()[:2]
    raise SaefeatError(
        f"{where}: `scores` is empty, wanted at least one score. Likely cause: no latent moved"
        " between the clean and the baseline run. Try: another baseline, or where="
    )


def latents(found: Attribution, k: int, ax: Any) -> Any:
    """The k latents with the largest mean scores, site by latent, as a heat map."""
    keys, values = some(found, "Attribution.plot_latents")
    order = values.abs().argsort(descending=True, stable=True)[:k]
    sites = list(dict.fromkeys(d.site for d in found.dictionaries))
    grid = torch.full((len(sites), len(order)), torch.nan)
    for column, row in enumerate(order.tolist()):
        site = found.dictionaries[int(keys[row, 0])].site
        grid[sites.index(site), column] = values[row]
    ax = axes(ax, "Attribution.plot_latents", (max(4.0, 0.35 * len(order)), 1 + 0.4 * len(sites)))
    _image(ax, grid, "mean score" if found.signed else "mean size of score")
    ax.set_xticks(range(len(order)), [str(int(keys[i, 1])) for i in order], rotation=90)
    ax.set_yticks(range(len(sites)), [str(site) for site in sites])
    ax.set_xlabel("latent")
    return ax


def tokens(found: Attribution, prompt: int, ax: Any) -> Any:
    """One prompt's tokens by their summed scores; tokens that were not scored have none."""
    words, sums, scored = heat(found)
    if not 0 <= prompt < len(words):
        raise SaefeatError(
            f"Attribution.plot_tokens: `prompt` is {prompt!r}, wanted a number in"
            f" 0..{len(words) - 1}. Likely cause: another data set's prompt. Try:"
            " scores.plot_tokens(0)"
        )
    values = torch.where(scored[prompt], sums[prompt], torch.nan)
    ax = axes(ax, "Attribution.plot_tokens", (max(4.0, 0.4 * len(values)), 1.8))
    _image(ax, values[None], "score")
    ax.set_xticks(range(len(values)), [_plain(w) for w in words[prompt]], rotation=90)
    ax.set_yticks([])
    return ax


def cumulative(found: Attribution, ax: Any) -> Any:
    """How much of all scores' size the n largest latents hold, n from 0."""
    _, values = some(found, "Attribution.plot_cumulative")
    sizes = values.abs().sort(descending=True).values.double()
    share = torch.cat([torch.zeros(1).double(), sizes.cumsum(0)]) / sizes.sum().clamp(min=1e-30)
    ax = axes(ax, "Attribution.plot_cumulative", (4.5, 3.0))
    ax.plot(range(len(share)), share.numpy())
    ax.set_xlabel("latents, largest first")
    ax.set_ylabel("share of Σ |mean score|")
    ax.set_ylim(0, 1.02)
    return ax


def _image(ax: Any, grid: torch.Tensor, label: str) -> None:
    """A heat map whose white is zero."""
    finite = grid[grid.isfinite()].abs()
    most = float(finite.max()) if len(finite) and bool(finite.max() > 0) else 1.0
    image = ax.imshow(grid.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label=label)


def _plain(word: str) -> str:
    """A token as a label; matplotlib takes what stands between dollar signs for mathematics."""
    return word.replace("$", r"\$").replace("\n", "⏎")
