"""Part: one dictionary's share of an attribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..dictionaries.latents import Dictionary
from ..kernel.read import Norm


class Part(NamedTuple):
    """One dictionary's latents, and the numbers of the places it reads and writes."""

    dictionary: Dictionary
    indices: Sequence[int]
    read: int
    write: int
    norm: Norm
