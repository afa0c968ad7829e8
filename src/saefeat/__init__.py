"""saefeat: attribute, ablate, clamp and probe SAE latents inside nnsight.

>>> import saefeat as sf
>>> sf.Site.parse("blocks.3.hook_resid_post")
Site(kind='resid_post', layer=3)
"""

from .attribution import Attribution
from .belief.audit import Audit, audit
from .belief.curves import Faithfulness
from .belief.edges import Edges, edges
from .belief.faithfulness import faithfulness
from .belief.interactions import Interactions, interactions
from .belief.minimal import MinimalSet, minimal_set
from .belief.stability import Stability, stability
from .dictionaries.base import Dictionaries, Dictionary
from .dictionaries.direction import Direction, Neurons, direction
from .dictionaries.excerpt import Excerpt
from .dictionaries.generic import Generic
from .dictionaries.sae import SAE, ErrorTerm
from .errors import (
    CheckpointError,
    DictionaryError,
    FileError,
    FiringError,
    GradientError,
    LatentError,
    ModelError,
    PromptError,
    RemoteError,
    SaefeatError,
    SiteError,
)
from .evaluate import continuation_loss
from .events import Events
from .execution.edit import edit
from .execution.hooked import hooked
from .execution.jobs import Job
from .execution.preflight import Preflight, preflight
from .execution.result import Run
from .execution.run import run, stream
from .execution.submit import submit
from .execution.sweep import sweep
from .execution.wrap import wrap
from .latents import Latents, stack
from .loading import from_sae_lens, load_sae, load_saes
from .loopback import Server, serve
from .prompts import encode_prompts
from .records import Fired, Provenance, Readings, Receipt, versions
from .sites import Site
from .spec.files import load, save
from .spec.hub import pull, push
from .spec.vectors import steering_vector
from .tokens import Tokens
from .verbs.attribute import Attribute
from .verbs.base import Chain, Intervention
from .verbs.edits import Ablate, Clamp
from .verbs.methods import IG, AtP, Method
from .verbs.metrics import BASELINE_TOP, Metric, logit, logit_diff, metric
from .verbs.probe import Probe
from .verbs.steps import When
from .verbs.values import Pin, Resample, Schedule
from .verify import Check, Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "AtP",
    "Attribute",
    "Attribution",
    "Audit",
    "BASELINE_TOP",
    "Chain",
    "Check",
    "CheckpointError",
    "Clamp",
    "Dictionaries",
    "Dictionary",
    "DictionaryError",
    "Direction",
    "Edges",
    "ErrorTerm",
    "Events",
    "Excerpt",
    "Faithfulness",
    "FileError",
    "Fired",
    "FiringError",
    "Generic",
    "GradientError",
    "IG",
    "Interactions",
    "Intervention",
    "Job",
    "LatentError",
    "Latents",
    "Method",
    "Metric",
    "MinimalSet",
    "ModelError",
    "Neurons",
    "Pin",
    "Preflight",
    "Probe",
    "PromptError",
    "Provenance",
    "Readings",
    "Receipt",
    "RemoteError",
    "Resample",
    "Run",
    "SAE",
    "SaefeatError",
    "Schedule",
    "Server",
    "Site",
    "SiteError",
    "Stability",
    "Tokens",
    "Verification",
    "When",
    "audit",
    "continuation_loss",
    "direction",
    "edges",
    "edit",
    "encode_prompts",
    "faithfulness",
    "from_sae_lens",
    "hooked",
    "interactions",
    "load",
    "load_sae",
    "load_saes",
    "logit",
    "logit_diff",
    "metric",
    "minimal_set",
    "preflight",
    "pull",
    "push",
    "run",
    "save",
    "serve",
    "stability",
    "stack",
    "steering_vector",
    "stream",
    "submit",
    "sweep",
    "verify",
    "versions",
    "wrap",
]
