"""Verbs: what one can do with latents.

* ``steps``: what a step says of itself: its latents, how they change, where, on what condition.
* ``when``: conditions.
* ``base``: what an intervention is, composition with ``|``, and use inside a trace.
* ``edits``: ``Ablate`` and ``Clamp``.
* ``probe``: ``Probe``, the reader.
* ``forms``: what an edit reads and writes.
* ``reach``: whether a model reaches a dictionary's sites in an order that serves.
* ``lower``: verbs made into the kernel's program for one model.
* ``gaps``: tokens of the prompts that a patch has no value for.
* ``placement``: several programs side by side in one batch.
"""
