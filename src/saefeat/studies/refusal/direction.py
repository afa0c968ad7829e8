"""The refusal direction: a difference of means, and the layer at which it counts.

V^l is the mean residual stream of harmful requests minus that of harmless ones, at the last token
of the chat template. Activation steering (AS) removes one such direction at every layer and token.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

import saefeat as sf

from .data import Prompt
from .judges import OUTCOMES
from .lab import Lab
from .stats import Estimate
from .tables import Table, table


def last_token_means(lab: Lab, prompts: Sequence[Prompt]) -> Tensor:
    """[layers, d_model]: means over prompts of the residual stream at the prompt's last token.

    One forward pass a prompt reads all layers.
    """
    readers = [
        sf.Probe(sf.Neurons(site, lab.width).latents(), where=sf.Tokens.last(1), reduce="last")
        for site in lab.sites
    ]
    found = lab.read(prompts, reduce(operator.or_, readers)).readings
    return torch.stack([reading.values[:, 0].float().mean(0).cpu() for reading in found])


def difference_of_means(
    lab: Lab, harmful: Sequence[Prompt], harmless: Sequence[Prompt]
) -> list[list[float]]:
    """V^l for every layer, d_model numbers each; not normalized, the length is the shift itself."""
    return (last_token_means(lab, harmful) - last_token_means(lab, harmless)).tolist()


def steering(lab: Lab, vector: Tensor) -> sf.Ablate:
    """AS: the direction removed behind every layer, at every token."""
    return sf.Ablate(sf.Direction.at_sites(vector, sites=lab.sites, name="refusal direction"))


def adding(vector: Tensor, layer: int) -> sf.Clamp:
    """AS the other way: the whole difference of means added behind one layer."""
    site = sf.Site("resid_post", layer)
    one = sf.Direction(vector, site=site, name="refusal direction")
    return sf.Clamp(one, add=float(vector.norm()))


def sweep_layers(lab: Lab) -> dict[str, Any]:
    """Directions of all layers, what ablating each does on val, and the best layer l*.

    The best layer jailbreaks most; ties go to the larger mean log-odds of an answer. Where the
    settings name a layer there is nothing to choose, and only its row is made.

    Returns:
        Plain data with ``directions``, ``rows`` and ``best``.
    """
    sets = lab.sets
    found = lab.stage(
        "directions",
        None,
        lambda: difference_of_means(lab, sets.harmful_train, sets.harmless_train),
    )
    one = lab.settings.layer
    rows = [
        lab.stage(
            f"layers/{layer}", found, lambda n=layer: _layer_row(lab, n, torch.tensor(found[n]))
        )
        for layer in lab.progress(range(len(found)) if one is None else [one], "layer sweep")
    ]
    best = max(rows, key=lambda row: (row["complied"], row["odds"]))["layer"]
    return {"directions": found, "rows": rows, "best": best}


def _layer_row(lab: Lab, layer: int, vector: Tensor) -> dict[str, Any]:
    edit = steering(lab, vector)
    odds = lab.mean_odds(lab.sets.harmful_val, edit)
    outcome = lab.outcomes(lab.sets.harmful_val, edit)
    return {"layer": layer, "norm": float(vector.norm()), "odds": odds, **outcome}


def layer_table(found: dict[str, Any]) -> Table:
    """The sweep, one row a layer."""
    rows = found["rows"]
    return table(
        "1. Which layer's refusal direction counts",
        f"Each layer's difference of means (harmful minus harmless) is removed at all layers and "
        f"tokens while the model answers {rows[0]['n']} harmful val prompts. More complied is a "
        f"stronger effect; broken answers are neither. {_chosen(rows, found['best'])}, gives the "
        f"direction V* of everything below.",
        (
            "layer",
            "norm of V",
            "refused",
            "complied",
            "broken",
            "jailbreak rate [95 %]",
            "log-odds",
        ),
        [
            (
                f"{row['layer']}{' *' if row['layer'] == found['best'] else ''}",
                row["norm"],
                *(row[name] for name in OUTCOMES),
                Estimate(**row["jailbreak"]),
                row["odds"],
            )
            for row in rows
        ],
    )


def _chosen(rows: list[dict[str, Any]], best: int) -> str:
    """How l* came about."""
    return f"The best layer, l* = {best}" if len(rows) > 1 else f"The layer that was given, {best}"
