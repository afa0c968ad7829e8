"""Random cases, run by saefeat in some way and by plain hooks without a cache, and compared.

* ``cases``: what a case is, as plain data. Its repr is the call that makes it again.
* ``draw``: a case from a seed.
* ``weights``: the numbers of a case's models and dictionaries, for both sides.
* ``places``: the oracle's own table of where sites lie.
* ``rules``: which tokens a rule selects, by position in one unpadded text.
* ``formulas``: dictionaries by their textbook formulas, from the raw weights.
* ``hand``: one case's steps as plain hooks on full sequences.
* ``oracle``: every prompt on its own, unpadded, the whole text anew at each new token.
* ``ours``: the case as objects of saefeat.
* ``ways``: the ways of running them.
* ``compare``: what of the two differs.
* ``shrink``: a smaller case that still differs.
* ``asked``: an attribution that is asked for, as plain data, and one from a seed.
* ``slopes``: its scores by finite differences in float64.
* ``scored``: the same by saefeat, and what differs.

The oracle imports nothing of saefeat: a mistake there cannot hide in its own oracle.
"""
