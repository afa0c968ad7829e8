"""Loading dictionaries: folders in the field's layouts, sae-lens's releases, sae-lens objects.

One module a layout, each saying what its files declare and where the tensors lie in them; the
rest plans (``directory``, ``entries``), fetches (``hub``) and reads on first use (``released``).
sae-lens takes seconds and hundreds of megabytes to import, so it is imported only to convert a
release of pickles, and nowhere else.
"""

from .api import load_sae, load_saes
from .declaration import Origin

__all__ = ["Origin", "load_sae", "load_saes"]
