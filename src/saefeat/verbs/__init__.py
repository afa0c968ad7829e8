"""Verbs: what one can do with latents.

* ``values``: what an edit sets latents to, where that depends on the token.
* ``steps``: the plain values a step is made of: a change, a condition.
* ``base``: what an intervention is, composition with ``|``, and use inside a trace.
* ``edits``: ``Ablate`` and ``Clamp``.
* ``probe``: ``Probe``, the reader.
* ``forms``: what an edit reads and writes.
* ``lower``: verbs made into the kernel's plain program for one model.
* ``beside``: several programs side by side in one batch.
* ``travel``: a program as a request carries it.
"""
