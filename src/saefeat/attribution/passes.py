"""SitePasses: the places that dictionaries read and write in one model, and passes made there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import GradientError
from ..kernel.program import Program
from ..kernel.read import Norm
from ..kernel.state import Log
from ..kernel.watch import Keep, Show
from ..metrics.base import require_tokenwise
from ..metrics.evaluator import NOTHING, Batch, Evaluator, Pass, pass_options
from ..model.route import Route
from ..model.sites import Place, Site
from ..results.provenance import model_key
from ..shipping.payload import PAYLOAD_LIMIT
from ..verbs.base import Intervention
from ..verbs.lower import Visits, lower
from .job import Job
from .methods import Slopes, plain_slopes
from .pairs import Part
from .remote_passes import Errand, leaves_of, nodes_of, pull, require_plain, run_afar
from .semantics import through

if TYPE_CHECKING:
    from nnsight import TransformersModel


@dataclass(frozen=True)
class SitePass(Pass):
    """One forward pass past watched places.

    ``values`` [b, t, d] at the places as edits left them, ``before`` as edits found them (if asked
    for), graph ``nodes``; ``slopes`` computes gradients at the nodes.
    """

    values: dict[int, Tensor]
    before: dict[int, Tensor]
    nodes: dict[int, Tensor]
    slopes: Slopes


class Moved(NamedTuple):
    """Where places are moved to in a pass, and what share [b, 1, 1] of the way; None for all."""

    targets: Mapping[int, Tensor] = {}
    share: Tensor | None = None


class SitePasses:
    """The places to watch in one model, for an attribution's latents and metric."""

    def __init__(
        self,
        job: Job,
        model: TransformersModel,
        remote: bool | str = False,
        limit: int = PAYLOAD_LIMIT,
    ) -> None:
        self.backward, self.remote, self.limit = job.backward, remote, limit
        if remote:
            require_plain(job.semantics, job.backward)
            if remote != "local":
                model_key(model)
        bases: list[tuple[Any, Any]] = list(job.target.parts)
        sites = [site for basis, _ in bases for site in (basis.site, basis.write_site)]
        self.evaluator = Evaluator(model, job.metric, sites)
        route = self.evaluator.route
        self._places: dict[Place, tuple[int, Site]] = {}
        self.parts: list[Part] = []
        for basis, indices in bases:
            route.check(basis, "dictionary")
            route.writable(basis.write_site, "Attribute")
            require_tokenwise("Attribute", "target", basis, GradientError)
            numbers = {}
            for site in (basis.site, basis.write_site):
                place = route.places[site]
                key = Place(place.path, place.end, plus=place.plus)
                numbers[site] = self._places.setdefault(key, (len(self._places), site))[0]
            place = route.places[basis.site]
            norm = Norm(kind=place.transform, eps=place.eps)
            read, write = numbers[basis.site], numbers[basis.write_site]
            self.parts.append(Part(basis, indices, read, write, norm))
        self.written = {part.write: part.dictionary.write_site for part in self.parts}
        self.through = through(self.parts) if job.semantics == "through_sae" else {}
        self.evaluator.require_upstream("Attribute", self.written.values())

    def run(
        self,
        batch: Batch,
        intervention: Intervention = NOTHING,
        *,
        gradient: Collection[int] = (),
        targets: Mapping[int, Tensor] | None = None,
        share: Tensor | None = None,
        before: bool = False,
        copy: bool = True,
    ) -> SitePass:
        """One forward pass; ``gradient`` numbers the places whose values are nodes of the graph.

        The values are kept as the intervention left them. Each goes to its target first, or a
        ``share`` [b, 1, 1] of the way from where this pass has it.
        """
        evaluator = self.evaluator
        way, moved = evaluator.route_with(intervention), Moved(targets or {}, share)
        program = lower(intervention, evaluator.model, batch.rows(), way)
        program = self.watched(program, gradient, moved, way, before=before, copy=copy)
        if self.remote:
            log, logits, nodes, slopes = self._remote(batch, program, bool(gradient))
        else:
            with ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(bool(gradient)))
                slopes = plain_slopes
                if self.backward is not None and gradient:
                    slopes = stack.enter_context(self.backward.applied(evaluator.module))
                log, logits = evaluator.forward(batch, program)
            nodes = log.nodes
        run = evaluator.passed(log, logits, intervention.receipt(log))
        return SitePass(**vars(run), values=log.kept, before=log.before, nodes=nodes, slopes=slopes)

    def _remote(
        self, batch: Batch, program: Program, gradient: bool
    ) -> tuple[Log, Tensor, dict[int, Any], Slopes]:
        """The pass on a server; with ``gradient``, slopes that are taken there."""
        model, columns = self.evaluator.model, self.evaluator.columns(batch)
        place = (model, self.remote, program, batch.inputs, batch.lengths, columns)
        errand = Errand(*place, pass_options(model, columns), self.limit)
        log, logits = run_afar(errand)
        if not gradient:
            return log, logits, log.nodes, plain_slopes
        nodes = dict.fromkeys(nodes_of(program))  # they are there, by number
        return log, logits, nodes, partial(pull, errand, leaves_of(log, logits))

    def watched(
        self,
        program: Program,
        gradient: Collection[int],
        moved: Moved,
        way: Route,
        *,
        before: bool = False,
        copy: bool = True,
        detach: bool = True,
    ) -> Program:
        """The program with a ``Keep`` behind each watched visit, and what else is to be read."""
        visits = Visits(program.visits)
        asked = [(way.orders[s], n) for n, s in self._places.values() if n in gradient]
        first = min(asked)[1] if asked else None
        for place, (number, site) in self._places.items():
            order = way.orders[site]
            if place.plus is not None:
                visits.stash(place.plus, way.starts[place.plus])
            if before:
                keep = Keep(number=number, plus=place.plus, before=True, copy=copy)
                visits.add(place, order, keep, first=True)
            keep = Keep(
                number=number, plus=place.plus, copy=copy, gradient=number in gradient,
                first=detach and number == first, target=moved.targets.get(number),
                share=moved.share,
            )  # fmt: skip
            if keep.gradient and not keep.first and number in self.through:
                source, passing = self.through[number]
                keep = keep.replace(source=source, through=passing)
            visits.add(place, order, keep)
        # Values that are read with their graph: transcoders' inputs, and the metric's own site.
        sources = {source for source, _ in self.through.values() if source is not None}
        for place, (number, site) in self._places.items():
            if number in sources:
                visits.add(place, way.orders[site], Show(name=number, plus=place.plus))
        self.evaluator.show(visits, way)
        return program.replace(visits=visits.ordered())
