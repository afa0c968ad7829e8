"""Remote: runs on a server that has nothing but torch and nnsight.

* ``batch``: one batch as one request.
* ``preflight``: what a request holds and what would fail, before it is queued.
* ``submit``: a run as jobs; ``jobs`` sends and polls them, ``jobfile`` keeps their state.
"""
