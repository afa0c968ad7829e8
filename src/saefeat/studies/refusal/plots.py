"""Plots as PNG bytes. matplotlib is optional and imported only here, only when a plot is drawn."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import Any

COLORS = {"refused": "#4477aa", "complied": "#ee8866", "broken": "#bbbbbb"}
LINES = ("#ee8866", "#4477aa", "#228833", "#aa3377", "#bbbbbb", "#66ccee")


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _axes(width: float = 7.0, height: float = 3.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def layer_plot(layers: dict[str, Any]) -> bytes:
    """Jailbreak rate by the layer the direction was taken from, with intervals."""
    figure, axes = _axes()
    rows = layers["rows"]
    rates = [row["jailbreak"] for row in rows]
    heights = [rate["value"] for rate in rates]
    below = [max(0.0, rate["value"] - rate["low"]) for rate in rates]
    above = [max(0.0, rate["high"] - rate["value"]) for rate in rates]
    colors = ["#ee8866" if row["layer"] == layers["best"] else "#ccccdd" for row in rows]
    axes.bar(
        [str(row["layer"]) for row in rows], heights, yerr=[below, above], capsize=3, color=colors
    )
    axes.set(ylim=(0, 1.05), xlabel="layer the direction comes from", ylabel="jailbreak rate, val")
    return _png(figure)


def outcome_plot(population: dict[str, Any]) -> bytes:
    """Shares of the three outcomes, one bar an edit."""
    rows = population["rows"][::-1]
    figure, axes = _axes(height=0.6 + 0.33 * len(rows))
    left = [0.0] * len(rows)
    for outcome, color in COLORS.items():
        shares = [row[outcome] / row["n"] for row in rows]
        axes.barh([row["method"] for row in rows], shares, left=left, color=color, label=outcome)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set(xlim=(0, 1), xlabel=f"share of {population['n']} harmful prompts")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return _png(figure)


def induction_plot(found: dict[str, Any]) -> bytes:
    """Refusal rate on harmless prompts over v, one line a method, with interval bands."""
    figure, axes = _axes(height=3.8)
    names = dict.fromkeys(row["method"] for row in found["rows"])
    for name, color in zip(names, LINES * len(names), strict=False):
        rates = [row["refusal"] for row in found["rows"] if row["method"] == name]
        low, high = [rate["low"] for rate in rates], [rate["high"] for rate in rates]
        axes.plot(found["values"], [rate["value"] for rate in rates], "o-", color=color, label=name)
        axes.fill_between(found["values"], low, high, color=color, alpha=0.18, linewidth=0)
    for row, style in zip(found["reference"], (":", "--"), strict=True):
        rate = row["refusal"]["value"]
        axes.axhline(rate, color="#444444", linestyle=style, linewidth=1, label=row["method"])
    axes.set(ylim=(-0.03, 1.05), xlabel="v, the value latents are held at", ylabel="refusal rate")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)
