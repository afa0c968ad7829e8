"""Ways of running an intervention.

* ``run``: prompts in; text, tokens, readings and a receipt out.
* ``sweep``: many interventions on the same prompts.
* ``attached``: ``edit`` and ``hooked``, an intervention that stays on a model.
* ``hooks``: what ``hooked`` puts on a Hugging Face module; ``virtual`` refuses tokens that are no
  text's own.
"""
