"""What runs in the server's own processes, where nothing of ours is installed.

They are interpreters that know these few modules as a package of their own name, and that cannot
import saefeat; so the modules import the standard library, torch, nnsight, transformers and ndif,
which is NDIF's own server as released: that is what runs the requests.

* ``start``: how such a process begins, and when it ends.
* ``worker``: the process with the model; it takes jobs and answers them.
* ``deployment``: the released deployment of a model, and what differs here.
* ``services``: stand-ins for the services that it talks to.
* ``runner``: how the process of a sandboxed block begins, which is released too.
"""
