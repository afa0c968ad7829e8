"""Models and the places in them.

* ``families``: the blocks of each model family, and its table of sites, one line a family.
* ``tables``: where each kind of site lies in a block, one table for all that are built alike.
* ``outside_blocks``: the sites that have no layer: embedding, last norm, logits.
* ``sites``: a ``Site`` by name, and the ``Place`` in a module tree that it stands for.
* ``inferred``: tables of models of an unknown type, found by running them.
* ``aside``: a model's own hooks, put aside while it is tried out.
* ``heads``: which columns of a value are one head's, or a joint projection's queries.
* ``modules``: a model's own modules: its family, and where a site lies in it.
* ``wrappers``: the language model inside a PEFT model, and what its calls begin with.
* ``route``: the order in which a forward pass reaches sites.
* ``alone``: one run of a model at a time.
* ``sharded``: tensor-parallel models.
* ``requests``: how an object is pickled for a remote request.
"""
