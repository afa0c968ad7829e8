"""Execution: the ways of running an intervention, all with one meaning.

* ``edit``: an edited copy of an nnsight model.
* ``run``: one call, prompts in, text and readings out.
* ``hooked``: the same on a plain Hugging Face model.
"""
