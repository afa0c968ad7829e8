"""Dictionaries of latents: SAEs, transcoders, directions, neurons, functions.

* ``latents``: what a dictionary must offer, and ``Latents``, a selection.
* ``base``: ``Dictionaries``, one a site.
* ``sae``, ``direction``, ``function``, ``excerpt``: the kinds.
* ``weights``, ``npz``: tensors in memory or on disk, read a slice at a time.
* ``contract``: ``check_dictionary``, which holds your own dictionary against what is promised.
"""

from .base import Dictionaries
from .contract import check_dictionary
from .direction import Direction, Neurons
from .function import Function
from .latents import Dictionary, Latents
from .sae import SAE, ErrorTerm

__all__ = [
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
