"""verify: is this dictionary at the right place of the right model? Ask before believing anything.

A dictionary put at a wrong site runs without an error and gives numbers. What gives it away is
how badly it reconstructs: so the variance it leaves unexplained is measured at the declared site
and at every neighbor it could have been meant for, on a few prompts. What its files declare of its
training is held against the model and the measurements as well, and noted where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .dictionaries.by_site import Dictionaries
from .dictionaries.direction import Neurons
from .dictionaries.latents import Dictionary
from .errors import DictionaryError, ModelError, SiteError
from .loading.declaration import notes
from .model.modules import blocks, check_ready, family, torch_module, width_at
from .model.route import Route, route
from .model.sites import HOOKS, Site
from .running.run import run
from .text.prompts import Prompts
from .verbs.base import Chain
from .verbs.probe import Probe

if TYPE_CHECKING:
    from nnsight import TransformersModel


@dataclass(frozen=True)
class Check:
    """How well one dictionary explains its site.

    Attributes:
        name: the dictionary.
        site: where it declares to read.
        fvu: fraction of variance unexplained there; 0 is perfect, 1 is no better than the mean.
        l0: mean active latents a token there.
        best: the candidate site with the lowest fvu.
        best_fvu: the fvu there.
        declared: the L0 its files or release declare, where they do.
        notes: in what else the declarations differ from the model and the measurements.

    Examples:
        >>> from saefeat.verify import Check
        >>> site = sf.Site("resid_post", 1)
        >>> Check("sae", site, fvu=0.1, l0=12.0, best=site, best_fvu=0.1).right
        True
    """

    name: str
    site: Site
    fvu: float
    l0: float
    best: Site
    best_fvu: float
    declared: float | None = None
    notes: tuple[str, ...] = ()

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
        >>> from saefeat.verify import Verification
        >>> Verification((), tokens=0).right
        True
    """

    checks: tuple[Check, ...]
    tokens: int

    @property
    def right(self) -> bool:
        """Every dictionary is where it should be."""
        return all(check.right for check in self.checks)

    def __repr__(self) -> str:
        head = ("dictionary", "site", "FVU", "L0", "declared", "best site", "its FVU", "")
        rows = [
            (
                check.name,
                str(check.site),
                f"{check.fvu:.3f}",
                f"{check.l0:.1f}",
                "-" if check.declared is None else f"{check.declared:g}",
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
        notes = [f"note: {check.name}: {note}" for check in self.checks for note in check.notes]
        head_line = f"verified on {self.tokens} tokens"
        return "\n".join([head_line, *(line.rstrip() for line in lines), *notes])


def verify(
    model: TransformersModel,
    saes: Dictionaries | Dictionary,
    prompts: Prompts,
    *,
    strict: bool = True,
) -> Verification:
    """Measure each SAE at its declared site and at the sites it could be mistaken for.

    Candidates are the same kind of site one layer up and down, and every other site of its layer
    that is as wide; for a module's path, the same module one layer up and down. A transcoder is
    fed each candidate and must predict its declared output.

    What the files or the release declare (model, width, L0, variance explained, BOS) is compared
    too. It never raises, since names and texts differ: differences are notes below the table.

    Args:
        model: an nnsight ``TransformersModel``.
        saes: SAEs or transcoders.
        prompts: a few texts like those the SAEs were trained on, tens of tokens or more.
        strict: raise if one is wrong; otherwise only report.

    Returns:
        A ``Verification``; look at it.

    Raises:
        SiteError: naming the site at which the dictionary does fit, with the table.
        ModelError: in train mode with dropout, or where a value is not finite.
        DictionaryError: for dictionaries that do not reconstruct.
        PromptError: as in ``run``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> chats = [[{"role": "user", "content": r.instruction}]
        ...          for r in tiny.splits()["harmless_train"][:16]]
        >>> sf.verify(model, saes, chats).right
        True
    """
    module = torch_module(model)
    check_ready(module, "verify")
    listed = _listed(saes)
    declared = route(model, [site for sae in listed for site in (sae.site, sae.write_site)])
    for sae in listed:
        declared.check(sae, "saes")
    wanted = {site for sae in listed for site in (*_candidates(module, sae), sae.write_site)}
    seen = _values(model, route(model, wanted), prompts)
    checks = tuple(_check(module, sae, seen) for sae in listed)
    verification = Verification(checks, tokens=int(sum(kept.sum() for kept in seen.kept)))
    if strict and not verification.right:
        raise SiteError(_wrong(verification))
    return verification


def _wrong(verification: Verification) -> str:
    wrong = next(check for check in verification.checks if not check.right)
    return (
        f"verify: `saes` is {wrong.name} at {wrong.site}, where it leaves {wrong.fvu:.0%}"
        f" unexplained, wanted a site it explains; at {wrong.best} it leaves {wrong.best_fvu:.0%}."
        " Likely cause: another layer or hook, another model, or another dtype or normalization."
        f' Try: load_sae(folder, site="{wrong.best}")\n{verification!r}\n'
    )


def _listed(saes: Dictionaries | Dictionary) -> list[Any]:
    """The dictionaries, all of which must be able to reconstruct."""
    listed = list(saes.values()) if isinstance(saes, Dictionaries) else [saes]
    unable = [sae for sae in listed if not hasattr(sae, "reconstruct")]
    if not unable:
        return listed
    raise DictionaryError(
        f"verify: `saes` is {unable[0]!r}, wanted SAEs and transcoders, which reconstruct their"
        " site. Likely cause: a direction or a neuron basis has nothing to be held against. Try:"
        ' verify(model, load_saes(..., sites="resid_post"), prompts)'
    )


def _candidates(module: nn.Module, sae: Any) -> list[Site]:
    """The declared site, the layers beside it, and sites of its layer of the same width."""
    site = sae.site
    if site.layer is None:
        return [site, *_neighbors(module, site)]
    layers = len(blocks(module))
    near = [Site(site.kind, n) for n in (site.layer - 1, site.layer + 1) if 0 <= n < layers]
    same = [Site(kind, site.layer) for kind in HOOKS if kind in family(module)[1]]
    return [site, *near, *(s for s in same if s != site and width_at(module, s) == sae.d_in)]


def _neighbors(module: nn.Module, site: Site) -> list[Site]:
    """The same module of the layers beside; a path's first number is its layer."""
    names = {name for name, _ in module.named_modules()}
    number = re.search(r"(?<=\.)\d+(?=\.)", site.kind)
    if number is None:
        return []
    near = [int(number[0]) - 1, int(number[0]) + 1]
    paths = [f"{site.kind[: number.start()]}{n}{site.kind[number.end() :]}" for n in near]
    return [Site(path) for path in paths if path.rpartition(".")[0] in names]


class SiteValues(NamedTuple):
    """What was read: prompt by prompt, the values at each site and which tokens count."""

    values: dict[Site, list[Tensor]]
    kept: list[Tensor]
    prompts: tuple[tuple[int, ...], ...]
    bos: int | None

    def measured(self, site: Site, of: Callable[[Tensor], Tensor], by_prompt: bool) -> Tensor:
        """``of`` the values, [n, ...], at the tokens that count.

        ``by_prompt`` gives it one prompt at a time, from its first token: for a dictionary whose
        latents depend on earlier tokens.
        """
        rows = self.values[site]
        if by_prompt:
            return torch.cat([of(x)[kept] for x, kept in zip(rows, self.kept, strict=True)])
        return of(torch.cat([x[kept] for x, kept in zip(rows, self.kept, strict=True)]))


def _values(model: TransformersModel, past: Route, prompts: Prompts) -> SiteValues:
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
    # BOS is an outlier in many models; it would be most of the variance, explained or not.
    kept = [torch.tensor([token != bos for token in prompt]) for prompt in run_of.prompts]
    return SiteValues(values, kept, run_of.prompts, bos)


def _not_finite(site: Site, dtype: str) -> str:
    return (
        f"verify: `model` is in {dtype}, with values at {site} that are not finite, wanted finite"
        " values. Likely cause: a model trained in bfloat16 and run in float16, whose range is"
        " smaller. Try: from_pretrained(name, dtype=torch.bfloat16), or torch.float32"
    )


def _check(module: nn.Module, sae: Any, seen: SiteValues) -> Check:
    scores = {}
    for site in _candidates(module, sae):
        target = site if sae.site == sae.write_site else sae.write_site
        guess = seen.measured(site, sae.reconstruct, sae.prefix)
        scores[site] = _fvu(seen.measured(target, lambda x: x, False), guess)
    best = min(scores, key=lambda site: scores[site])
    active = seen.measured(sae.site, lambda x: (sae.encode(x) != 0).sum(-1), sae.prefix)
    l0, fvu = float(active.float().mean()), scores[sae.site]
    differences = notes(sae, module, seen.prompts, seen.bos, l0, fvu)
    declared = getattr(sae.declared, "l0", None)
    return Check(sae.name, sae.site, fvu, l0, best, scores[best], declared, differences)


def _fvu(target: Tensor, guess: Tensor) -> float:
    """Fraction of variance unexplained, over all tokens: Σ‖x − x̂‖² / Σ‖x − mean‖²."""
    spread = (target - target.mean(0)).square().sum().clamp(min=torch.finfo(target.dtype).tiny)
    return float((target - guess).square().sum() / spread)
