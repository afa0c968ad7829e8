"""The report: one HTML file that needs nothing else, not even a network.

Text that a model or a data file produced is escaped like everything else.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import saefeat as sf

from . import plots

METHODS = (
    ("AS", "activation steering: the refusal direction V* is removed behind every layer"),
    ("CosSim", "latents whose directions have the highest cosine with V*"),
    ("ActDiff", "latents whose peak activation differs most, harmful minus harmless"),
    ("AP", "latents with the highest integrated-gradients attribution towards steering"),
    ("CosSim+AP", "the same among each layer's K0 latents closest to V* (the paper's method)"),
    ("random", "as many random active latents at the same layers: the control"),
)
SHOWN = ("base", "AS", "CosSim+AP", "random 0")
"""The methods whose answers stand side by side."""

ORIGIN = ("provenance", "settings", "constants", "prompts", "timing")
"""What the page ends with."""


def _said(record: Mapping[str, str]) -> tuple[str, str]:
    return record["outcome"], record["answer"]


def report(results: Mapping[str, Any]) -> str:
    """The whole page."""
    held_out = results["data"]["suppression"]["held-out"]
    rows = {row["method"]: row for row in held_out["rows"]}
    shown = [name for name in SHOWN if name in rows]
    answers = [
        (one["request"], [_said(rows[name]["examples"][n]) for name in shown])
        for n, one in enumerate(held_out["rows"][0]["examples"])
    ]
    origin = {name: results[name] for name in ORIGIN}
    return sf.results.render(
        Path(__file__).with_name("report.jinja").read_text(encoding="utf-8"),
        title=results["title"],
        planted="embedded" in results["title"],
        methods=METHODS,
        images=figures(results["data"]),
        tables=results["tables"],
        shown=shown,
        answers=answers,
        notes=results["notes"],
        warnings=results["warnings"],
        every=results["answers"],
        provenance=json.dumps(origin, indent=2, ensure_ascii=False),
    )


def figures(data: Mapping[str, Any]) -> dict[str, str]:
    """Group of tables → its plot, a PNG in base 64; empty without matplotlib."""
    if not plots.available():
        return {}
    drawn = {
        "layers": plots.layer_plot(data["layers"]),
        "suppression": plots.outcome_plot(data["suppression"]["held-out"]),
        "induction": plots.induction_plot(data["induction"]),
    }
    return {name: base64.b64encode(png).decode() for name, png in drawn.items()}
