"""Models and the places in them.

* ``families``: how each model family names its modules, one entry a family.
* ``sites``: a ``Site`` by name, and the ``Place`` in a module tree that it stands for.
* ``heads``: which columns of a value are one head's, or a joint projection's queries.
* ``modules``: a model's own modules: its family, and where a site lies in it.
* ``wrappers``: the language model inside a PEFT model, and what its calls begin with.
* ``route``: the order in which a forward pass reaches sites.
* ``alone``: one run of a model at a time.
* ``sharded``: tensor-parallel models.
* ``requests``: how an object is pickled for a remote request.
"""
