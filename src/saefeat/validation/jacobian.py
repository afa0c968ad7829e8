"""The gradients that edges are made of: downstream latents at the places upstream ones write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..attribution.crossing import crossed
from ..checks import differentiated
from ..dictionaries.latents import Latents, cast, index_tensor
from ..kernel.encode import encode
from ..kernel.frozen import plainly
from ..kernel.read import Norm, lift
from ..kernel.state import Log, View
from ..kernel.tokens import select
from ..kernel.watch import Keep
from ..metrics.evaluator import Batch, forward
from ..model.modules import torch_module
from ..model.route import Route
from ..model.sites import Order, Place, Site
from ..model.wrappers import require_logits
from ..text.tokens import Tokens, plain
from ..verbs.base import Chain
from ..verbs.lower import Visits, acts_at, lower

if TYPE_CHECKING:
    from nnsight import TransformersModel


class SiteLatents(NamedTuple):
    """Latents of one dictionary, the place they are read at, its norm, and where they count."""

    columns: dict[str, Any]
    place: Place
    norm: Norm
    rule: tuple

    def at(self, value: Tensor, view: View) -> tuple[Tensor, Tensor | None]:
        """[b, t, k]: the latents of a site's value, zero where they do not count; and the scale."""
        x = lift(value, self.norm)
        f, scale = encode(cast(self.columns, x.dtype, x.device), x)
        return torch.where(select(self.rule, view).to(x.device)[..., None], f, 0.0), scale


class Jacobian:
    """Gradients of downstream latents at the places upstream latents write, in the bare model."""

    def __init__(
        self, model: TransformersModel, way: Route, up: Latents, down: Latents, where: Tokens | None
    ) -> None:
        self._model, self._route = model, way
        self.up, self.down, self.where = up, down, where
        self._numbers: dict[Place, tuple[int, Order]] = {}
        self._reads = [self._part(*part, None) for part in up.parts]
        sites = [basis.write_site for basis, _ in up.parts]
        self._written = [self._place(site, way.writable(site, "edges")) for site in sites]
        self._sinks = [self._part(*part, where) for part in down.parts]
        numbers = [self._numbers[place] for place in self._written]
        self._first, self._first_order = min(numbers, key=lambda entry: entry[1])

    def _part(self, basis: Any, indices: Any, where: Tokens | None) -> SiteLatents:
        at = self._route.places[basis.site]
        rule = plain(acts_at(where, basis, self._model).rule, self._model)
        norm, columns = Norm(kind=at.transform, eps=at.eps), basis.columns(index_tensor(indices))
        return SiteLatents(columns, self._place(basis.site, at), norm, rule)

    def _place(self, site: Site, at: Place) -> Place:
        """The site's place, to be kept under a number of its own."""
        place = at.plain()
        self._numbers.setdefault(place, (len(self._numbers), self._route.orders[site]))
        if place.plus is not None:  # resid_mid: the block's input is the other half of its value
            entry = (len(self._numbers), self._route.starts[place.plus])
            self._numbers.setdefault(Place(place.plus, "input"), entry)
        return place

    def values(self, batch: Batch) -> dict[str, Tensor]:
        """``values`` [u, d, b], the edges of one batch; whether either side was active at all."""
        log = self._run(batch)
        with torch.enable_grad():
            sinks = [part.at(self._node(part.place, log), log.view)[0] for part in self._sinks]
            sums = torch.cat([f.sum(1) for f in sinks], -1)  # [b, d]
        with torch.no_grad():
            kept = [log.kept[self._numbers[read.place][0]] for read in self._reads]
            active = [r.at(x, log.view) for r, x in zip(self._reads, kept, strict=True)]
        nodes, effects = [log.nodes[self._numbers[place][0]] for place in self._written], []
        for j in range(sums.shape[1]):
            slopes = differentiated("edges", sums[:, j].sum(), nodes, keep=True)
            parts = zip(self._reads, active, slopes, strict=True)
            effects.append(torch.cat([_weigh(*part) for part in parts], -1))  # [b, u]
        fires = torch.stack([f.any() for f, _ in active]).any()
        values = torch.stack(effects).permute(2, 0, 1).float().cpu()
        return {"values": values, "upstream": fires, "downstream": sums.any()}

    def _run(self, batch: Batch) -> Log:
        """One forward pass in which every place's value is kept as a node of the graph."""
        program, visits = lower(Chain(()), self._model), Visits()
        for place, (number, order) in self._numbers.items():
            if place.plus is not None:
                visits.stash(place.plus, self._route.starts[place.plus])
            # what lies before the first written place needs no gradient, and frozen models work
            gradient, first = order >= self._first_order, number == self._first
            keep = Keep(number=number, plus=place.plus, gradient=gradient, first=first)
            visits.add(place, order, keep)
        program = program.replace(visits=visits.ordered())
        module = torch_module(self._model)
        require_logits("edges", module)
        with torch.enable_grad(), crossed("edges", module):
            log, _ = forward(self._model, batch, program, columns=1)
        return log

    def _node(self, place: Place, log: Log) -> Tensor:
        """The site's value [b, t, d], in the graph where it can be."""
        number = self._numbers[place][0]
        if number in log.nodes and place.plus is not None:
            return log.nodes[number] + self._node(Place(place.plus, "input"), log)
        return log.nodes.get(number, log.kept[number])


@torch.no_grad()
def _weigh(read: SiteLatents, active: tuple[Tensor, Tensor | None], slope: Tensor) -> Tensor:
    """[b, k]: −Σ_t f · (slope · direction)."""
    f, scale = active
    slope = slope.to(f) if scale is None else slope.to(f) * scale
    directions = cast(read.columns, f.dtype, f.device)["directions"]
    with plainly(f.device.type):
        return -(f * (slope @ directions.T)).sum(1)
