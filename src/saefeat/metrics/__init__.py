"""Metrics: one differentiable number a prompt, to attribute or to measure.

* ``base``: what a metric is, and what it may look at.
* ``apart``: that each row has one number, its own.
* ``logits``: metrics of tokens, of a continuation, and any function of logits.
* ``divergence``: KL from another run.
* ``sites``: any function of a site's value, and activations of latents.
* ``evaluator``: prompts in batches, a metric read off passes of them, and ``measure``.
"""

from .base import BASELINE_TOP, Metric, PerPrompt
from .divergence import kl
from .evaluator import measure
from .logits import custom, log_prob, logit, logit_diff
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
