"""Controls: what a finding about latents or directions has to beat.

``draws`` has both:

* ``matched``: latents like those selected, in decoder norm and firing.
* ``random_directions``: the same latents writing along random directions.
"""

from .draws import matched, random_directions

__all__ = [
    "matched",
    "random_directions",
]
