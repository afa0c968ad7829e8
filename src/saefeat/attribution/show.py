"""A result as a screen of text, an HTML page and a pandas table."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SaefeatError
from .totals import by_token, lengths, token_mask

if TYPE_CHECKING:
    from .scores import Attribution

TOP = 5
PROMPTS = 20
TOKENS = 400


def lines(found: Attribution) -> list[str]:
    """What a reader needs to know before the scores: the best latents, the gap, what is blind."""
    shown = []
    if found.metric:
        shown.append(f"metric: {' '.join(found.metric.split())}")  # a name of one's own may break
    best = found.ranking(TOP) if len(found) else ()
    if best:
        named = (
            f"{next(iter(latents))[0]} {next(iter(latents))[1]}: {s:+.3g}" for latents, s in best
        )
        shown.append("top, mean score over tokens: " + ", ".join(named))
    if len(found.clean) and found.signed and not bool(found.baseline.isnan().all()):
        moved = (found.baseline - found.clean).abs().mean()
        share = f", {found.gap.abs().mean() / moved:.0%} of the metric's change" if moved else ""
        sites = len({dictionary.site for dictionary in found.dictionaries})
        if sites > 1:
            share = f", over {sites} sites, each of which carries the effect"
        shown.append(f"mean |gap| {found.gap.abs().mean():.3g}{share}")
    return shown


def frame(found: Attribution) -> Any:
    """One row a score, in long format."""
    try:
        import pandas
    except ImportError as error:
        raise SaefeatError(
            "Attribution.to_pandas: `pandas` is not installed, wanted pandas 2.2 or later. Likely"
            " cause: it is an extra. Try: pip install 'saefeat[pandas]'"
        ) from error
    sites = [str(dictionary.site) for dictionary in found.dictionaries]
    names = [dictionary.name for dictionary in found.dictionaries]
    number = found.dictionary.tolist()
    table = {
        "prompt": found.prompt.numpy(),
        "position": found.position.numpy(),
        "token": _words(found),
        "site": [sites[n] for n in number],
        "dictionary": [names[n] for n in number],
        "latent": found.latent.numpy(),
        "score": found.score.numpy(),
        "activation": found.activation.numpy(),
        "change": found.change.numpy(),
        "slope": found.slope.numpy(),
    }
    return pandas.DataFrame(table)


def _words(found: Attribution) -> list[str | None]:
    """Each row's token as text; None where it is not known, or the score is of all tokens."""
    if found.texts is None:
        return [None] * len(found)
    words = [found.texts.tokens(prompt) for prompt in range(len(found.tokens))]
    places = zip(found.prompt.tolist(), found.position.tolist(), strict=True)
    return [words[prompt][at] if at >= 0 else None for prompt, at in places]


def page(found: Attribution, prompts: int) -> str:
    """A self-contained HTML fragment: the head, the best latents, the shaded prompts."""
    head, *rest = repr(found).splitlines()
    parts = [f"<p><b>{escape(head)}</b></p>", *(f"<p>{escape(line.strip())}</p>" for line in rest)]
    best = found.ranking(10) if len(found) else ()
    rows = "".join(
        f"<tr><td>{escape(str(site))}</td><td>{index}</td><td>{score:+.4g}</td></tr>"
        for latents, score in best
        for site, index in latents
    )
    parts.append(f"<table><tr><th>site</th><th>latent</th><th>mean score</th></tr>{rows}</table>")
    whole = bool((found.position < 0).any())
    if whole:
        parts.append(
            "<p><small>Each latent was moved at all scored tokens together: no token has"
            " a score of its own.</small></p>"
        )
    elif found.texts is not None and found.scored is not None:
        parts.append(_prompts(found, prompts))
    body = "".join(parts)
    return f'<div class="saefeat-attribution" style="font-family:sans-serif">{body}</div>'


_UP, _DOWN = "31,119,180", "214,96,77"
"""Blue raises the metric, red lowers it; both with transparency, so that text stays as it is."""


def _prompts(found: Attribution, most: int) -> str:
    """Prompts token by token, shaded by their summed score on one scale."""
    sums = by_token(found, "Attribution.to_html")
    scored = token_mask(found, None, "Attribution.to_html")
    largest = float(sums.abs().max()) if len(sums) else 0.0
    shown, starts = [], (lengths(found).cumsum(0) - lengths(found)).tolist()
    assert found.texts is not None
    for prompt in range(min(most, len(starts))):
        words = found.texts.tokens(prompt)[:TOKENS]
        place = range(starts[prompt], starts[prompt] + len(words))
        cells = [
            _token(word, float(sums[at]), largest, bool(scored[at]))
            for word, at in zip(words, place, strict=True)
        ]
        left = len(found.texts.ids[prompt]) - len(words)
        more = f" … {left} more tokens" if left else ""
        base = found.baseline[prompt]
        change = f"{found.clean[prompt]:+.3f}" + ("" if base.isnan() else f" → {base:+.3f}")
        shown.append(
            f'<p style="line-height:1.8"><small>{prompt}: metric {change}</small><br>'
            f"{''.join(cells)}{more}</p>"
        )
    if len(starts) > most:
        shown.append(f"<p>… {len(starts) - most} more prompts</p>")
    up = f'<span style="background:rgba({_UP},0.6)">'
    ways = f'{up}raises</span> or <span style="background:rgba({_DOWN},0.6)">lowers</span>'
    ways = ways if found.signed else f"{up}moves</span>, either way,"
    note = (
        "Tokens are shaded by the sum of their scores over sites and latents: going to the "
        f"baseline {ways} the metric; tokens in gray were not scored."
    )
    return f"<p><small>{note}</small></p>{''.join(shown)}"


def _token(word: str, value: float, largest: float, scored: bool) -> str:
    """One token; white space is shown, so that a token of nothing else can be seen."""
    text = escape(word.replace("\n", "⏎")) or "∅"
    style = "white-space:pre-wrap;border-radius:2px;"
    if not scored:
        return f'<span style="{style}opacity:0.45" title="not scored">{text}</span> '
    shade = 0.75 * abs(value) / largest if largest else 0.0
    color = f"background:rgba({_UP if value > 0 else _DOWN},{shade:.3f})"
    return f'<span style="{style}{color}" title="{value:+.4g}">{text}</span> '


def heat(found: Attribution) -> tuple[list[tuple[str, ...]], list[Tensor], list[Tensor]]:
    """Each prompt's tokens, summed scores and whether they were scored."""
    sizes = lengths(found).tolist()
    assert found.texts is not None
    words = [found.texts.tokens(prompt) for prompt in range(len(sizes))]
    scored = token_mask(found, None, "Attribution.plot_tokens")
    sums = by_token(found, "Attribution.plot_tokens")
    return words, list(torch.split(sums, sizes)), list(torch.split(scored, sizes))
