"""Controls: what a finding about latents or directions has to beat.

* ``matched``: latents like those selected, in decoder norm and firing.
* ``directions``: the same latents writing along random directions.
"""

from .directions import random_directions
from .matched import matched

__all__ = [
    "matched",
    "random_directions",
]
