"""Samples from a seed on a server: the model draws them, and the block sets the seed.

Whether the two share a generator shows in its state: a model that sampled has moved it on.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import SaefeatError

APART = "saefeat: the model drew no sample from the generators of this block"


def generators() -> list[Any]:
    """The state of every generator that a model may draw from."""
    found = [torch.get_rng_state()]
    return found + (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def seeded(seed: int | None) -> dict[str, Any] | None:
    """Seed every generator; what is needed to check that and to put them back."""
    if seed is None:
        return None
    before = generators()
    torch.manual_seed(seed)
    return {"before": before, "seeded": generators()}


def require_drawn(held: dict[str, Any] | None) -> None:
    """Put generators back, and refuse a sample that did not come from the seed."""
    if held is None:
        return
    moved = [not torch.equal(a, b) for a, b in zip(held["seeded"], generators(), strict=True)]
    cpu, *others = held["before"]
    torch.set_rng_state(cpu)
    if others:
        torch.cuda.set_rng_state_all(others)
    if not any(moved):
        raise SaefeatError(
            f"{APART}, so the seed had no effect and nobody could draw this sample again. Likely"
            " cause: a server that runs blocks in a process of their own. Try: greedy decoding."
        )
