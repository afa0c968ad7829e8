"""Whether scores are what an attribute makes, as far as a check by real edits depends on it.

What is edited, where, how far, and what is measured must agree: target, where, baseline, metric,
semantics and model. How slopes were estimated (method, backward, one_site, keep) is no part of an
exact effect, so that one attribute can check the scores of several methods; the result then says
how the scores were made, not how the attribute would make them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attribution.baselines import Paired
from ..attribution.passes import Job, SitePasses, source
from ..attribution.scores import Attribution
from ..dictionaries.twins import shared
from ..errors import PromptError
from ..kernel.state import Memory, window
from ..metrics.evaluator import Data
from ..results.provenance import HASH, Provenance
from .experiment import Experiment

SETTINGS = ("where", "baseline", HASH, "semantics")
IDENTITY = ("model", "adapters", "quantization")
IN_TRACE = "values of the trace"


def require_made(
    experiment: Experiment, job: Job, clean: Tensor, scores: Attribution
) -> Provenance:
    """Refuse scores that this attribute does not make; where the others come from.

    ``clean`` [prompts] is the metric in the bare model. What cannot be known of scores made by
    hand is not compared.

    Raises:
        PromptError: naming what differs.
    """
    function, model = experiment.function, experiment.evaluator.model
    experiment.require_same(clean, scores)
    _require(function, "metric", _plain(scores.metric), _metric(job, scores))
    _require_target(function, job, scores)
    own = source(job, model)
    told = scores.provenance
    if told is not None:
        for name in IDENTITY:
            _require(function, name, getattr(told, name), getattr(own, name))
        for name in SETTINGS:
            wanted = own.settings.get(name)
            _require(function, name, told.settings.get(name, wanted), wanted)
        settings = {**own.settings, **told.settings}
        own = replace(own, dictionaries=told.dictionaries, settings=settings)
    if scores.scored is not None and not isinstance(job.baseline, Paired):  # which says more
        chosen = _scored(job, model, experiment.data)
        if not torch.equal(chosen, scores.scored):  # two functions can print alike
            got, wanted = int(scores.scored.sum()), int(chosen.sum())
            _require(function, "where", f"{got} scored tokens", f"{wanted} tokens, or others")
    return own


def _require(function: str, name: str, got: object, wanted: object) -> None:
    if got == wanted:
        return
    raise PromptError(
        f"{function}: `scores` is made with another {name} than `attribute`: {got!s:.200}, wanted"
        f" {wanted!s:.200}. Likely cause: an attribute that did not make these scores. Try:"
        " attribute(model, prompts), or dataclasses.replace(attribute, method=...) where only the"
        " method differs"
    )


def _plain(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _metric(job: Job, scores: Attribution) -> str:
    """The attribute's metric as it prints, unless the scores do not tell theirs."""
    return scores.metric if scores.metric in ("", IN_TRACE) else _plain(repr(job.metric))


def _require_target(function: str, job: Job, scores: Attribution) -> None:
    """Every scored latent is one of the target's, of the same objects or loaded twice."""
    for number, dictionary in enumerate(scores.dictionaries):
        indices = scores.latent[scores.dictionary == number].unique().tolist()
        found: set[int] = set()
        for basis, chosen in job.target.parts:
            found |= set(shared(dictionary, indices, basis, chosen))
        missing = [index for index in indices if index not in found]
        if missing:
            got = f"latent {missing[0]} of {dictionary!r}"
            _require(function, "target", got, repr(job.target))


def _scored(job: Job, model: Any, data: Data) -> Tensor:
    """[all real tokens] bool: what the attribute scores of these prompts."""
    passes, chosen = SitePasses(job, model), []
    for n, (row, real) in enumerate(
        zip(data.inputs["input_ids"], data.inputs["attention_mask"].bool(), strict=True)
    ):
        ids = row[real][None]
        lengths = torch.tensor([[ids.shape[1]]]) if data.lengths is None else data.lengths[n, None]
        view = window(ids, None, (1, ids.shape[1]), 0, Memory(lengths), None)
        chosen.append(torch.stack(passes.scored(view)).any(0)[0])
    return torch.cat(chosen)
