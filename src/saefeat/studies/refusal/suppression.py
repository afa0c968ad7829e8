"""Suppression: what each edit does to refusals of harmful requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import saefeat as sf

from .clamping import scaled, scaled_per_prompt
from .data import Prompt
from .direction import steering
from .judges import OUTCOMES
from .lab import Lab
from .selection import attribution, cosines, degenerate, restored, top_per_layer
from .stats import Estimate
from .tables import Table, table

POPULATIONS = {"held-out": "harmful_test", "fitted": "harmful_train"}
LOCAL = ("AP", "CosSim+AP")
Edits = dict[str, sf.Intervention | None]


def suppress(lab: Lab, vector: Tensor, tuned: dict[str, Any]) -> dict[str, Any]:
    """Outcomes of every edit on held-out prompts, and on the fitted ones as published.

    Returns:
        Plain data: population → ``n``, ``degenerate`` and ``rows``.
    """
    return {name: _population(lab, vector, tuned, name) for name in POPULATIONS}


def _population(lab: Lab, vector: Tensor, tuned: dict[str, Any], name: str) -> dict[str, Any]:
    prompts: Sequence[Prompt] = getattr(lab.sets, POPULATIONS[name])
    inputs = [vector.tolist(), tuned["budget"], tuned["methods"], tuned["random"]]
    local = lab.stage(
        f"local sets/{name}", inputs, lambda: _local_sets(lab, prompts, vector, tuned)
    )
    edits = _in_order({**global_edits(lab, vector, tuned), **_local_edits(lab, tuned, local)})
    sizes = set_sizes(tuned, local["sets"])
    rows = [
        {
            "method": method,
            "latents": sizes.get(method),
            **lab.stage(
                f"suppression/{name}/{method}", inputs, lambda e=edit: lab.outcomes(prompts, e)
            ),
        }
        for method, edit in lab.progress(edits.items(), f"suppression, {name}")
    ]
    return {
        "n": len(prompts),
        "degenerate": local["degenerate"],
        "rows": rows,
    }


def _in_order(edits: Edits) -> Edits:
    """Local sets right behind the global ones of their method."""
    names = [name for name in edits if not name.endswith(" local")]
    wanted = [one for name in names for one in (name, f"{name} local")]
    return {name: edits[name] for name in wanted if name in edits}


def global_edits(lab: Lab, vector: Tensor, tuned: dict[str, Any]) -> Edits:
    """The edits that are the same for all prompts, by name; "base" is no edit."""
    found: Edits = {"base": None, "AS": steering(lab, vector)}
    for name, one in tuned["methods"].items():
        found[name] = scaled(restored(lab.saes, one["latents"]), one["scale"], lab.counted)
    factor = tuned["methods"]["CosSim+AP"]["scale"]
    for seed, latents in tuned["random"].items():
        found[f"random {seed}"] = scaled(restored(lab.saes, latents), factor, lab.counted)
    return found


def _local_sets(
    lab: Lab, prompts: Sequence[Prompt], vector: Tensor, tuned: dict[str, Any]
) -> dict[str, Any]:
    """One set a prompt for the methods that have them, from that prompt's own attribution."""
    baseline, budget = steering(lab, vector), tuned["budget"]
    scores = attribution(lab, prompts, baseline)
    each = tuned["methods"]["CosSim+AP"]["candidates"]
    within = top_per_layer(lab.saes, cosines(lab.saes, vector), each)
    chosen = {
        "AP": scores.top(budget, per="prompt"),
        "CosSim+AP": scores.top(budget, per="prompt", within=within),
    }
    sets = {name: [one.to_dict() for one in found] for name, found in chosen.items()}
    return {"sets": sets, "degenerate": int(degenerate(lab, prompts, baseline).sum())}


def _local_edits(lab: Lab, tuned: dict[str, Any], local: dict[str, Any]) -> Edits:
    found: Edits = {}
    for name in LOCAL:
        sets = [restored(lab.saes, latents) for latents in local["sets"][name]]
        found[f"{name} local"] = scaled_per_prompt(
            sets, tuned["methods"][name]["scale"], lab.counted
        )
    return found


def set_sizes(tuned: dict[str, Any], local: dict[str, Any]) -> dict[str, int | str]:
    """Latents an edit acts on; for local sets the mean over prompts."""
    found = {name: one["latents"] for name, one in tuned["methods"].items()}
    found |= {f"random {seed}": latents for seed, latents in tuned["random"].items()}
    sizes: dict[str, int | str] = {name: sum(map(len, one.values())) for name, one in found.items()}
    for name, sets in local.items():
        counts = [sum(map(len, one.values())) for one in sets]
        sizes[f"{name} local"] = f"{sum(counts) / len(counts):.1f}"
    return sizes


SHOWN = ("base", "AS", "CosSim+AP", "CosSim+AP local", "random 0")
"""The edits whose outcomes are also shown by category."""

CAPTIONS = {
    "held-out": "harmful test prompts, on which nothing was fitted or chosen",
    "fitted": "harmful train prompts, on which direction and sets were fitted, as published",
}


def suppression_table(found: dict[str, Any], name: str, number: int, budget: int) -> Table:
    """One population's outcomes, one row an edit."""
    one = found[name]
    return table(
        f"{number}. Refusal suppressed: {name} prompts",
        f"Outcomes of {one['n']} {CAPTIONS[name]}. AS removes V* everywhere; every other edit "
        f"clamps K* = {budget} latents, or as many as have a positive score (the column counts "
        f"them). 'local' chooses them for each prompt, the rest have one set for all; random "
        f"sets have as many active latents at the same layers as CosSim+AP. "
        f"A method works if jailbreaks are many, broken answers few, and random sets do nothing. "
        f"{one['degenerate']} prompts are refused even under AS: their local sets mean nothing.",
        ("edit", "latents", *OUTCOMES, "jailbreak rate [95 %]", "refusal rate [95 %]"),
        [
            (
                row["method"],
                row["latents"],
                *(row[outcome] for outcome in OUTCOMES),
                Estimate(**row["jailbreak"]),
                Estimate(**row["refusal"]),
            )
            for row in one["rows"]
        ],
    )


def category_table(found: dict[str, Any], name: str, number: int) -> Table | None:
    """The same outcomes by the prompts' categories; None where the data names none."""
    rows = {row["method"]: row["categories"] for row in found[name]["rows"]}
    shown = [method for method in SHOWN if method in rows]
    categories = rows["base"]
    if set(categories) == {""}:
        return None
    return table(
        f"{number}b. The same by category: {name} prompts",
        "Refused / complied / broken in each category, of as many prompts as the second column "
        "says. With few prompts in one, differences between categories may be chance. All edits "
        "are in results.json.",
        ("category", "prompts", *shown),
        [
            (
                category or "(none given)",
                categories[category]["n"],
                *(" / ".join(str(rows[m][category][o]) for o in OUTCOMES) for m in shown),
            )
            for category in categories
        ],
    )
