"""How tokens are generated, and what one batch of it gives.

* ``decode``: ``Greedy``, ``Sample`` and ``Beams``, what ``decode=`` takes.
* ``decoding``: the same with the model's own settings, checked; stop tokens and seeds.
* ``batch``: one batch through a model here.
* ``result``: one batch as a result, and many of them joined.
"""

from .decode import Beams, Greedy, Sample

__all__ = ["Beams", "Greedy", "Sample"]
