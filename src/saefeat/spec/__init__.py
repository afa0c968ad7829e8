"""Interventions as files: one safetensors file with a JSON document, no code in it.

* ``forms``: what may be in a file: classes by name, the kinds of value each field may hold.
* ``write``, ``read``: interventions to a document with tensors, and back.
* ``files``: ``save`` and ``load``.
* ``hub``, ``card``: the same to and from the Hugging Face Hub.
* ``vectors``: an intervention as plain steering vectors, where that is exact.

The format is specified in docs/guide/portable.md.
"""
