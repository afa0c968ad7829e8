"""verify: is this dictionary at the right place of the right model? Ask before believing anything.

A dictionary put at a wrong site runs without an error and gives numbers. What gives it away is
how badly it reconstructs: so the variance it leaves unexplained is measured at the declared site
and at every neighbor it could have been meant for, on a few prompts, and held against what the
same dictionary leaves of tokens that are mixed at random. What its files declare of its training
is held against the model and the measurements as well.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from ..arguments import checked
from ..dictionaries.by_site import Dictionaries
from ..dictionaries.latents import Dictionary
from ..errors import DictionaryError, SiteError
from ..loading.declaration import missed, notes
from ..model.modules import blocks, check_ready, has_site, torch_module, width_at
from ..model.route import route
from ..model.sites import HOOKS, Site
from ..results.provenance import provenance
from ..text.prompts import Prompts
from .check import ENOUGH, Check, Verification
from .measure import SiteValues, active, fit, null, site_values

if TYPE_CHECKING:
    from nnsight import TransformersModel


@checked
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

    A dictionary is WRONG if it explains less than the mean does, if a candidate is explained much
    better than its own site, or if it explains its tokens little better than tokens mixed with
    each other at random, which keep the mean and the covariance: so do random SAEs of any kind,
    and those of another model. It is doubtful where that is not clear, where the declared L0 is
    missed by a factor of two or the declared variance explained by 20 points, and where there are
    fewer than 64 tokens; else it is ok.

    Tokens whose values are more than five times as long as is typical are set apart, as they hold
    most of the variance; BOS is left out. What else the files or the release declare (model, width,
    BOS) is compared too, and differences are notes below the table.

    Args:
        model: an nnsight ``TransformersModel``.
        saes: SAEs or transcoders.
        prompts: a few texts like those the SAEs were trained on, tens of tokens or more.
        strict: raise if one is WRONG; otherwise only report.

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
    seen = site_values(model, route(model, wanted), prompts)
    checks = tuple(_check(module, sae, seen) for sae in listed)
    tokens = int(sum(kept.sum() for kept in seen.kept))
    origin = provenance(model, [(sae, range(sae.d_sae)) for sae in listed])
    verification = Verification(checks, tokens, provenance=origin)
    if strict and verification.verdict == "WRONG":
        raise SiteError(_wrong(verification))
    return verification


def _wrong(verification: Verification) -> str:
    wrong = next(check for check in verification.checks if check.verdict == "WRONG")
    call = "the model of `sae.declared` and `sae.origin`, or strict=False for the table alone"
    if wrong.elsewhere:
        call = f'load_sae(folder, site="{wrong.best}")'
    return (
        f"verify: `saes` is {wrong.name} at {wrong.site}, which {wrong.findings[0].reason},"
        " wanted a dictionary that explains its site. Likely cause: another layer or hook,"
        f" another model, or another dtype or normalization. Try: {call}\n{verification!r}\n"
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
    same = [one for kind in HOOKS if has_site(module, one := Site(kind, site.layer))]
    near = [one for one in near if has_site(module, one)]
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


def _check(module: nn.Module, sae: Any, seen: SiteValues) -> Check:
    fits = {site: fit(sae, seen, site) for site in _candidates(module, sae)}
    best = min(fits, key=lambda site: fits[site].fvu)
    own = fits[sae.site]
    tokens = len(own.apart) - int(own.apart.sum())
    l0 = active(sae, seen, own.apart)
    mixed = null(sae, seen, own.apart) if tokens >= ENOUGH else (None, None)
    declared = getattr(sae, "declared", None)
    return Check(
        sae.name,
        sae.site,
        own.fvu,
        l0,
        best,
        fits[best].fvu,
        tokens,
        *mixed,
        outliers=int(own.apart.sum()),
        outlier_share=own.share,
        whole_fvu=own.whole,
        declared=getattr(declared, "l0", None),
        missed=missed(declared, l0, own.fvu) if tokens >= ENOUGH else (),
        notes=notes(sae, module, seen.prompts, seen.bos),
    )
