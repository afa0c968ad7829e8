"""How tokens are generated, and what one batch of it gives.

* ``decoding``: ``Greedy``, ``Sample`` and ``Beams``, what ``decode=`` takes, checked and with the
  model's own settings.
* ``task``: what a run does with each batch; one batch through the model here, and its result.
"""

from .decoding import Beams, Greedy, Sample

__all__ = ["Beams", "Greedy", "Sample"]
