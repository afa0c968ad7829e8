"""The kernel: pure tensor functions, and the thin shell that applies them in a trace.

This package is the only code that travels to a server, so it imports torch and nnsight alone, and
everything in it is sent as its source: a request names no class that has to exist over there.
Annotations are strings and are never evaluated when the code runs.

* ``errors``: the base of all errors.
* ``frozen``: typed values that travel, and their tensors where they are used.
* ``state``: what one forward pass shows and has read, and what a run remembers and records.
* ``sequences``: which sequence a forward pass belongs to, by its key-value cache.
* ``tokens``: which positions a rule selects, counted through the attention mask.
* ``encode``: latents of a site's value from the selected encoder columns.
* ``prefix``: the same for latents that depend on every earlier token.
* ``values``: what a value is at each token, where it is no plain number.
* ``read``, ``edit``, ``watch``, ``split``: the actions, each with one method, ``apply``: latents
  read, latents edited, values watched, and several programs in one pass, each for its rows.
* ``spread``: the same for dictionaries that read or write at several sites.
* ``beams``: what an action remembers of a row, where beam search moves rows.
* ``program``: visits and their actions, applied in an nnsight block to every forward pass.
* ``pack``, ``slopes``: what leaves a server.
* ``draws``: samples from a seed.
"""
