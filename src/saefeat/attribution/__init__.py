"""Attribution: which latents carry a metric, at the price of the bare model's passes.

* ``attribute``: ``Attribute``, and its loop over batches; ``job``, its settings as plain values.
* ``prepare``: what is asked, checked; ``batch``, one batch; ``pieces``, batches kept and joined.
* ``passes``: the sites watched in a model, and the passes made there.
* ``methods``, ``baselines``, ``semantics``, ``backward``: what can be chosen.
* ``endpoint``, ``path``: where a path ends, and gradients along it.
* ``pairs``, ``readout``: the latents that move, and their scores.
* ``exact``: scores by moving latents for real.
* ``in_trace``: attribution inside a trace of the user's own.
* ``scores``: ``Attribution``, the result: ``columns``, and below it ``totals``, ``show``, ``plots``
  and ``file``, which take columns.
"""

from ..text.texts import Texts
from .attribute import Attribute
from .backward import Backward
from .baselines import Fixed, Paired
from .graddrop import GradDrop
from .methods import IG, AtP, Exact, FiniteDifference, Method
from .relp import RelP
from .scores import Attribution

__all__ = [
    "AtP",
    "Attribute",
    "Attribution",
    "Backward",
    "Exact",
    "FiniteDifference",
    "Fixed",
    "GradDrop",
    "IG",
    "Method",
    "Paired",
    "RelP",
    "Texts",
]
