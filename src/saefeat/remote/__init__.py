"""Runs on a server: NDIF, or any that follows its protocol.

* ``batch``: what one batch sends, and saves there.
* ``request``: a run's batches as requests; ``call``: ``submit``'s arguments.
* ``validate``: what came back, held against what was asked.
* ``jobs``, ``jobfile``, ``saved``, ``submit``: jobs that can be polled and taken up from files.
* ``scheduler``: several jobs under one limit.
* ``preflight``, ``dry_run``, ``expected``: what a request weighs and does, before it is sent.
"""

from ..shipping.server import Server
from .jobs import Job
from .preflight import Preflight, preflight
from .submit import submit

__all__ = [
    "Job",
    "Preflight",
    "Server",
    "preflight",
    "submit",
]
