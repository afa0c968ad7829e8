"""How tokens are generated, and what one batch of it gives.

* ``decoding``: greedy, sampled or beam search; stop tokens.
* ``batch``: one batch through a model here.
* ``result``: ``Run``, the result of one batch or of many.
"""
