"""What a run gives back.

* ``run``: ``Run``, all of the following in one.
* ``readings``: the activations a probe read.
* ``receipt``: what each edit did, counted and token by token.
* ``provenance``: what a result depends on, and what tells two jobs apart.
* ``result``: what all results share: a page in notebooks, and what ``save`` means.
* ``outliers``: tokens whose values dwarf those of all others.
* ``formats``: results as pages, tables and figures.
"""

from .formats import render
from .outliers import outliers
from .provenance import Provenance, versions
from .readings import Readings
from .receipt import Receipt
from .run import Run

__all__ = [
    "Provenance",
    "Readings",
    "Receipt",
    "Run",
    "outliers",
    "render",
    "versions",
]
