"""Remote: runs on a server that has nothing but torch and nnsight.

* ``batch``: one batch as one request; ``checked``: what came back, held against it.
* ``preflight``: what a request holds and what would fail, before it is queued: ``dry`` tries it on
  fake tensors, ``firings`` counts the tokens it will act on.
* ``submit``: a run as jobs; ``post`` is what they do, ``jobs`` sends and polls them.
* ``jobfile`` keeps a job and what it was asked, ``arrived`` what has come back.
"""
