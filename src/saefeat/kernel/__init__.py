"""The kernel: pure tensor functions, and the thin shell that applies them in a trace.

This package is the only code that travels to a server, so it imports torch and nnsight alone
and works on plain dictionaries of tensors: no class of ours ever has to exist over there.
Annotations are strings and are never evaluated when the code runs.

* ``encode``: latents of a site's value from the selected encoder columns.
* ``prefix``: the same for latents that depend on every earlier token.
* ``edit``: f → f', and the site's new value.
* ``values``: what a value is at each token, where it is no plain number.
* ``tokens``: which positions a rule selects, counted through the attention mask.
* ``draws``: samples from a seed.
* ``program``: one site visit: read, edit, write, record.
* ``trace``: the same inside an nnsight block, for one forward pass or for all of them.
"""
