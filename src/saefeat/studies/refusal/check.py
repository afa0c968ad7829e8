"""Check: attributions are estimates, so the chosen latents are also ablated for real.

Two questions. Does the order in which attribution ranks latents agree with what ablating each
alone does? And do the scores add up to the change they explain (completeness)? The second can
be asked only where the whole effect passes one place: behind the last layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import saefeat as sf

from .data import chats
from .direction import steering
from .lab import Lab
from .selection import attribution, cosines, restored, telling, top_per_layer
from .stats import spearman
from .tables import Table, table

MOST = 40
"""Latents ablated one by one at most."""


def check_latents(lab: Lab, vector: Tensor, tuned: dict[str, Any]) -> dict[str, Any]:
    """Exact ablation of each candidate latent beside its attributions, on harmful val prompts.

    Returns:
        Plain data: ``rows`` (latent, exact, and the estimates), and for each estimate the rank
        correlation and the share of equal signs.
    """
    one = tuned["methods"]["CosSim+AP"]
    near = top_per_layer(lab.saes, cosines(lab.saes, vector), max(lab.settings.candidates))
    chosen = restored(lab.saes, one["latents"])
    pool = chosen | near
    latents = pool
    if len(pool) > MOST:
        latents = chosen | (pool - chosen).sample(max(0, MOST - len(chosen)), seed=0)
    known = [vector.tolist(), latents.to_dict()]
    singles = _singles(latents)
    exact = [
        lab.stage(f"check/exact {n}", known, lambda s=single: _ablated(lab, s))
        for n, single in enumerate(lab.progress(singles, "exact ablation"))
    ]
    base = lab.stage("check/base", None, lambda: _odds(lab, None))
    effects = [value - base for value in exact]
    estimates = lab.stage("check/estimates", known, lambda: _estimates(lab, vector, latents))
    rows = [
        {
            "latent": f"{site} {index}",
            "chosen": (site, index) in set(chosen),
            "exact": effects[n],
            **{name: values[n] for name, values in estimates.items()},
        }
        for n, (site, index) in enumerate(latents)
    ]
    agreement = {name: _agreement(effects, values) for name, values in estimates.items()}
    return {"n": len(lab.sets.harmful_val), "base": base, "rows": rows, "agreement": agreement}


def _singles(latents: sf.Latents) -> list[sf.Latents]:
    return [
        sf.Latents(((basis, (index,)),)) for basis, indices in latents.parts for index in indices
    ]


def _odds(lab: Lab, edit: sf.Intervention | None) -> float:
    return lab.mean_odds(lab.sets.harmful_val, edit)


def _ablated(lab: Lab, latent: sf.Latents) -> float:
    return _odds(lab, sf.Ablate(latent, where=lab.counted))


def _estimates(lab: Lab, vector: Tensor, latents: sf.Latents) -> dict[str, list[float]]:
    """Attributed change of the metric for each latent, summed over tokens, mean over prompts."""
    prompts = chats(lab.sets.harmful_val)
    size = lab.settings.batch_size
    found = {
        "gradient x activation": sf.Attribute(
            latents, lab.odds(), method=sf.attribution.AtP(), where=lab.counted
        ),
        "integrated gradients": sf.Attribute(
            latents, lab.odds(), method=sf.IG(lab.settings.steps, "midpoint"), where=lab.counted
        ),
    }
    scores = {name: job(lab.model, prompts, batch_size=size) for name, job in found.items()}
    steered = attribution(lab, lab.sets.harmful_val, steering(lab, vector))
    scores["towards AS (used to select)"] = steered
    return {name: summed(one, latents).tolist() for name, one in scores.items()}


def summed(scores: sf.attribution.Attribution, latents: sf.Latents) -> Tensor:
    """[k]: each latent's scores summed over tokens, mean over prompts."""
    table = torch.zeros(len(latents), dtype=torch.float32)
    place = {key: n for n, key in enumerate(latents)}
    sites = [dictionary.site for dictionary in scores.dictionaries]
    for n, site in enumerate(sites):
        at = scores.dictionary == n
        for latent in {index for other, index in place if other == site}:
            table[place[site, latent]] = scores.score[at & (scores.latent == latent)].sum()
    return table / max(1, len(scores.tokens))


