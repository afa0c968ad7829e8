"""Execution: the ways of running an intervention, all with one meaning.

* ``edit``: an edited copy of an nnsight model.
* ``run``: one call, prompts in, text and readings out; ``decoding`` is how, ``result`` what.
* ``sweep``: many interventions on the same prompts.
* ``hooked``: the same on a plain Hugging Face model.
* ``wrap``: a module in memory as an nnsight model.
"""
