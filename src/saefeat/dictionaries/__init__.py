"""Dictionaries of latents: SAEs, transcoders, directions, neurons, functions.

* ``latents``: what a dictionary must offer, and ``Latents``, a selection.
* ``given``: what stands for latents where they are an argument.
* ``twins``: when two dictionaries are one, loaded or made twice.
* ``by_site``: ``Dictionaries``, one dictionary a site.
* ``sae``, ``cross_layer``, ``direction`` (with neurons and functions), ``excerpt``: the kinds.
* ``places``: dictionaries that read or write at several sites, where one is wanted.
* ``finite``: numbers that are no numbers, refused when they are read.
* ``exclusion``: which tokens a dictionary was not trained on.
* ``weights``: tensors in memory or on disk, read a slice at a time.
* ``derived``: an SAE's first latents, or its latents in units of their directions' lengths.
* ``planes``: the decoders of several sites in one tensor.
* ``contract``: ``check_dictionary``, which holds your own dictionary against what is promised.
"""

from .by_site import Dictionaries
from .contract import check_dictionary
from .cross_layer import CrossLayer
from .direction import Direction, Function, Neurons
from .latents import Dictionary, Latents
from .sae import SAE, ErrorTerm

__all__ = [
    "CrossLayer",
    "Dictionaries",
    "Dictionary",
    "Direction",
    "ErrorTerm",
    "Function",
    "Latents",
    "Neurons",
    "SAE",
    "check_dictionary",
]
