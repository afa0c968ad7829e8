"""An intervention as a file, and on the Hugging Face Hub.

* ``fields``: what stands in a file for each verb, value and condition.
* ``write``, ``read``: the two directions, without trusting what is read.
* ``files``: ``save`` and ``load``.
* ``repository``: ``push`` and ``pull``, and the card beside the file.
* ``vectors``: an intervention as a steering vector, where that is exact.
"""

from .files import load, save
from .repository import pull, push
from .vectors import steering_vector

__all__ = [
    "load",
    "pull",
    "push",
    "save",
    "steering_vector",
]
