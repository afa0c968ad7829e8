"""saefeat: attribute, ablate, clamp and probe SAE latents inside nnsight.

>>> import saefeat as sf
>>> sf.Site.parse("blocks.3.hook_resid_post")
Site(kind='resid_post', layer=3)
"""

from .attribution.attribute import Attribute
from .attribution.backward import Backward
from .attribution.baselines import Fixed, Paired
from .attribution.graddrop import GradDrop
from .attribution.inside import Watching
from .attribution.measure import measure
from .attribution.measuring import activation, kl, log_prob, site_metric
from .attribution.methods import IG, AtP, Exact, FiniteDifference, Method
from .attribution.metrics import BASELINE_TOP, Metric, PerPrompt, logit, logit_diff, metric
from .attribution.record import Attribution
from .attribution.relp import RelP
from .attribution.texts import Texts
from .belief.audit import audit
from .belief.audited import Audit
from .belief.curves import Faithfulness
from .belief.edges import Edges, edges
from .belief.faithfulness import faithfulness
from .belief.interactions import Interactions, interactions
from .belief.minimal import MinimalSet, minimal_set
from .belief.stability import Stability, stability
from .controls import matched, random_directions
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
from .execution.result import Run
from .execution.run import run, stream
from .execution.sweep import sweep
from .execution.wrap import wrap
from .latents import Latents, stack
from .loading import from_sae_lens, load_sae, load_saes
from .loopback import Server, serve
from .prompts import encode_prompts
from .records import Fired, Provenance, Readings, Receipt, versions
from .remote.jobs import Job
from .remote.preflight import Preflight, preflight
from .remote.submit import submit
from .sites import Site
from .spec.files import load, save
from .spec.hub import pull, push
from .spec.vectors import steering_vector
from .tokens import Tokens
from .verbs.base import Chain, Intervention
from .verbs.edits import Ablate, Clamp
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
    "Backward",
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
    "Exact",
    "Excerpt",
    "Faithfulness",
    "FileError",
    "FiniteDifference",
    "Fired",
    "FiringError",
    "Fixed",
    "Generic",
    "GradDrop",
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
    "Paired",
    "PerPrompt",
    "Pin",
    "Preflight",
    "Probe",
    "PromptError",
    "Provenance",
    "Readings",
    "Receipt",
    "RelP",
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
    "Texts",
    "Tokens",
    "Verification",
    "Watching",
    "When",
    "activation",
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
    "kl",
    "load",
    "load_sae",
    "load_saes",
    "log_prob",
    "logit",
    "logit_diff",
    "matched",
    "measure",
    "metric",
    "minimal_set",
    "preflight",
    "pull",
    "push",
    "random_directions",
    "run",
    "save",
    "serve",
    "site_metric",
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
