"""An attribution as lines of text, an HTML page and a pandas table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..results.formats import frame, render
from ..results.outliers import LARGE, TOKENS, robust_top
from .columns import Columns, by_token, ranked

if TYPE_CHECKING:
    import pandas

TOP = 5
PROMPTS = 20
LONGEST = 400

_UP, _DOWN = "31,119,180", "214,96,77"
"""Blue raises the metric, red lowers it; both with transparency, so that text stays as it is."""


def lines(columns: Columns) -> list[str]:
    """What a reader needs to know before the scores: the best latents, the gap, what is blind."""
    sites = ", ".join(str(d.site) for d in columns.dictionaries[:4])
    more = ", ..." if len(columns.dictionaries) > 4 else ""
    one_run = bool(columns.baseline.isnan().all())  # made in a trace: there is nothing to go to
    end = "" if one_run else f" → {columns.baseline.mean():.3f}"
    shown = [
        f"Attribution({len(columns)} scores, {len(columns.tokens)} prompts, at {sites}{more}; "
        f"metric {columns.clean.mean():.3f}{end}{_warnings(columns)})"
    ]
    if columns.metric:
        shown.append(f"metric: {' '.join(columns.metric.split())}")  # a user's name may break
    if columns.provenance is not None:
        shown.append(f"from {columns.provenance.line}")
    best = _best(columns, TOP)
    if best:
        named = (f"{site} {latent}: {score:+.3g}" for site, latent, score in best)
        shown.append("top, mean score over tokens: " + ", ".join(named))
    if len(columns.clean) and columns.signed and not one_run:
        shown.append(_gap_line(columns))
    if columns.convergence is not None and len(columns.clean):
        sites = [str(dictionary.site) for dictionary in columns.dictionaries]
        shown.append(f"integration {columns.convergence.line(sites)}")
    return shown + _heavy(columns)


def _heavy(columns: Columns) -> list[str]:
    """A line if single tokens hold much of long prompts' scores."""
    share, at = columns.heaviest
    long = (columns.tokens >= TOKENS) & (at >= 0)
    if not bool(long.any()) or not float(share[long].mean()) > LARGE:
        return []
    first = int((at[long] == 0).sum())
    held = f"one token holds {float(share[long].mean()):.0%} of a prompt's Σ|score|, on average"
    where = f"; it is the first of its prompt in {first} of {int(long.sum())}"
    most = first > int(long.sum()) / 2
    return [held + where + (": where=~Tokens.first(1) leaves it out" if most else "")]


def _warnings(columns: Columns) -> str:
    """What a reader must know before trusting the scores."""
    degenerate = int((columns.clean == columns.baseline).sum())
    text = "" if columns.signed else "; sizes without sign"
    text += f"; {degenerate} degenerate" if degenerate else ""
    if columns.dropped is not None and bool(columns.dropped[:, 1].any()):
        every = columns.dropped[:, 1].sum() + columns.score.abs().sum()
        text += f"; {columns.dropped[:, 1].sum() / every:.1%} of the scores' size dropped"
    return text


def _gap_line(columns: Columns) -> str:
    mean_gap = columns.gap.abs().mean()
    moved = (columns.baseline - columns.clean).abs().mean()
    share = f", {mean_gap / moved:.0%} of the metric's change" if moved else ""
    sites = len({dictionary.site for dictionary in columns.dictionaries})
    if sites > 1:
        share = f", over {sites} sites, each of which carries the effect"
    return f"mean |gap| {mean_gap:.3g}{share}"


def _best(columns: Columns, k: int) -> list[tuple[str, int, float]]:
    """(site, latent, mean score) of the k best latents."""
    if not len(columns):
        return []
    keys, values, _ = columns.totals()
    best = ranked(columns, keys, values, k, None)
    return [(str(columns.dictionaries[number].site), i, score) for number, i, score in best]


def table(columns: Columns) -> pandas.DataFrame:
    """One row a score, in long format."""
    sites = [str(dictionary.site) for dictionary in columns.dictionaries]
    names = [dictionary.name for dictionary in columns.dictionaries]
    number = columns.dictionary.tolist()
    by_name = {
        "prompt": columns.prompt.numpy(),
        "position": columns.position.numpy(),
        "token": _words(columns),
        "site": [sites[n] for n in number],
        "dictionary": [names[n] for n in number],
        "latent": columns.latent.numpy(),
        "score": columns.score.numpy(),
        "activation": columns.activation.numpy(),
        "change": columns.change.numpy(),
        "slope": columns.slope.numpy(),
    }
    return frame(by_name, "Attribution.to_pandas")


def _words(columns: Columns) -> list[str | None]:
    """Each row's token as text; None where it is not known, or the score is of all tokens."""
    if columns.texts is None:
        return [None] * len(columns)
    words = [columns.texts.tokens(prompt) for prompt in range(len(columns.tokens))]
    rows = zip(columns.prompt.tolist(), columns.position.tolist(), strict=True)
    return [words[prompt][position] if position >= 0 else None for prompt, position in rows]


class Token(NamedTuple):
    """One token of a page."""

    text: str
    style: str
    title: str


class Prompt(NamedTuple):
    """One prompt of a page; ``more`` tokens are not shown."""

    number: int
    change: str
    tokens: list[Token]
    more: int


def page(columns: Columns, most: int) -> str:
    """A self-contained HTML fragment: the head, the best latents, the shaded prompts."""
    of_prompts = bool((columns.position < 0).any())
    known = columns.texts is not None and columns.scored is not None and not of_prompts
    shown = _prompts(columns, most) if known else []
    beyond = any("outline" in token.style for prompt in shown for token in prompt.tokens)
    return render(
        Path(__file__).with_name("page.jinja").read_text(encoding="utf-8"),
        lines=lines(columns),
        best=_best(columns, 10),
        of_prompts=of_prompts,
        prompts=shown,
        beyond=beyond,
        between="" if columns.texts is None else columns.texts.between,
        more=max(0, len(columns.tokens) - most),
        signed=columns.signed,
        up=_UP,
        down=_DOWN,
    )


def _prompts(columns: Columns, most: int) -> list[Prompt]:
    """Prompts token by token, shaded by their summed score on one scale."""
    texts, sums, scored = by_token(columns, "Attribution.to_html")
    marked = [torch.where(on, row.abs(), torch.nan) for row, on in zip(sums, scored, strict=True)]
    largest = robust_top(torch.cat(marked), len(sums)) if marked else 0.0
    prompts = []
    for number in range(min(most, len(sums))):
        words = texts.tokens(number)
        shown = words[:LONGEST]
        baseline = columns.baseline[number]
        change = f"{columns.clean[number]:+.3f}"
        change += "" if baseline.isnan() else f" → {baseline:+.3f}"
        rows = zip(shown, sums[number].tolist(), scored[number].tolist(), strict=False)
        tokens = [_token(*row, largest) for row in rows]
        prompts.append(Prompt(number, change, tokens, len(words) - len(shown)))
    return prompts


def _token(word: str, value: float, scored: bool, largest: float) -> Token:
    """One token; white space is shown, so that a token of nothing else can be seen."""
    text = word.replace("\n", "⏎") or "∅"
    if not scored:
        return Token(text, "opacity:0.45", "not scored")
    shade = 0.75 * min(1.0, abs(value) / largest) if largest else 0.0
    color = _UP if value > 0 else _DOWN
    style = f"background:rgba({color},{shade:.3f})"
    if abs(value) <= largest:
        return Token(text, style, f"{value:+.4g}")
    return Token(text, f"{style};outline:2px solid black", f"{value:+.4g}, beyond the scale")
