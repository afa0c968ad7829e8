"""Controls: what a finding about latents or directions has to beat.

* ``matched``: latents like those selected, in decoder norm and firing.
* ``directions``: the same latents writing along random directions.
"""

from .draws import matched, random_directions

__all__ = [
    "matched",
    "random_directions",
]
