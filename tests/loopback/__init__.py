"""NDIF's released server code on this machine, with nothing of ours installed there.

It is for checking one's own code before it queues, and the library's tests run against it.

* ``serve``: the server for as long as a ``with`` block lasts.
* ``server``: jobs, from the queue to their results, on 127.0.0.1.
* ``wire``: the endpoints, HTTP and a websocket.
* ``process``: the interpreter in which jobs run, and ``far``, what runs in it.
"""

from .serve import serve
from .server import Server

__all__ = ["Server", "serve"]
