"""A server on this machine that runs requests as NDIF does, with nothing of ours installed there.

It is for checking one's own code before it queues, and the library's tests run against it.

* ``server``: nnsight's protocol, HTTP and a websocket, on 127.0.0.1.
* ``process`` and ``worker``: the interpreter in which jobs run.
* ``wire``: frames and forms.
"""

from .server import Server, serve

__all__ = ["Server", "serve"]
