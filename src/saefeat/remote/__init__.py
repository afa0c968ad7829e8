"""Runs on a server: NDIF, or any that follows its protocol.

* ``batch``: what one batch sends and saves there, and what came back, held against what was asked.
* ``jobs``, ``jobfile``: jobs that can be polled, and taken up again from their files.
* ``scheduler``: several jobs under one limit.
* ``preflight``, ``dry_run``: what a request weighs and does, before it is sent.
"""

from ..shipping.server import Server
from .jobs import Job, submit
from .preflight import Preflight, preflight

__all__ = [
    "Job",
    "Preflight",
    "Server",
    "preflight",
    "submit",
]
