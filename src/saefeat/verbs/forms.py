"""What an edit reads and writes: its latents, all latents of a topk kind, or a span.

The kernel has one edit, f → f' and x + (f' − f) · directions. The three ways a ``Formula`` is
written differ in what stands for f and for the directions:

* ``frozen``: the selected latents and their directions.
* ``reselect``: the activations that all latents have before the k largest are selected, and all
  directions. The edited ones take their new values into the selection.
* ``orthogonal``: the coordinates of x itself in an orthonormal basis of the directions' span, and
  that basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dictionaries.latents import Dictionary, Latents, index_tensor
from ..dictionaries.places import require_one_site
from ..dictionaries.sae import ErrorTerm
from ..errors import LatentError
from ..kernel.edit import AnyChange, Change, ChangeByRow, Reselect
from ..model.sites import Site

OPEN = {"topk": "relu", "abstopk": "identity"}
"""Topk kind → its activation function without the selection."""


class Form(NamedTuple):
    """Where one dictionary of a step is read, with what columns, and what is written.

    ``directions`` are those at the first write site. ``top`` is a topk kind, its k, and which
    latents are edited, where all compete anew.
    """

    sites: tuple[Site, ...]
    columns: dict[str, Any]
    directions: Tensor
    top: tuple[str, int, Tensor] | None = None

    def changed(self, change: Change | ChangeByRow) -> AnyChange:
        """The change as it is written: with a selection of the k largest, if there is one."""
        if self.top is None:
            return change
        kind, k, selected = self.top
        return Reselect(change=change, kind=kind, k=k, selected=selected)

    def further(self, dictionary: Dictionary, indices: Sequence[int]) -> dict[Site, Tensor]:
        """Directions at the write sites behind the first."""
        if len(dictionary.write_sites) == 1:
            return {}
        rows = dictionary.writes(None if self.top is not None else index_tensor(indices))
        return {site: rows[site] for site in dictionary.write_sites[1:]}


def frozen(dictionary: Dictionary, indices: Sequence[int]) -> Form:
    """The selected latents: all that most edits and every probe need."""
    columns = dictionary.columns(index_tensor(indices))
    return Form(dictionary.read_sites, columns, columns.pop("directions"))


def reselect(dictionary: Dictionary, indices: Sequence[int]) -> Form:
    """All latents of a topk kind, before the selection.

    Raises:
        LatentError: for a dictionary that selects nothing: there each latent is on its own.
    """
    columns = dictionary.columns(index_tensor(indices))
    kind = columns["activation"]
    if not isinstance(kind, str) or kind not in OPEN:
        raise LatentError(
            f"reselect: `latents` is of {dictionary!r}, whose activation is {kind!r}, wanted a topk"
            " or abstopk dictionary. Likely cause: in other architectures no latent depends on"
            " another; saved BatchTopK and Matryoshka SAEs are jumprelu. Try: the latents as they"
            " are, which are written frozen"
        )
    top = (kind, columns.pop("k"), columns.pop("selected"))
    columns |= {"activation": OPEN[kind]}
    del columns["directions"]
    directions = dictionary.directions()
    if len(directions) != dictionary.d_sae:
        raise LatentError(
            f"reselect: `latents` is of {dictionary!r}, which holds {len(directions)} of its"
            " directions, wanted all of them: any latent may enter. Likely cause: an excerpt from a"
            " file, which holds only the latents that were saved. Try: load the dictionary itself,"
            " or the latents as they are, which are written frozen"
        )
    return Form(dictionary.read_sites, columns, directions, top)


def orthogonal(dictionary: Dictionary, indices: Sequence[int], before: Tensor) -> Form:
    """The span of the directions at the write site, less what ``before`` [n, d_out] spans.

    Raises:
        LatentError: for an SAE's error term, whose direction is another at every token.
        SiteError: for latents that are written at several sites: each has a span of its own.
    """
    require_one_site("span", "latents", Latents.of(dictionary, indices), writes=True)
    if isinstance(dictionary, ErrorTerm):
        raise LatentError(
            f"span: `latents` is of {dictionary!r}, wanted latents with directions of their own."
            " Likely cause: the error's direction is the error itself, another at every"
            " token. Try: Ablate(sae.error())"
        )
    basis = span(dictionary.directions(indices), before)
    columns = {
        "activation": "identity",
        "encoder": basis.T.contiguous(),  # [d_out, k]
        "bias": basis.new_zeros(len(basis)),
        "norm": "none",
    }
    return Form((dictionary.write_site,), columns, basis)


def span(rows: Tensor, before: Tensor) -> Tensor:
    """An orthonormal basis of what rows [k, d] span beyond orthonormal ``before`` [n, d].

    Row by row (Gram-Schmidt), so that coordinate i is along what latent i's direction adds to
    those before it, and receipts keep their meaning; a direction that adds nothing, within
    rounding of its dtype, has a row of zeros. In float64, so that a row listed twice is found out
    exactly.
    """
    unit = rows.to(torch.float64)
    unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-300)
    known = before[before.any(1)].to(torch.float64)
    count, width = len(known), rows.shape[1]
    held = torch.cat([known, unit.new_zeros(min(len(rows), width - count), width)])
    out = torch.zeros_like(unit)
    for i, row in enumerate(unit):
        if count == width:  # nothing is left to add
            break
        for _ in range(2):  # once leaves rounding where a row nearly lies in the span before it
            row = row - (held[:count] @ row) @ held[:count]
        size = row.norm()
        if size > 16 * torch.finfo(rows.dtype).eps:
            out[i] = held[count] = row / size
            count += 1
    return out.to(rows.dtype)
