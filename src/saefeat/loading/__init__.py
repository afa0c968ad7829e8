"""Loading dictionaries: folders in the field's layouts, sae-lens's releases, sae-lens objects.

* ``api``: ``load_sae`` and ``load_saes``.
* ``layouts``: which layout a folder is in. ``native``, ``dictionary_learning``, ``gemma_scope``,
  ``llama_scope``, ``sparsify`` and ``transcoders`` are one each, and say what its files declare and
  where the tensors lie in them.
* ``clt``: cross-layer transcoders, a dictionary a layer in one folder.
* ``own``: a layout of the user's, by two functions.
* ``keys``: which keys of a configuration are known.
* ``declaration``: what a folder declares, and the SAE made from it.
* ``whole``: SAEs of which no latent can be computed alone.
* ``directory``, ``released``: the SAEs of a release, chosen before any is read, and read on first
  use.

sae-lens takes seconds and hundreds of megabytes to import, so it is imported only to convert a
release of pickles, and nowhere else.
"""

from .api import load_sae, load_saes
from .declaration import Origin

__all__ = ["Origin", "load_sae", "load_saes"]
