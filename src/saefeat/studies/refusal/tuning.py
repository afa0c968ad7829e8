"""Tuning: every method's sets, and the budget, candidates and clamp chosen on the val split.

All methods get the same budget K*. At that budget each method gets the clamp c (and CosSim+AP the
K0) that does best for it on val, so that no method is judged at a value chosen for another.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import saefeat as sf

from .clamping import scaled
from .direction import steering
from .lab import Lab
from .selection import (
    active,
    attribution,
    cosines,
    peaks,
    random_like,
    restored,
    telling,
    top_overall,
    top_per_layer,
    union,
)
from .tables import Table, table

METHODS = ("CosSim", "ActDiff", "AP", "CosSim+AP")
CLOSE = 0.05
"""The smallest budget is taken whose best method comes this close to the best at any budget."""


def fit_sets(lab: Lab, vector: Tensor) -> dict[str, Any]:
    """Global sets of every method for every K0 and K*, and the latents that are active.

    Returns:
        Plain data: ``sets`` (method, candidates K0 or None, budget K*, latents), ``active``, and
        how the attribution went.
    """
    settings, prompts = lab.settings, lab.sets.harmful_train
    close = cosines(lab.saes, vector)
    harmful, harmless = peaks(lab, prompts), peaks(lab, lab.sets.harmless_train)
    rise = {site: harmful[site] - harmless[site] for site in harmful}
    baseline = steering(lab, vector)
    kept, blind = telling(lab, prompts, baseline)
    scores = attribution(lab, kept, baseline)
    rows = []
    for budget in settings.budgets:
        plain = {
            "CosSim": top_overall(lab.saes, close, budget),
            "ActDiff": top_overall(lab.saes, rise, budget),
            "AP": scores.top(budget),
        }
        rows += [_row(method, None, budget, found) for method, found in plain.items()]
        for each in settings.candidates:
            within = top_per_layer(lab.saes, close, each)
            rows.append(_row("CosSim+AP", each, budget, scores.top(budget, within=within)))
    return {
        "sets": rows,
        "active": active(lab.saes, harmful).to_dict(),
        "prompts": len(prompts),
        "degenerate": blind,
        "metric": [float(scores.clean.mean()), float(scores.baseline.mean())],
    }


def _row(method: str, candidates: int | None, budget: int, found: sf.Latents) -> dict[str, Any]:
    latents = found.to_dict()
    return {"method": method, "candidates": candidates, "budget": budget, "latents": latents}


def tune(lab: Lab, vector: Tensor) -> dict[str, Any]:
    """Fit all sets, try them on val where there is a choice, and settle on one a method.

    Returns:
        Plain data: ``fit``, ``rows`` (the trials; empty without a choice), ``budget``,
        ``methods`` (name → c, K0 and latents) and ``random`` (seed → latents).
    """
    settings = lab.settings
    fit = lab.stage("sets", vector.tolist(), lambda: fit_sets(lab, vector))
    trials = [{**row, "scale": c} for row in fit["sets"] for c in settings.scales]
    choice = any(len(v) > 1 for v in (settings.candidates, settings.budgets, settings.scales))
    rows = [_trial(lab, row) for row in lab.progress(trials, "tuning on val")] if choice else []
    budget = choose_budget(rows) if choice else settings.budgets[0]
    at_budget = [row for row in rows or trials if row["budget"] == budget]
    methods = {name: _best([r for r in at_budget if r["method"] == name]) for name in METHODS}
    return {
        "fit": {name: value for name, value in fit.items() if name != "sets"},
        "rows": rows,
        "budget": budget,
        "methods": methods,
        "random": _random_sets(lab, fit, methods),
    }


def _trial(lab: Lab, row: dict[str, Any]) -> dict[str, Any]:
    """One set at one clamp on val; results are stored."""
    edit = scaled(restored(lab.saes, row["latents"]), row["scale"], lab.counted)
    name = f"tuning/{row['method']}-{row['candidates']}-{row['budget']}-{row['scale']}"
    found = lab.stage(name, row, lambda: lab.outcomes(lab.sets.harmful_val, edit))
    return {**row, **found}


def choose_budget(rows: list[dict[str, Any]]) -> int:
    """The smallest budget at which the best trial is within ``CLOSE`` of the best at any."""
    best = {b: 0.0 for b in sorted({row["budget"] for row in rows})}
    for row in rows:
        best[row["budget"]] = max(best[row["budget"]], row["complied"] / row["n"])
    return next(b for b, rate in best.items() if rate >= max(best.values()) - CLOSE)


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial with most jailbreaks; ties go to fewer broken, then to the gentlest clamp."""

    def merit(row: dict[str, Any]) -> tuple[float, ...]:
        return (row.get("complied", 0), -row.get("broken", 0), row["scale"])

    row = max(rows, key=merit)
    return {name: row[name] for name in ("scale", "candidates", "latents")}


