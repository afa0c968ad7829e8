"""Runs on a server: NDIF, or any that follows its protocol.

* ``batch``: what one batch sends and saves there, and what came back, held against what was asked.
* ``submit``: a run that is left with a server; ``jobs``, ``jobfile``: what it is then, to be
  polled, and taken up again from its files.
* ``polling``: how a server is asked again.
* ``flight``: which requests of a checkpointed call are under way.
* ``named``: the name by which a server knows a model that the Hub does not list.
* ``scheduler``: several jobs under one limit.
* ``preflight``, ``dry_run``: what a request weighs and does, before it is sent; ``asked`` is what
  a server says of itself.
"""

from ..shipping.server import Server
from .jobs import Job
from .named import named
from .preflight import Preflight, preflight
from .submit import submit

__all__ = [
    "Job",
    "Preflight",
    "Server",
    "named",
    "preflight",
    "submit",
]
