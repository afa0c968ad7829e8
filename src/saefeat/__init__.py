"""saefeat: attribute, ablate, clamp and probe SAE latents inside nnsight.

The names here are what most work needs; the rest stands in public submodules: ``attribution``,
``metrics``, ``validation``, ``controls``, ``values``, ``generation``, ``dictionaries``,
``results``, ``remote``, ``hub``, ``verification`` and ``errors``.

>>> import saefeat as sf
>>> sf.Site.parse("blocks.3.hook_resid_post")
Site(kind='resid_post', layer=3)
"""

from . import (  # noqa: F401 (public submodules)
    attribution,
    controls,
    dictionaries,
    errors,
    generation,
    hub,
    metrics,
    remote,
    results,
    validation,
    values,
    verification,
)
from .attribution.attribute import Attribute
from .attribution.methods import IG
from .dictionaries.direction import Direction, Neurons
from .dictionaries.latents import Latents
from .dictionaries.sae import SAE
from .errors import SaefeatError
from .hub.files import load, save
from .loading.api import load_sae, load_saes
from .metrics.logits import logit_diff
from .model.sites import Site
from .running.attached import edit, hooked
from .running.run import run
from .running.sweep import sweep
from .text.tokens import Tokens
from .validation.audit import audit
from .verbs.base import Intervention
from .verbs.edits import Ablate, Clamp
from .verbs.probe import Probe
from .verbs.when import When
from .verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "Attribute",
    "Clamp",
    "Direction",
    "IG",
    "Intervention",
    "Latents",
    "Neurons",
    "Probe",
    "SAE",
    "SaefeatError",
    "Site",
    "Tokens",
    "When",
    "audit",
    "edit",
    "hooked",
    "load",
    "load_sae",
    "load_saes",
    "logit_diff",
    "run",
    "save",
    "sweep",
    "verify",
]
