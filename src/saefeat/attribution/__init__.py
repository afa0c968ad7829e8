"""Attribution: which latents carry a metric, from the bare model's own passes.

What is asked:

* ``attribute``: the verb; ``inside`` is the same in a trace of one's own.
* ``metrics``, ``measuring``: what to explain; ``measure`` reads it off a run.
* ``methods``: where along the path; ``exact`` without gradients.
* ``baselines``: what latents are moved to.
* ``semantics``, ``backward``: how gradients pass a site, and the model's own modules (``relp``,
  ``graddrop``).

How it is done:

* ``prepare``: checks that need no run, and the prompts in batches.
* ``watch``: the places looked at, and the passes made there; ``afar`` makes them on a server.
* ``ends``, ``path``: the baseline of a batch, and the gradients on the way to it.
* ``score``, ``one_batch``: gradients read through the dictionary, and a batch from first to last.
* ``resume``: finished batches of a job.

What comes out:

* ``record``: the sparse result; ``join`` makes one of batches; ``texts`` is its tokens, ``totals``
  its sums, ``file`` its file.
* ``show``, ``plots``: a screen, a page, a table, pictures.
"""
