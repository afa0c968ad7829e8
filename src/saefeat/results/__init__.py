"""What a run gives back.

* ``run``: ``Run``, all of the following in one.
* ``readings``: the activations a probe read.
* ``receipt``, ``events``: what each edit did, counted and token by token.
* ``provenance``: versions, model, dictionaries and settings a result depends on.
"""

from .events import Events
from .provenance import Provenance, versions
from .readings import Readings
from .receipt import Fired, Receipt
from .run import Run

__all__ = [
    "Events",
    "Fired",
    "Provenance",
    "Readings",
    "Receipt",
    "Run",
    "versions",
]
