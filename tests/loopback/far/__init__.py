"""What runs in the server's own processes, where nothing of ours is installed.

They are isolated interpreters that know these few modules as a package of their own name, and that
cannot import saefeat; so the modules import the standard library, torch, nnsight and transformers.

* ``start``: how such a process begins, and when it ends.
* ``worker``: the process with the model; it takes jobs and answers them.
* ``job``: one request, run on a model, or on the skeleton of one.
* ``guest`` and ``host``: a block in a process of its own, and the model's side of it.
* ``pipe``: what they say to each other.
"""
