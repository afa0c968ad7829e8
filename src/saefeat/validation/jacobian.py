"""Jacobian: gradients between chosen latents through the bare model, which edges are read from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..dictionaries.latents import Dictionary, Latents, cast, index_tensor
from ..kernel.encode import encode
from ..kernel.log import Log
from ..kernel.read import Norm, lift
from ..kernel.tokens import select
from ..kernel.watch import Keep
from ..metrics.evaluator import Batch, forward
from ..model.route import Route
from ..model.sites import Order, Place, Site
from ..text.rules import plain
from ..text.tokens import Tokens
from ..verbs.base import Chain
from ..verbs.lower import lower
from ..verbs.rules import acts_at
from ..verbs.visits import Visits

if TYPE_CHECKING:
    from nnsight import TransformersModel


class SiteLatents(NamedTuple):
    """Latents of one dictionary, the place they are read or written, and its norm."""

    dictionary: Dictionary
    columns: dict[str, Any]
    place: Place
    norm: Norm
    rule: tuple


class Jacobian:
    """Gradients of downstream latents at the places upstream latents write, in the bare model."""

    def __init__(
        self, model: TransformersModel, way: Route, up: Latents, down: Latents, where: Tokens | None
    ) -> None:
        self._model, self._route = model, way
        self.up, self.down, self.where = up, down, where
        self._numbers: dict[Place, tuple[int, Order]] = {}
        self._reads = [self._part(*part, None, write=False) for part in up.parts]
        self._writes = [self._part(*part, None, write=True) for part in up.parts]
        self._sinks = [self._part(*part, where, write=False) for part in down.parts]
        written = {self._numbers[part.place] for part in self._writes}
        self._first = min(written, key=lambda entry: entry[1])[0]

    def _part(self, basis: Any, indices: Any, where: Tokens | None, *, write: bool) -> SiteLatents:
        site: Site = basis.write_site if write else basis.site
        way = self._route.writable(site, "edges") if write else self._route.places[site]
        place = Place(way.path, way.end, plus=way.plus)
        self._numbers.setdefault(place, (len(self._numbers), self._route.orders[site]))
        if place.plus is not None:  # resid_mid: the block's input is the other half of its value
            block = Place(place.plus, "input")
            order = self._route.starts[place.plus]
            self._numbers.setdefault(block, (len(self._numbers), order))
        rule = plain(acts_at(where, basis, self._model).rule, self._model)
        columns = basis.columns(index_tensor(indices))
        norm = Norm(kind=way.transform, eps=way.eps)
        return SiteLatents(basis, columns, place, norm, rule)

    def values(self, batch: Batch) -> dict[str, Tensor]:
        """``values`` [u, d, b], the edges of one batch; whether either side was active at all."""
        log = self._run(batch)
        with torch.enable_grad():
            sums = torch.cat([self._sum(part, log) for part in self._sinks], -1)  # [b, d]
        nodes = [log.nodes[self._numbers[part.place][0]] for part in self._writes]
        active, effects = [self._active(read, log) for read in self._reads], []
        for j in range(sums.shape[1]):
            slopes = torch.autograd.grad(
                sums[:, j].sum(), nodes, retain_graph=True, materialize_grads=True,
                allow_unused=True,
            )  # fmt: skip
            parts = zip(self._reads, active, slopes, strict=True)
            effects.append(torch.cat([_weigh(*part) for part in parts], -1))  # [b, u]
        return {
            "values": torch.stack(effects).permute(2, 0, 1).float().cpu(),
            "upstream": torch.stack([f.any() for f, _ in active]).any(),
            "downstream": sums.any(),
        }

    def _run(self, batch: Batch) -> Log:
        """One forward pass in which every place's value is kept as a node of the graph."""
        program = lower(Chain(()), self._model)
        visits = Visits()
        for place, (number, order) in self._numbers.items():
            if place.plus is not None:
                visits.stash(place.plus, self._route.starts[place.plus])
            # what lies before the first written place needs no gradient, and frozen models work
            gradient = order >= self._order(self._first)
            first = number == self._first
            keep = Keep(number=number, plus=place.plus, gradient=gradient, first=first)
            visits.add(place, order, keep)
        program = program.replace(visits=visits.ordered())
        with torch.enable_grad():
            log, _ = forward(self._model, batch, program, columns=1)
        return log

    def _order(self, number: int) -> Order:
        return next(order for other, order in self._numbers.values() if other == number)

    def _node(self, place: Place, log: Log) -> Tensor:
        """The site's value [b, t, d], in the graph where it can be."""
        number = self._numbers[place][0]
        if number not in log.nodes:
            return log.kept[number]
        x = log.nodes[number]
        if place.plus is None:
            return x
        return x + self._node(Place(place.plus, "input"), log)

    def _sum(self, part: SiteLatents, log: Log) -> Tensor:
        """[b, k]: each downstream latent's activation, summed over its tokens."""
        x = lift(self._node(part.place, log), part.norm)
        f = encode(cast(part.columns, x.dtype, x.device), x)[0]  # [b, t, k]
        mask = select(part.rule, log.view).to(x.device)
        f = torch.where(mask[..., None], f, 0.0)
        return f.sum(1)

    @torch.no_grad()
    def _active(self, read: SiteLatents, log: Log) -> tuple[Tensor, Tensor | None]:
        """[b, t, k]: what upstream latents are at their tokens, and the scale of directions."""
        x = lift(log.kept[self._numbers[read.place][0]], read.norm)
        f, scale = encode(cast(read.columns, x.dtype, x.device), x)
        return torch.where(select(read.rule, log.view).to(x.device)[..., None], f, 0.0), scale


@torch.no_grad()
def _weigh(read: SiteLatents, active: tuple[Tensor, Tensor | None], slope: Tensor) -> Tensor:
    """[b, k]: −Σ_t f · (slope · direction)."""
    f, scale = active
    slope = slope.to(f.device, f.dtype)
    directions = cast(read.columns, f.dtype, f.device)["directions"]
    along = (slope if scale is None else slope * scale) @ directions.T
    return -(f * along).sum(1)
