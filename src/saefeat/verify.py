"""verify: is this dictionary at the right place of the right model? Ask before believing anything.

A dictionary put at a wrong site runs without an error and gives numbers. What gives it away is
how badly it reconstructs: so the variance it leaves unexplained is measured at the declared site
and at every neighbor it could have been meant for, on a few prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .dictionaries.base import Dictionaries
from .dictionaries.direction import Neurons
from .dictionaries.sae import SAE
from .errors import DictionaryError, SiteError, explain
from .execution.run import run
from .prompts import Prompts
from .route import route
from .sites import (
    HOOKS,
    Site,
    check_ready,
    family,
    layer_count,
    torch_module,
    width_at,
)
from .tokens import Tokens
from .verbs.base import Chain
from .verbs.probe import Probe


@dataclass(frozen=True)
class Check:
    """What was found for one dictionary.

    Attributes:
        name: the dictionary.
        site: where it declares to read.
        fvu: fraction of variance unexplained there; 0 is perfect, 1 is no better than the mean.
        l0: mean active latents a token there.
        best: the candidate site with the lowest fvu.
        best_fvu: the fvu there.

    Examples:
        >>> site = sf.Site("resid_post", 1)
        >>> sf.Check("sae", site, fvu=0.1, l0=12.0, best=site, best_fvu=0.1).right
        True
    """

    name: str
    site: Site
    fvu: float
    l0: float
    best: Site
    best_fvu: float

    @property
    def right(self) -> bool:
        """The declared site explains its values, and no neighbor does much better."""
        return self.fvu < 1 and (self.best == self.site or self.fvu < 1.5 * self.best_fvu + 0.01)


@dataclass(frozen=True)
class Verification:
    """The table ``verify`` makes; prints as plain text.

    Attributes:
        checks: one a dictionary.
        tokens: how many tokens were measured.

    Examples:
        >>> sf.Verification((), tokens=0).right
        True
    """

    checks: tuple[Check, ...]
    tokens: int

    @property
    def right(self) -> bool:
        """Every dictionary is where it should be."""
        return all(check.right for check in self.checks)

    def __repr__(self) -> str:
        head = ("dictionary", "site", "FVU", "L0", "best site", "its FVU", "")
        rows = [
            (
                check.name,
                str(check.site),
                f"{check.fvu:.3f}",
                f"{check.l0:.1f}",
                str(check.best),
                f"{check.best_fvu:.3f}",
                "ok" if check.right else "WRONG",
            )
            for check in self.checks
        ]
        widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in (head, *rows)
        ]
        return "\n".join([f"verified on {self.tokens} tokens", *(line.rstrip() for line in lines)])


def verify(
    model: Any, saes: Dictionaries | SAE, prompts: Prompts, *, strict: bool = True
) -> Verification:
    """Measure each SAE at its declared site and at the sites it could be mistaken for.

    Candidates are the same kind of site one layer up and down, and every other site of its layer
    that is as wide. A transcoder is fed each candidate and must predict its declared output.

    Args:
        model: an nnsight ``TransformersModel``.
        saes: SAEs or transcoders.
        prompts: a few texts like those the SAEs were trained on, tens of tokens or more.
        strict: raise if one is wrong; otherwise only report.

    Returns:
        A ``Verification``; look at it.

    Raises:
        SiteError: naming the site at which the dictionary does fit, with the table.
        ModelError, PromptError: as in ``run``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> chats = [[{"role": "user", "content": r.instruction}]
        ...          for r in tiny.splits()["harmless_train"][:16]]
        >>> sf.verify(model, saes, chats).right
        True
    """
    module = torch_module(model)
    check_ready(module, "verify")
    listed = _listed(saes)
    found = route(model, [site for sae in listed for site in (sae.site, sae.write_site)])
    for sae in listed:
        found.check(sae, "saes")
    wanted = {site for sae in listed for site in (*_candidates(module, sae), sae.write_site)}
    values = _values(model, module, prompts, wanted)
    checks = tuple(_check(module, sae, values) for sae in listed)
    found = Verification(checks, tokens=len(next(iter(values.values()))))
    if strict and not found.right:
        wrong = next(check for check in found.checks if not check.right)
        raise SiteError(
            explain(
                "verify",
                "saes",
                got=f"{wrong.name} at {wrong.site}, where it leaves {wrong.fvu:.0%} unexplained",
                wanted=f"a site it explains; at {wrong.best} it leaves {wrong.best_fvu:.0%}",
                cause="another layer or hook, another model, or another dtype or normalization",
                call=f'load_sae(folder, site="{wrong.best}")\n{found!r}\n',
            )
        )
    return found


def _listed(saes: Dictionaries | SAE) -> list[Any]:
    """The dictionaries, all of which must be able to reconstruct."""
    listed = list(saes.values()) if isinstance(saes, Dictionaries) else [saes]
    unable = [sae for sae in listed if not hasattr(sae, "reconstruct")]
    if not unable:
        return listed
    raise DictionaryError(
        explain(
            "verify",
            "saes",
            got=repr(unable[0]),
            wanted="SAEs and transcoders, which reconstruct their site",
            cause="a direction or a neuron basis has nothing to be held against",
            call='verify(model, load_saes(..., sites="resid_post"), prompts)',
        )
    )


def _candidates(module: nn.Module, sae: Any) -> list[Site]:
    """The declared site, the layers beside it, and sites of its layer of the same width."""
    site, layers = sae.site, layer_count(module)
    beside = [Site(site.kind, n) for n in (site.layer - 1, site.layer + 1) if 0 <= n < layers]
    same = [Site(kind, site.layer) for kind in HOOKS if kind in family(module)[1]]
    return [site, *beside, *(s for s in same if s != site and width_at(module, s) == sae.d_in)]


def _values(
    model: Any, module: nn.Module, prompts: Prompts, sites: Iterable[Site]
) -> dict[Site, Tensor]:
    """The value at each site, one row a real token but BOS: [n, width], float32 or wider."""
    ordered = sorted(sites, key=lambda site: site.order)
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    # BOS is an outlier in many models; it would be most of the variance, explained or not.
    where = Tokens.all() if bos is None else ~Tokens.ids(bos)
    probes = tuple(Probe(Neurons(site, width_at(module, site)), where=where) for site in ordered)
    readings = run(model, prompts, Chain(probes)).readings
    return {s: r.values[r.mask[..., 0]] for s, r in zip(ordered, readings, strict=True)}


def _check(module: nn.Module, sae: Any, values: dict[Site, Tensor]) -> Check:
    scores = {}
    for site in _candidates(module, sae):
        target = values[site] if sae.site == sae.write_site else values[sae.write_site]
        scores[site] = _fvu(target, sae.reconstruct(values[site]))
    best = min(scores, key=lambda site: scores[site])
    l0 = float((sae.encode(values[sae.site]) != 0).sum(-1).float().mean())
    return Check(sae.name, sae.site, scores[sae.site], l0, best, scores[best])


def _fvu(target: Tensor, guess: Tensor) -> float:
    """Fraction of variance unexplained, over all tokens: Σ‖x − x̂‖² / Σ‖x − mean‖²."""
    spread = (target - target.mean(0)).square().sum().clamp(min=torch.finfo(target.dtype).tiny)
    return float((target - guess).square().sum() / spread)
