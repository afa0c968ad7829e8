"""How well a dictionary explains a site's tokens, with outlier tokens set apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..dictionaries.direction import Neurons
from ..errors import ModelError
from ..model.route import Route
from ..model.sites import Site
from ..results.outliers import outliers
from ..running.run import run
from ..text.prompts import Prompts
from ..verbs.base import Chain
from ..verbs.probe import Probe
from .null import SEEDS, mixed

if TYPE_CHECKING:
    from nnsight import TransformersModel


class SiteValues(NamedTuple):
    """What was read: prompt by prompt, the values at each site and which tokens count."""

    values: dict[Site, list[Tensor]]
    kept: list[Tensor]
    prompts: tuple[tuple[int, ...], ...]
    bos: int | None

    def at(self, site: Site) -> Tensor:
        """[n, d]: the values of the tokens that count, prompt after prompt."""
        return torch.cat([x[kept] for x, kept in zip(self.values[site], self.kept, strict=True)])

    def put(self, site: Site, values: Tensor) -> SiteValues:
        """The same with other values [n, d] at the tokens that count."""
        parts = values.split([int(kept.sum()) for kept in self.kept])
        rows = [x.clone() for x in self.values[site]]
        for row, kept, part in zip(rows, self.kept, parts, strict=True):
            row[kept] = part
        return self._replace(values={**self.values, site: rows})

    def measured(self, site: Site, of: Callable[[Tensor], Tensor], by_prompt: bool) -> Tensor:
        """``of`` the values, [n, ...], at the tokens that count.

        ``by_prompt`` gives it one prompt at a time, from its first token: for a dictionary whose
        latents depend on earlier tokens.
        """
        if not by_prompt:
            return of(self.at(site))
        pairs = zip(self.values[site], self.kept, strict=True)
        return torch.cat([of(x)[kept] for x, kept in pairs])


class Fit(NamedTuple):
    """How a dictionary does at one site.

    Attributes:
        fvu: fraction of variance unexplained, of tokens that are no outliers.
        whole: the same of all tokens that count.
        apart: [n] bool, which of these are outliers.
        share: of the variance that outliers hold.
    """

    fvu: float
    whole: float
    apart: Tensor
    share: float


def site_values(model: TransformersModel, past: Route, prompts: Prompts) -> SiteValues:
    """The value at each site, float32 or wider. All tokens count but BOS."""
    sites = list(past.places)
    run_of = run(model, prompts, Chain(tuple(Probe(Neurons(s, past.widths[s])) for s in sites)))
    values = {
        site: [x[shown] for x, shown in zip(reading.values, reading.mask[..., 0], strict=True)]
        for site, reading in zip(sites, run_of.readings, strict=True)
    }
    for site, rows in values.items():
        if not all(bool(torch.isfinite(x).all()) for x in rows):
            raise ModelError(_not_finite(site, run_of.provenance.dtype))
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    # SAEs are mostly trained without BOS, of which every prompt has the same.
    kept = [torch.tensor([token != bos for token in prompt]) for prompt in run_of.prompts]
    return SiteValues(values, kept, run_of.prompts, bos)


def _not_finite(site: Site, dtype: str) -> str:
    return (
        f"verify: `model` is in {dtype}, with values at {site} that are not finite, wanted finite"
        " values. Likely cause: a model trained in bfloat16 and run in float16, whose range is"
        " smaller. Try: from_pretrained(name, dtype=torch.bfloat16), or torch.float32"
    )


def fit(sae: Any, seen: SiteValues, site: Site) -> Fit:
    """How well a dictionary explains what it is meant to, fed with the values at ``site``."""
    wanted = seen.at(written(sae, site))
    guess = seen.measured(site, sae.reconstruct, sae.prefix)
    apart = outliers(seen.at(site)) | outliers(wanted)
    kept, spread = wanted[~apart], variance(wanted)
    share = 1 - variance(kept) / spread if bool(apart.any()) and spread else 0.0
    return Fit(fvu(kept, guess[~apart]), fvu(wanted, guess), apart, share)


def active(sae: Any, seen: SiteValues, apart: Tensor) -> float:
    """Mean latents active at a token that is no outlier."""
    counts = seen.measured(sae.site, lambda x: (sae.encode(x) != 0).sum(-1), sae.prefix)[~apart]
    return float(counts.double().mean()) if len(counts) else 0.0


def null(sae: Any, seen: SiteValues, apart: Tensor) -> tuple[float, float]:
    """fvu and active latents at its own site for tokens that are mixed; outliers stay as they are.

    What is written is mixed as what is read, so a transcoder keeps what it knows of the linear
    part.
    """
    only = seen._replace(kept=_without(seen.kept, apart))
    found = []
    for seed in SEEDS:
        blends = only
        for one in {sae.site, sae.write_site}:
            blends = blends.put(one, mixed(only.at(one), seed))
        guess = blends.measured(sae.site, sae.reconstruct, sae.prefix)
        none = torch.zeros(len(guess), dtype=torch.bool)
        found.append((fvu(blends.at(sae.write_site), guess), active(sae, blends, none)))
    unexplained, latents = (sum(column) / len(SEEDS) for column in zip(*found, strict=True))
    return unexplained, latents


def written(sae: Any, site: Site) -> Site:
    """Where a dictionary that is fed at ``site`` is meant to write."""
    return site if sae.site == sae.write_site else sae.write_site


def _without(kept: list[Tensor], apart: Tensor) -> list[Tensor]:
    """Masks of tokens without those set apart, which are numbered among the kept."""
    masks = []
    for mask, gone in zip(kept, apart.split([int(m.sum()) for m in kept]), strict=True):
        left = mask.clone()
        left[mask] = ~gone
        masks.append(left)
    return masks


def variance(values: Tensor) -> float:
    """Σ‖x − mean‖² over tokens."""
    return float((values - values.mean(0)).double().square().sum()) if len(values) else 0.0


def fvu(target: Tensor, guess: Tensor) -> float:
    """Fraction of variance unexplained, over all tokens: Σ‖x − x̂‖² / Σ‖x − mean‖²."""
    tiny = torch.finfo(target.dtype).tiny
    return float((target - guess).double().square().sum()) / max(variance(target), tiny)