def _random_sets(
    lab: Lab, fit: dict[str, Any], methods: dict[str, Any]
) -> dict[str, dict[str, list[int]]]:
    """Random active latents, as many a layer as CosSim+AP has, none that any method chose."""
    chosen = {name: restored(lab.saes, found["latents"]) for name, found in methods.items()}
    pool = restored(lab.saes, fit["active"]) - union(chosen.values())
    like = chosen["CosSim+AP"]
    seeds = lab.settings.random_seeds if len(like) else ()
    return {str(seed): random_like(pool, like, seed).to_dict() for seed in seeds}


def tuning_table(found: dict[str, Any]) -> Table | None:
    """All trials on val, the chosen marked; None where nothing was to choose."""
    rows = found["rows"]
    if not rows:
        return None
    scales = list(dict.fromkeys(row["scale"] for row in rows))
    keys = dict.fromkeys((row["budget"], row["method"], row["candidates"]) for row in rows)
    return table(
        "2. Choosing the clamp on the val split",
        f"Each method's global set of K* latents is multiplied by c at every token of the study "
        f"while the model answers {rows[0]['n']} harmful val prompts; the cells count complied / "
        f"broken answers. "
        f"K* = {found['budget']} is used below: the smallest whose best trial is within "
        f"{CLOSE:.0%} of the best, a rule that suits the method needing fewest latents, so look "
        f"at the other K* too. The starred c (and K0) of each method is used below.",
        ("K*", "method", "K0", *(f"c = {c:g}" for c in scales)),
        [_tuning_row(found, key) for key in keys],
    )


def _tuning_row(found: dict[str, Any], key: tuple) -> list[object]:
    """One set's trials, one cell a clamp."""
    cells: list[object] = list(key)
    budget, method, candidates = key
    one = found["methods"][method]
    for row in found["rows"]:
        if (row["budget"], row["method"], row["candidates"]) == key:
            chosen = (one["scale"], one["candidates"], found["budget"])
            star = " *" if (row["scale"], candidates, budget) == chosen else ""
            cells.append(f"{row['complied']} / {row['broken']}{star}")
    return cells


def sets_table(found: dict[str, Any]) -> Table:
    """Which latents each method chose."""
    rows = [
        (name, one["scale"], sum(map(len, one["latents"].values())), spelled(one["latents"]))
        for name, one in found["methods"].items()
    ]
    fit = found["fit"]
    clean, steered = fit["metric"]
    return table(
        "3. The latents each method chose",
        f"Global sets, fitted on {fit['prompts']} harmful train prompts (ActDiff and V* also on "
        f"the harmless ones), clamped by f <- c*f below. Attribution metric: the steered token's "
        f"logit against a refusal's, {clean:.2f} on the prompts and {steered:.2f} under steering; "
        f"{fit['degenerate']} of the prompts are refused even then and left out of it.",
        ("method", "c", "latents", "layer: indices"),
        rows,
    )


def spelled(latents: dict[str, list[int]]) -> str:
    """A stored selection on one line."""
    return "; ".join(
        f"{site.rsplit('.', 1)[1]}: {' '.join(map(str, ix))}" for site, ix in latents.items()
    )
