"""Metrics: one differentiable number a prompt, to attribute or to measure.

* ``base``: what a metric is, and what it may look at.
* ``logits``: ``logit``, ``logit_diff``, and any function of the logits.
* ``continuation``: the log-probability of what follows a prompt.
* ``divergence``: KL from another run.
* ``sites``: any function of a site's value, and activations of latents.
* ``batches``, ``evaluator``: prompts some at a time, and a metric read off passes of them.
* ``measure``: a metric under an intervention.
"""

from .base import BASELINE_TOP, Metric, PerPrompt
from .continuation import log_prob
from .divergence import kl
from .logits import custom, logit, logit_diff
from .measure import measure
from .sites import activation, at_site

__all__ = [
    "BASELINE_TOP",
    "Metric",
    "PerPrompt",
    "activation",
    "at_site",
    "custom",
    "kl",
    "log_prob",
    "logit",
    "logit_diff",
    "measure",
]
