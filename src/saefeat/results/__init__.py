"""What a run gives back.

* ``run``: ``Run``, all of the following in one.
* ``readings``: the activations a probe read.
* ``receipt``, ``events``: what each edit did, counted and token by token.
* ``identity``: what of a model a result depends on, so that two jobs are told apart.
* ``provenance``: versions, model, dictionaries and settings a result depends on.
* ``html``, ``table``: results as pages and as pandas tables.
"""

from .formats import render
from .provenance import Provenance, versions
from .readings import Readings
from .receipt import Receipt
from .run import Run

__all__ = [
    "Provenance",
    "Readings",
    "Receipt",
    "Run",
    "render",
    "versions",
]
