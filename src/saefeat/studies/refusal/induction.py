"""Induction: the same latents, held high, make the model refuse harmless requests."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import saefeat as sf

from .clamping import held
from .direction import adding
from .lab import Lab
from .selection import restored
from .stats import Estimate
from .tables import Table, table


def induce(lab: Lab, vector: Tensor, layer: int, tuned: dict[str, Any]) -> dict[str, Any]:
    """Outcomes on harmless test prompts, for every method and value, and for AS at one layer.

    Returns:
        Plain data: ``reference`` (base and AS rows), ``rows`` (method, value) and ``values``.
    """
    reference: dict[str, sf.Intervention | None] = {"base": None, "AS": adding(vector, layer)}
    sets = {name: one["latents"] for name, one in tuned["methods"].items()}
    sets |= {f"random {seed}": one for seed, one in list(tuned["random"].items())[:1]}
    jobs = [(name, value) for name in sets for value in lab.settings.values]
    rows = [
        _row(lab, name, value, held(restored(lab.saes, sets[name]), value, lab.counted), sets[name])
        for name, value in lab.progress(jobs, "induction")
    ]
    known = [vector.tolist(), layer]
    return {
        "values": list(lab.settings.values),
        "reference": [_row(lab, name, None, edit, known) for name, edit in reference.items()],
        "rows": rows,
    }


def _row(
    lab: Lab, name: str, value: float | None, edit: sf.Intervention | None, inputs: Any
) -> dict[str, Any]:
    stage = f"induction/{name}" + ("" if value is None else f"-{value:g}")
    prompts = lab.sets.harmless_test
    found = lab.stage(stage, [inputs, value], lambda: lab.outcomes(prompts, edit))
    return {"method": name, "value": value, **found}


def induction_table(found: dict[str, Any], number: int) -> Table:
    """Refusal rates, one row a method, one column a value."""
    rows: list[list[object]] = [
        [row["method"], _rate(row), *[""] * (len(found["values"]) - 1)]
        for row in found["reference"]
    ]
    for name in dict.fromkeys(row["method"] for row in found["rows"]):
        rows.append([name, *(_rate(row) for row in found["rows"] if row["method"] == name)])
    n = found["reference"][0]["n"]
    return table(
        f"{number}. Refusal induced on harmless prompts",
        f"Refusal rate [95 %] on {n} harmless test prompts while the method's latents are held at "
        f"v at every token of the study; base (no edit) and AS (V* added behind layer l*) have no "
        f"v. Higher is a stronger effect. '+n' counts broken answers, which are no refusals.",
        ("edit", *(f"v = {value:g}" for value in found["values"])),
        rows,
    )


def _rate(row: dict[str, Any]) -> str:
    rate = Estimate(**row["refusal"])
    broken = f" +{row['broken']}" if row["broken"] else ""
    return f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]{broken}"
