"""The released NDIF server on this machine's loopback, without a GPU, for the tests in tests/ndif.

Redis, moto as the object store, Ray with one pretended GPU, the controller, the API and the model
actors are those of the package index, in an environment of their own (``make ndif`` makes it from
requirements.txt). Of the actors only loading and CUDA's synchronization are replaced.

* ``stack``: starts all of it, waits until it answers, deploys models, stops it.
* ``deployments``: a model's folder, its dtype, and how the server runs blocks on it.
* ``redis``: where redis-server comes from.
* ``reaper``: ends what was started, whatever became of the process that started it.
* ``space``: a network namespace, so that nothing listens on the machine's own addresses.
* ``relay``: passes connections on to the API, and breaks them on demand.
* ``far``: what the server's processes import.
* ``__main__``: ``python -m tools.ndif`` leaves a stack up until Ctrl-C.
"""
