"""Belief: what is needed before an attribution is believed.

* ``audit``: exact ablations over the top and a random tail.
* ``stability``: does the top set survive other prompts?
* ``faithfulness``: curves over set size, with controls.
* ``minimal_set`` and ``interactions``: what is left when nothing more can go, and how it combines.
* ``edges``: which latents drive which, through the bare model.
"""
