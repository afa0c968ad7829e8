"""Dictionaries: in what basis a site is read.

* ``base``: what every dictionary is, and the mapping Site → Dictionary.
* ``direction``: one vector, or several, as a dictionary with identity activation.
* ``sae``: sparse autoencoders and transcoders from weights.
* ``weights``: where an SAE's tensors come from, memory or a file read lazily.
"""