def _agreement(exact: list[float], estimate: list[float]) -> dict[str, float]:
    moved = [(a, b) for a, b in zip(exact, estimate, strict=True) if a != 0 and b != 0]
    same = sum((a > 0) == (b > 0) for a, b in moved) / max(1, len(moved))
    return {"spearman": spearman(exact, estimate), "signs": same, "n": len(exact)}


def check_completeness(lab: Lab, vector: Tensor) -> list[dict[str, Any]]:
    """How far Σ scores is from the metric's change, behind the last layer of the model.

    The neuron basis explains everything, so its gap is the quadrature's alone; what the SAE's
    gap has beyond it is what the SAE does not explain.
    """
    last = lab.sites[-1]
    bases: dict[str, sf.dictionaries.Dictionary] = {"neurons": sf.Neurons(last, lab.width)}
    if last in lab.saes:
        bases["SAE"] = lab.saes[last]
    jobs = [(name, rule) for name in bases for rule in ("left", "midpoint", "gauss")]
    return [
        lab.stage(
            f"check/completeness {name} {rule}",
            vector.tolist(),
            lambda b=bases[name], n=name, r=rule: _gap(lab, vector, b, n, r),
        )
        for name, rule in jobs
    ]


def _gap(
    lab: Lab, vector: Tensor, basis: sf.dictionaries.Dictionary, name: str, rule: str
) -> dict[str, Any]:
    baseline = steering(lab, vector)
    kept, _ = telling(lab, lab.sets.harmful_val, baseline)
    scores = sf.Attribute(
        basis,
        sf.logit_diff(sf.metrics.BASELINE_TOP, list(lab.refusal_ids)),
        baseline=baseline,
        method=sf.IG(lab.settings.steps, rule),
    )(lab.model, chats(kept), batch_size=lab.settings.batch_size)
    change = (scores.baseline - scores.clean).abs()
    relative = scores.gap.abs() / change.clamp(min=1e-6)
    return {
        "basis": name,
        "rule": rule,
        "n": len(kept),
        "change": float(change.median()),
        "gap": float(scores.gap.abs().median()),
        "relative": float(relative.median()),
    }


def check_tables(latents: dict[str, Any], gaps: list[dict[str, Any]], number: int) -> list[Table]:
    """Agreement, the single latents with the largest effects, and completeness."""
    names = list(latents["agreement"])
    top = sorted(latents["rows"], key=lambda row: -abs(row["exact"]))[:10]
    n, k = latents["n"], len(latents["rows"])
    agreement = table(
        f"{number}. Do attributions predict exact ablations?",
        f"Each of {k} candidate latents is ablated alone on {n} harmful val prompts; exact is the "
        f"change of the log-odds of an answer against a refusal ({latents['base']:.2f} unedited). "
        f"Rank correlation near 1 and signs near 1 mean that the estimate can be trusted to rank.",
        ("estimate", "latents", "rank correlation", "same sign"),
        [
            (name, one["n"], one["spearman"], one["signs"])
            for name, one in latents["agreement"].items()
        ],
    )
    largest = table(
        f"{number + 1}. The latents with the largest exact effect",
        "From the same experiment: the exact change of the log-odds, and what each attribution "
        "said. Positive: ablating the latent alone moves the model towards an answer. The last "
        "estimate has another metric and end point, so only its order can be compared.",
        ("latent", "chosen", "exact", *names),
        [(r["latent"], r["chosen"], r["exact"], *(r[name] for name in names)) for r in top],
    )
    rows = [[g["basis"], g["rule"], g["change"], g["gap"], g["relative"]] for g in gaps]
    complete = table(
        f"{number + 2}. Do the scores add up?",
        f"Behind the last layer the whole effect of AS passes one place, so scores should sum to "
        f"the metric's change. Medians over {gaps[0]['n']} harmful val prompts that AS frees; a "
        f"smaller gap is better. In the neuron basis the gap is the quadrature's alone, the SAE's "
        f"includes its error term.",
        ("basis", "quadrature", "change", "gap", "gap / change"),
        rows,
    )
    return [agreement, largest, complete]
