"""saefeat: attribute, ablate, clamp and probe SAE latents inside nnsight.

>>> import saefeat as sf
>>> sf.Site.parse("blocks.3.hook_resid_post")
Site(kind='resid_post', layer=3)
"""

from .attribution import Attribution
from .controls import matched, random_directions
from .dictionaries.base import Dictionaries, Dictionary
from .dictionaries.direction import Direction, Neurons, direction
from .dictionaries.generic import Generic
from .dictionaries.sae import SAE, ErrorTerm
from .errors import (
    DictionaryError,
    FiringError,
    GradientError,
    LatentError,
    ModelError,
    PromptError,
    SaefeatError,
    SiteError,
)
from .evaluate import continuation_loss
from .execution.edit import edit
from .execution.hooked import hooked
from .execution.run import Run, run
from .execution.wrap import wrap
from .latents import Latents, stack
from .loading import from_sae_lens, load_sae, load_saes
from .prompts import encode_prompts
from .records import Fired, Provenance, Readings, Receipt, versions
from .sites import Site
from .tokens import Tokens
from .verbs.attribute import Attribute
from .verbs.base import Chain, Intervention
from .verbs.edits import Ablate, Clamp
from .verbs.methods import IG, AtP, Method
from .verbs.metrics import BASELINE_TOP, Metric, logit, logit_diff, metric
from .verbs.probe import Probe
from .verbs.steps import When
from .verify import Check, Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "AtP",
    "Attribute",
    "Attribution",
    "BASELINE_TOP",
    "Chain",
    "Check",
    "Clamp",
    "Dictionaries",
    "Dictionary",
    "DictionaryError",
    "Direction",
    "ErrorTerm",
    "Fired",
    "FiringError",
    "Generic",
    "GradientError",
    "IG",
    "Intervention",
    "LatentError",
    "Latents",
    "Method",
    "Metric",
    "ModelError",
    "Neurons",
    "Probe",
    "PromptError",
    "Provenance",
    "Readings",
    "Receipt",
    "Run",
    "SAE",
    "SaefeatError",
    "Site",
    "SiteError",
    "Tokens",
    "Verification",
    "When",
    "continuation_loss",
    "direction",
    "edit",
    "encode_prompts",
    "from_sae_lens",
    "hooked",
    "load_sae",
    "load_saes",
    "logit",
    "logit_diff",
    "matched",
    "metric",
    "random_directions",
    "run",
    "stack",
    "verify",
    "versions",
    "wrap",
]
