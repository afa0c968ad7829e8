"""Validation: what is needed before an attribution is believed.

* ``audit``: exact ablations over the top and a random tail.
* ``stability``: does the top set survive other prompts?
* ``faithfulness``: curves over set size, with controls.
* ``sets``: ``minimal_set`` and ``interactions``: what is left when nothing more can go, and how it
  combines.
* ``edges``: which latents drive which, through the bare model; ``jacobian``, their gradients.
* ``made``: whether scores are what an attribute makes.
* ``experiment``, ``ranking``, ``stats``: a metric under many edits, latents in order with sets
  drawn as controls, and the statistics of samples.
"""

from .audit import Audit, audit
from .edges import Edges, edges
from .faithfulness import Faithfulness, faithfulness
from .sets import Interactions, MinimalSet, interactions, minimal_set
from .stability import Stability, stability

__all__ = [
    "Audit",
    "Edges",
    "Faithfulness",
    "Interactions",
    "MinimalSet",
    "Stability",
    "audit",
    "edges",
    "faithfulness",
    "interactions",
    "minimal_set",
    "stability",
]
