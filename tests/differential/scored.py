"""An attribution by saefeat, held against finite differences."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import torch

import saefeat as sf

from .asked import Asked
from .cases import Case, Step
from .compare import Verdict, _ours
from .ours import Made, dictionary, nn_model, rule_of
from .slopes import Table, scores

TOLERANCE = 3e-5
"""Relative to a prompt's largest score. In transformers norms compute in float32."""


def attributed(asked: Asked) -> Any:
    """By saefeat."""
    bases = [dictionary(basis, asked.family) for basis in asked.bases]
    latents = reduce(or_, [bases[n].latents(list(own)) for n, own in asked.target])
    kind, *tokens = asked.metric
    metric = {
        "mass": lambda: sf.metrics.custom(lambda logits: logits.logsumexp(-1)),
        "logit": lambda: sf.metrics.logit(*tokens),
        "logit_diff": lambda: sf.logit_diff(*tokens),
    }[kind]()
    method = sf.IG(asked.steps, asked.rule) if asked.steps else sf.attribution.AtP()
    attribute = sf.Attribute(
        latents, metric, baseline=_baseline(asked, bases, latents), method=method,
        where=rule_of(asked.where), one_site=asked.one_site,
    )  # fmt: skip
    given = [list(prompt) for prompt in asked.prompts]
    options = {"batch_size": asked.batch_size, "steps_at_once": asked.at_once}
    return attribute(nn_model(asked.family, "float64"), given, **options)


def _baseline(asked: Asked, bases: list, latents: Any) -> Any:
    given = asked.baseline
    if asked.others:
        return sf.attribution.Paired([list(prompt) for prompt in asked.others])
    if isinstance(given, Step):
        case = Case(asked.family, asked.bases, ((given,),), asked.prompts, "run")
        made = Made(case)
        made.bases = bases
        return made._step(given)
    if given is None:
        return None
    values = torch.tensor(given, dtype=torch.float64) if isinstance(given, tuple) else given
    return sf.attribution.Fixed(latents, values)


def judge_scores(asked: Asked) -> Verdict:
    """Compare an attribution by both."""
    try:
        found = attributed(asked)
    except Exception as error:  # a crash is no answer
        kind = "refused" if _ours(error) else "different"
        return Verdict(kind, f"{type(error).__name__}: {error}"[:400])
    told = []
    for number in range(len(asked.prompts)):
        table, clean, base = scores(asked, number)
        told += _differences(asked, found, number, table)
        for name, own, theirs in (
            ("clean", found.clean[number], clean),
            ("baseline", found.baseline[number], base),
        ):
            if not abs(float(own) - theirs) <= 1e-4 * max(1.0, abs(theirs)):
                told.append(f"{name} metric of prompt {number}: {float(own):.6g} for {theirs:.6g}")
    return Verdict("different" if told else "same", "; ".join(told[:4]))


def _differences(asked: Asked, found: Any, number: int, table: Table) -> list[str]:
    columns = (found.prompt, found.dictionary, found.position, found.latent, found.score)
    own = {
        (part, position, latent): score
        for prompt, part, position, latent, score in zip(
            *(c.tolist() for c in columns), strict=True
        )
        if prompt == number
    }
    size = max([abs(score) for score in table.values()], default=0.0)
    allowed = TOLERANCE * size + 1e-7
    told = []
    for key in sorted(own.keys() | table.keys()):
        a, b = own.get(key, 0.0), table.get(key, 0.0)
        if key not in table or not abs(a - b) <= allowed:
            told.append(f"score {key} of prompt {number}: {a:.6g} for {b:.6g} of {size:.3g}")
    return told
