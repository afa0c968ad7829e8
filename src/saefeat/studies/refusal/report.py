"""The report: one HTML file that needs nothing else, not even a network.

Text that a model or a data file produced is escaped like everything else.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

from . import plots

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; }
p.caption, .note { color: #555; max-width: 50rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
th, td { padding: .25rem .7rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
table.text th, table.text td { text-align: left; min-width: 9rem; }
img { max-width: 100%; }
.refused { color: #2b5b8c; } .complied { color: #b4501f; } .broken { color: #777; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .78rem; }
"""

INTRODUCTION = (
    "When a chat model refuses a harmful request, which few latents of its sparse autoencoders "
    "carry that decision? This report finds such latents in four ways, clamps them while the model "
    "answers, and counts what becomes of the answers: refused, complied, or broken. Broken answers "
    "are debris of an edit and never count as a success. Bracketed numbers are 95 % intervals: "
    "Wilson for rates, bootstrap over prompts for means."
)
PLANTED = (
    "The embedded model's refusal direction was planted in training, so that there is something to "
    "find and a method that finds it is shown to work; the numbers say nothing about large models."
)
METHODS = (
    ("AS", "activation steering: the refusal direction V* is removed behind every layer"),
    ("CosSim", "latents whose directions have the highest cosine with V*"),
    ("ActDiff", "latents whose peak activation differs most, harmful minus harmless"),
    ("AP", "latents with the highest integrated-gradients attribution towards steering"),
    ("CosSim+AP", "the same among each layer's K0 latents closest to V* (the paper's method)"),
    ("random", "as many random active latents at the same layers: the control"),
)


def escape(value: object) -> str:
    """Text that is safe inside HTML."""
    return html.escape(str(value), quote=True)


def table_html(table: Mapping[str, Any], kind: str = "") -> str:
    """A table of the results as HTML, caption first."""
    head = "".join(f"<th>{escape(name)}</th>" for name in table["columns"])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table["rows"]
    )
    return (
        f"<h2>{escape(table['title'])}</h2>\n<p class='caption'>{escape(table['caption'])}</p>\n"
        f"<div class='scroll'><table class='{kind}'>\n<tr>{head}</tr>\n{body}</table></div>\n"
    )


def figures(data: Mapping[str, Any]) -> dict[str, str]:
    """Table's title prefix → an inline image; empty without matplotlib."""
    if not plots.available():
        return {}
    drawn = {
        "layers": plots.layer_plot(data["layers"]),
        "suppression": plots.outcome_plot(data["suppression"]["held-out"]),
        "induction": plots.induction_plot(data["induction"]),
    }
    return {name: image(picture, name) for name, picture in drawn.items()}


def image(png: bytes, name: str) -> str:
    """A PNG inside the page itself."""
    text = base64.b64encode(png).decode()
    return f"<p><img alt='{escape(name)}' src='data:image/png;base64,{text}'></p>\n"


def examples_html(population: Mapping[str, Any], methods: Iterable[str]) -> str:
    """Answers of several prompts before and after, side by side."""
    rows = {row["method"]: row for row in population["rows"]}
    shown = [name for name in methods if name in rows]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("request", *shown))
    body = ""
    for n, request in enumerate(population["requests"]):
        answers = [(rows[name]["verdicts"][n], rows[name]["answers"][n]) for name in shown]
        cells = "".join(f"<td class='{escape(v)}'>{escape(text)}</td>" for v, text in answers)
        body += f"<tr><td>{escape(request)}</td>{cells}</tr>\n"
    return (
        "<h2>Answers before and after</h2>\n<p class='caption'>Held-out harmful prompts, the first "
        "few; the color is the judge's verdict: <span class='refused'>refused</span>, "
        "<span class='complied'>complied</span>, <span class='broken'>broken</span>.</p>\n"
        f"<div class='scroll'><table class='text'>\n<tr>{head}</tr>\n{body}</table></div>\n"
    )


def report(results: Mapping[str, Any]) -> str:
    """The whole page."""
    drawn = figures(results["data"])
    parts = [f"<h1>{escape(results['title'])}</h1>\n<p>{escape(INTRODUCTION)}</p>\n"]
    if "embedded" in results["title"]:
        parts.append(f"<p class='note'>{escape(PLANTED)}</p>\n")
    parts.append("<ul>")
    parts += [f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in METHODS]
    parts.append("</ul>\n")
    if not drawn:
        parts.append("<p class='note'>matplotlib is not installed, so there are no plots; "
                     "<code>pip install 'saefeat[plots]'</code> adds them.</p>\n")  # fmt: skip
    for name, tables in results["tables"].items():
        parts += [table_html(one) for one in tables]
        parts.append(drawn.get(name, ""))
        if name == "suppression":
            held_out = results["data"]["suppression"]["held-out"]
            parts.append(examples_html(held_out, ("base", "AS", "CosSim+AP", "random 0")))
    parts.append(_provenance(results))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{escape(results['title'])}</title><style>{STYLE}</style></head>\n<body>\n"
        + "".join(parts)
        + "</body></html>\n"
    )


def _provenance(results: Mapping[str, Any]) -> str:
    """Notes and where everything comes from."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in results["notes"])
    found = {name: results[name] for name in ("provenance", "settings", "prompts", "timing")}
    text = json.dumps(found, indent=2, ensure_ascii=False)
    return (
        f"<h2>How this differs from the paper</h2>\n<ul>{notes}</ul>\n"
        f"<h2>Where this comes from</h2>\n<p class='note'>All of it as data: results.json, beside "
        f"this file.</p>\n<pre>{escape(text)}</pre>\n"
    )
