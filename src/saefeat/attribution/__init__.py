"""Attribution: which latents carry a metric, at the price of the bare model's passes.

* ``attribute``: ``Attribute``, what it refuses, its loop over batches, and batches kept and joined.
* ``methods``, ``baselines``, ``semantics``, ``relp``, ``graddrop``: what can be chosen.
* ``passes``: what is asked, the sites watched in a model, and passes past them; ``remote_passes``
  are those on a server, ``waiting`` for each up to a limit. ``crossing`` refuses modules that
  gradients do not cross.
* ``path``: one batch's path from clean to baseline, and gradients on it.
* ``integrate``: gradients averaged over the path, at given nodes or at ``adaptive`` ones; rules
  are in ``quadrature``. ``trail`` is what the nodes showed, ``convergence`` what it comes to.
* ``pairs``: the latents that move, and their scores.
* ``exact``: scores by moving latents for real.
* ``in_trace``: attribution inside a trace of the user's own.
* ``scores``: ``Attribution``, the result: ``columns``, and ``show``, ``plots`` and ``file``, which
  take columns.
"""

from ..text.texts import Texts
from .attribute import Attribute
from .baselines import Fixed, Paired
from .convergence import Convergence
from .graddrop import GradDrop
from .methods import IG, AtP, Backward, Exact, FiniteDifference, Method
from .relp import RelP
from .scores import Attribution

__all__ = [
    "AtP",
    "Attribute",
    "Attribution",
    "Backward",
    "Convergence",
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
