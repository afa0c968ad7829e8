"""Side effects: what the suppressing edits do to requests that were never refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import saefeat as sf

from .data import chats
from .lab import Lab
from .stats import bootstrap_mean
from .suppression import global_edits
from .tables import Table, table

POPULATIONS = ("harmless_test", "sensitive_test")


def side_effects(lab: Lab, vector: Tensor, tuned: dict[str, Any]) -> list[dict[str, Any]]:
    """For every global edit: cross-entropy on the model's own answers, and outcomes.

    Returns:
        Rows of plain data; ``loss`` holds one mean cross-entropy a prompt, in nats a token.
    """
    known = [vector.tolist(), tuned["methods"], tuned["random"]]
    own = lab.stage("side effects/answers", None, lambda: _own_answers(lab))
    edits = dict(global_edits(lab, vector, tuned))
    for extra in list(tuned["random"])[1:]:
        edits.pop(f"random {extra}")
    rows = []
    for name, edit in lab.progress(edits.items(), "side effects"):
        found = lab.stage(f"side effects/{name}", [known, own], lambda e=edit: _row(lab, own, e))
        rows.append({"method": name, **found})
    base = rows[0]["loss"]
    return [{**row, **_summary(lab, row["loss"], base)} for row in rows]


def _own_answers(lab: Lab) -> list[list[int]]:
    """Token ids of the unedited model's answers to the harmless test prompts."""
    return [list(tokens) for tokens in lab.ask(lab.sets.harmless_test).completions]


def _row(lab: Lab, own: list[list[int]], edit: sf.Intervention | None) -> dict[str, Any]:
    kept = sf.metrics.log_prob(sf.metrics.PerPrompt(own))
    asked = chats(lab.sets.harmless_test)
    total = sf.metrics.measure(lab.model, asked, kept, edit, batch_size=lab.settings.batch_size)
    loss = -total / torch.tensor([len(tokens) for tokens in own])
    populations = {name: getattr(lab.sets, name) for name in POPULATIONS if getattr(lab.sets, name)}
    outcomes = {name: lab.outcomes(prompts, edit) for name, prompts in populations.items()}
    return {"loss": loss.tolist(), "outcomes": outcomes}


def _summary(lab: Lab, loss: list[float], base: list[float]) -> dict[str, Any]:
    """Means with bootstrap intervals: the loss, and its rise over the unedited model, paired."""
    rise = [one - other for one, other in zip(loss, base, strict=True)]
    seed = lab.settings.seed
    return {
        "mean_loss": bootstrap_mean(loss, seed=seed)._asdict(),
        "mean_rise": bootstrap_mean(rise, seed=seed)._asdict(),
    }


def side_effect_table(rows: list[dict[str, Any]], number: int) -> Table:
    """One row an edit."""
    sizes = {name: found["n"] for name, found in rows[0]["outcomes"].items()}
    shown = " and ".join(f"{n} {name.removesuffix('_test')}" for name, n in sizes.items())
    heads = [f"{name.removesuffix('_test')}: refused / complied / broken" for name in sizes]
    return table(
        f"{number}. Side effects on requests that are no harm",
        f"Cross-entropy (thousandths of a nat a token) of the unedited model's own answers to "
        f"{len(rows[0]['loss'])} harmless test prompts under each edit, per-prompt mean with a "
        f"bootstrap 95 % interval, and its rise over no edit, paired by prompt: lower is better. "
        f"Then outcomes on {shown} test prompts: all should comply (sensitive ones borrow harmful "
        f"words; suppressing refusal may repair needless refusals there).",
        ("edit", "cross-entropy [95 %]", "rise [95 %]", *heads),
        [
            (
                row["method"],
                _spell(row["mean_loss"]),
                _spell(row["mean_rise"]),
                *(
                    f"{one['refused']} / {one['complied']} / {one['broken']}"
                    for one in row["outcomes"].values()
                ),
            )
            for row in rows
        ],
    )


def _spell(found: dict[str, float]) -> str:
    """In thousandths of a nat: what is at stake on a small model is far below one."""
    value, low, high = (1000 * found[name] for name in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
