"""Dictionaries: do they fit this model at all? Asked before anything is believed of them."""

from __future__ import annotations

from typing import Any

import saefeat as sf

from .data import chats
from .lab import Lab
from .tables import Table, table

PROMPTS = 32
"""Prompts the dictionaries are tried on."""


def check_dictionaries(lab: Lab) -> dict[str, Any]:
    """How well each dictionary explains its site, and which neighbor it would fit better.

    Returns:
        Plain data: ``tokens`` and one row a dictionary.
    """
    return lab.stage("dictionaries", None, lambda: _checked(lab))


def _checked(lab: Lab) -> dict[str, Any]:
    half = PROMPTS // 2
    prompts = chats((*lab.sets.harmful_train[:half], *lab.sets.harmless_train[:half]))
    found = sf.verify(lab.model, lab.saes, prompts, strict=False)
    rows = [
        {
            "site": str(one.site),
            "name": one.name,
            "fvu": one.fvu,
            "l0": one.l0,
            "best": str(one.best),
            "right": one.right,
        }
        for one in found.checks
    ]
    return {"tokens": found.tokens, "rows": rows}


def dictionary_table(found: dict[str, Any]) -> Table:
    """One row a dictionary."""
    return table(
        "0. Do the dictionaries fit the model?",
        f"On {found['tokens']} tokens of train prompts: the fraction of variance each SAE leaves "
        f"unexplained (FVU, lower is better) and how many latents are active a token (L0). The "
        f"best site is where it would fit best; a dictionary that belongs elsewhere does not fit.",
        ("site", "dictionary", "FVU", "L0", "best site", "fits"),
        [
            (row["site"], row["name"], row["fvu"], row["l0"], row["best"], row["right"])
            for row in found["rows"]
        ],
    )
