"""Selections: which few latents carry refusal, found in four ways, and random ones beside them.

Each returns ``sf.Latents``; what is done with them is the same for all.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

import saefeat as sf

from .data import Prompt, chats
from .lab import Lab

CHUNK = 8192
"""Decoder rows compared at a time."""

Scores = dict[sf.Site, Tensor]
"""One number a latent, [d_sae] for each dictionary."""


def cosines(saes: sf.dictionaries.Dictionaries, vector: Tensor) -> Scores:
    """The signed cosine of every latent's direction with a vector [d_model]."""
    unit = vector / vector.norm()
    found = {}
    for site, dictionary in saes.items():
        pieces = []
        for start in range(0, dictionary.d_sae, CHUNK):
            rows = dictionary.directions(range(start, min(start + CHUNK, dictionary.d_sae)))
            pieces.append((rows @ unit.to(rows)) / rows.norm(dim=1).clamp(min=1e-8))
        found[site] = torch.cat(pieces)
    return found


def top_overall(saes: sf.dictionaries.Dictionaries, scores: Scores, k: int) -> sf.Latents:
    """The k latents with the highest score among all dictionaries."""
    sites = list(scores)
    widths = torch.tensor([len(scores[site]) for site in sites])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), widths.cumsum(0)])
    flat = torch.cat([scores[site] for site in sites])
    best = flat.argsort(descending=True, stable=True)[:k]
    place = torch.searchsorted(starts, best, right=True) - 1
    chosen: dict[sf.Site, list[int]] = {}
    for n, index in zip(place.tolist(), (best - starts[place]).tolist(), strict=True):
        chosen.setdefault(sites[n], []).append(index)
    return restored(saes, {str(s): chosen[s] for s in sites if s in chosen})


def top_per_layer(saes: sf.dictionaries.Dictionaries, scores: Scores, k: int) -> sf.Latents:
    """The k latents with the highest score of each dictionary."""
    return restored(
        saes, {str(s): v.topk(min(k, len(v))).indices.tolist() for s, v in scores.items()}
    )


def restored(saes: sf.dictionaries.Dictionaries, stored: dict[str, list[int]]) -> sf.Latents:
    """Latents from what ``Latents.to_dict`` wrote."""
    return saes.latents(stored)  # type: ignore[arg-type]


def peaks(lab: Lab, prompts: Sequence[Prompt]) -> Scores:
    """Each latent's largest activation in a prompt, averaged over prompts.

    One forward pass a prompt reads every dictionary. Sums are kept a batch at a time: all prompts'
    peaks of all layers together would be gigabytes.
    """
    probes = [sf.Probe(one.latents(), where=lab.counted, reduce="max") for one in lab.saes.values()]
    together = reduce(operator.or_, probes)
    sums = [torch.zeros(one.d_sae, dtype=torch.float64) for one in lab.saes.values()]
    size = lab.settings.batch_size
    for start in lab.progress(range(0, len(prompts), size), "peaks"):
        run = lab.read(prompts[start : start + size], together)
        for total, reading in zip(sums, run.readings, strict=True):
            total += reading.values[:, 0].cpu().double().sum(0)
    return {
        site: (total / len(prompts)).float() for site, total in zip(lab.saes, sums, strict=True)
    }


def active(saes: sf.dictionaries.Dictionaries, scores: Scores) -> sf.Latents:
    """The latents that fire at all, given their peaks."""
    return restored(
        saes, {str(s): (v > 0).nonzero().squeeze(1).tolist() for s, v in scores.items()}
    )


def attribution(
    lab: Lab, prompts: Sequence[Prompt], baseline: sf.Intervention, *, rule: str | None = None
) -> sf.attribution.Attribution:
    """AP: integrated gradients from each harmful prompt to the same prompt under steering.

    The metric is the logit of the token that steering makes most likely, against the openings of
    a refusal. Every token of the study is scored, template included, signs kept.
    """
    settings = lab.settings
    return sf.Attribute(
        lab.saes,
        sf.logit_diff(sf.metrics.BASELINE_TOP, list(lab.refusal_ids)),
        baseline=baseline,
        method=sf.IG(settings.steps, rule or settings.rule),
        where=lab.counted,
    )(lab.model, chats(prompts), batch_size=settings.batch_size)


def degenerate(lab: Lab, prompts: Sequence[Prompt], baseline: sf.Intervention) -> Tensor:
    """[n] bool: still refused under steering, so that the metric compares refusal with refusal."""
    first = lab.read(prompts, baseline).logits.argmax(-1).cpu()
    return torch.isin(first, torch.tensor(lab.refusal_ids))


def telling(
    lab: Lab, prompts: Sequence[Prompt], baseline: sf.Intervention
) -> tuple[Sequence[Prompt], int]:
    """The prompts that attribution can learn from, and how many others there are.

    All prompts if steering frees none of them: then nothing better is to be had.
    """
    blind = degenerate(lab, prompts, baseline).tolist()
    kept = [prompt for prompt, bad in zip(prompts, blind, strict=True) if not bad]
    return kept or prompts, sum(blind)


def by_site(latents: sf.Latents) -> Iterator[tuple[str, sf.Latents]]:
    """A selection cut into one selection a site."""
    for basis, indices in latents.parts:
        yield str(basis.site), sf.Latents(((basis, indices),))


def random_like(pool: sf.Latents, like: sf.Latents, seed: int) -> sf.Latents:
    """Random latents of the pool, as many a site as ``like`` has and none of its own.

    Fewer where the pool has no more; reports give the size of every set.
    """
    pools = dict(by_site(pool - like))
    drawn = sf.Latents(())
    for site, part in by_site(like):
        here = pools.get(site, sf.Latents(()))
        drawn = drawn | here.sample(min(len(part), len(here)), seed=seed)
    return drawn


def union(sets: Iterable[sf.Latents]) -> sf.Latents:
    """All latents of several selections."""
    joined = sf.Latents(())
    for one in sets:
        joined = joined | one
    return joined
