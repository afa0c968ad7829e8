"""What an attribution is asked, and SitePasses: the places watched in a model, and passes there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..checks import one_a_prompt
from ..dictionaries.latents import Dictionary, Latents
from ..errors import CheckpointError, FiringError, GradientError, SiteError
from ..files.hashing import digest
from ..kernel.program import Program
from ..kernel.read import Norm
from ..kernel.spread import Added
from ..kernel.state import Log, View
from ..kernel.tokens import select
from ..kernel.watch import Keep, Show
from ..metrics.base import Metric, require_tokenwise
from ..metrics.evaluator import (
    NOTHING,
    Batch,
    Data,
    Evaluator,
    Pass,
    continued,
    metric_data,
    pass_options,
)
from ..model.route import Route
from ..model.sites import Place, Site
from ..model.wrappers import require_unwrapped
from ..results.provenance import (
    HASH,
    Provenance,
    called_there,
    elsewhere,
    model_key,
    provenance,
    together,
    told,
)
from ..shipping.client import Deadline
from ..shipping.server import Server
from ..text.prompts import Prompts, encode_for
from ..text.tokens import Tokens, plain
from ..verbs.base import Intervention, require_rows
from ..verbs.lower import Visits, acts_at, lower
from ..verbs.reach import require_behind, require_reached
from .baselines import Baseline, Fixed, Paired, require_pairs
from .crossing import crossed
from .methods import Backward, Method, Slopes, plain_slopes
from .pairs import Part
from .remote_passes import (
    RemotePass,
    leaves_of,
    nodes_of,
    pull,
    requests,
    require_plain,
    run_remote,
)
from .semantics import through

if TYPE_CHECKING:
    from nnsight import TransformersModel


AtOnce = str | int


class Moving(Protocol):
    """A pass to be made: a batch, and what written places are moved to or by, [b, t, d] each."""

    @property
    def batch(self) -> Batch: ...

    @property
    def targets(self) -> Mapping[int, Tensor]: ...

    @property
    def steps(self) -> Mapping[int, Tensor]: ...


M = TypeVar("M", bound=Moving)


class Job(NamedTuple):
    """The fields of an ``Attribute``, which documents them, with its target as latents."""

    target: Latents
    metric: Metric
    baseline: Baseline
    method: Method
    where: Tokens | None
    semantics: str
    one_site: bool
    backward: Backward | None
    keep: int | None

    @property
    def at_clean_alone(self) -> bool:
        """Whether the one gradient taken is that of the clean run."""
        return [alpha for alpha, _ in self.method.nodes()] == [0.0]

    @property
    def as_published(self) -> bool:
        """Whether the path ends before the baseline's own edits, as in the refusal paper's code."""
        return getattr(self.method, "endpoint", "") == "as_published"


def source(job: Job, model: object, there: Sequence[dict[str, str]] = ()) -> Provenance:
    """Where an attribution comes from: the model, all dictionaries, and how they were scored.

    ``there`` is what servers said of themselves.
    """
    asked = {name: getattr(job, name) for name in ("method", "where", "one_site", "backward")}
    settings = told(**asked, keep=job.keep)
    settings["baseline"] = "zero" if job.baseline is None else told(b=job.baseline)["b"]
    settings["semantics"] = job.semantics
    with suppress(CheckpointError):  # of a baseline with a function that cannot be hashed
        settings |= {} if job.baseline is None else {HASH: digest(job.baseline)}
    found = provenance(model, job.target.parts, settings=settings)
    return together([elsewhere(found, said) for said in there]) if there else found


class Prepared(NamedTuple):
    """Encoded prompts, and those they are paired with."""

    data: Data
    others: Data | None = None

    def batches(self, size: int) -> list[tuple[Batch, Batch | None]]:
        """At most ``size`` prompts each, with their pairs."""
        batches = self.data.batches(size)
        others = [None] * len(batches) if self.others is None else self.others.batches(size)
        return list(zip(batches, others, strict=True))


def prepare(job: Job, model: TransformersModel, prompts: Prompts) -> Prepared:
    """Prompts encoded, continued where the metric wants it, and as many as values are made for."""
    data = metric_data("Attribute", model, prompts, job.metric)
    if isinstance(job.baseline, Fixed):
        one_a_prompt("Attribute", "baseline", job.baseline.prompts, data.prompts)
    if isinstance(job.baseline, Intervention):
        require_rows(job.baseline, data.prompts)
    if not isinstance(job.baseline, Paired):
        return Prepared(data)
    others = encode_for(model, job.baseline.prompts)
    require_pairs(job.baseline, data.prompts, len(others["input_ids"]))
    return Prepared(data, continued(model, others, job.metric))


def require_scored(tokens: Tensor, function: str) -> None:
    """Refuse a result in which no token was scored: it would read as "no effect".

    ``tokens`` [prompts] are the counts.
    """
    if not bool(tokens.any()):
        raise FiringError(
            f"{function}: `where` is a rule that selects no token in any of {len(tokens)} prompts,"
            " wanted a token to score. Likely cause: ids or a role these prompts lack, or tokens"
            " the dictionary was not trained on. Try: where=Tokens.all(), or Texts.select(rule)"
        )


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


class SitePasses:
    """The places to watch in one model, for an attribution's latents and metric."""

    def __init__(
        self,
        job: Job,
        model: TransformersModel,
        on: Server | None = None,
    ) -> None:
        self.backward, self.on = job.backward, on
        self._deadline = Deadline(None if on is None else on.timeout)
        self.there: list[dict[str, str]] = []  # what servers said of themselves, each once
        if on is not None:
            require_plain(job.semantics, job.backward)
            require_unwrapped("Attribute", model)
            if not on.is_local:
                model_key(model)
        bases: list[tuple[Any, Any]] = list(job.target.parts)
        sites = [site for basis, _ in bases for site in (*basis.read_sites, *basis.write_sites)]
        self.evaluator = Evaluator(model, job.metric, "Attribute", sites, GradientError)
        self._places: dict[Place, tuple[int, Site]] = {}
        self.parts: list[Part] = []
        for basis, indices in bases:
            require_tokenwise("Attribute", "target", basis, GradientError)
            reads, writes, norms = self._sites_of(basis, job)
            rule = acts_at(job.where, basis, model)
            if job.where is None and job.metric.continuation is not None:
                rule &= Tokens.prompt()  # a continuation is not scored, unless asked for
            own = plain(rule.rule, model)
            self.parts.append(Part(basis, indices, reads, writes, norms, own))
        pairs = (zip(part.writes, part.dictionary.write_sites, strict=True) for part in self.parts)
        self.written: dict[int, Site] = {n: site for every in pairs for n, site in every}
        self.through = through(self.parts) if job.semantics == "through_sae" else {}
        self.evaluator.require_upstream(self.written.values())

    def _sites_of(
        self, basis: Dictionary, job: Job
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Norm, ...]]:
        """The places a dictionary reads and writes, by number, and the norms of those it reads."""
        route = self.evaluator.route
        route.check(basis, "dictionary")
        if len(basis.write_sites) > 1 and job.one_site:
            raise SiteError(
                f"Attribute: `one_site` is True, with {basis!r}, wanted False, or dictionaries that"
                " write at one site. Likely cause: a cross-layer transcoder moves all its write"
                " sites at once. Try: one_site=False, or"
                f' dictionary.written_at("{basis.write_site}")'
            )
        require_reached("Attribute", basis, route.orders)
        if len(basis.read_sites) > 1 or len(basis.write_sites) > 1:
            require_behind("Attribute", basis, route.orders)
        for site in basis.write_sites:
            route.writable(site, "Attribute")
        numbers: dict[Site, int] = {}
        for site in (*basis.read_sites, *basis.write_sites):
            entry = (len(self._places), site)
            numbers[site] = self._places.setdefault(route.places[site].plain(), entry)[0]
        reads, writes = (
            tuple(numbers[site] for site in sites)
            for sites in (basis.read_sites, basis.write_sites)
        )
        read = [route.places[site] for site in basis.read_sites]
        return reads, writes, tuple(Norm(kind=place.transform, eps=place.eps) for place in read)

    def scored(self, view: View) -> tuple[Tensor, ...]:
        """[b, t] a part: which tokens of a pass are scored."""
        return tuple(select(part.rule, view) for part in self.parts)

    def run(
        self,
        batch: Batch,
        intervention: Intervention = NOTHING,
        *,
        gradient: Collection[int] = (),
        targets: Mapping[int, Tensor] = {},
        steps: Mapping[int, Tensor] = {},
        share: Tensor | None = None,
        before: bool = False,
        copy: bool = True,
    ) -> SitePass:
        """One forward pass; ``gradient`` numbers the places whose values are nodes of the graph.

        The values are kept as the intervention left them. Each goes to its target first, or a
        ``share`` [b, 1, 1] of the way from where this pass has it; ``steps`` are added to it.
        """
        evaluator, way = self.evaluator, self.evaluator.route_with(intervention)
        program = lower(intervention, evaluator.model, batch.rows(), way)
        moves = {"targets": targets, "steps": steps, "share": share}
        program = self.watched(program, way, gradient, **moves, before=before, copy=copy)
        if self.on is not None:
            asked = self._asked(batch, program, self.on)
            ((log, logits),) = self._remote([asked], self.on)
            nodes: dict[int, Any] = log.nodes
            slopes: Slopes = plain_slopes
            if gradient:  # the nodes are there, by number
                nodes = dict.fromkeys(nodes_of(program))
                slopes = partial(pull, asked, leaves_of(log, logits))
        else:
            with ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(bool(gradient)))
                if gradient:
                    stack.enter_context(crossed("Attribute", evaluator.module))
                slopes = plain_slopes
                if self.backward is not None and gradient:
                    slopes = stack.enter_context(self.backward.applied(evaluator.module))
                log, logits = evaluator.forward(batch, program)
            nodes = log.nodes
        run = evaluator.passed(log, logits, intervention.receipt(log))
        return SitePass(**vars(run), values=log.kept, before=log.before, nodes=nodes, slopes=slopes)

    def runs(self, moves: Iterable[M]) -> Iterator[tuple[M, SitePass]]:
        """Passes with places moved, one after the other; those on a server share requests."""
        if (on := self.on) is None:
            for move in moves:
                run = self.run(move.batch, targets=move.targets, steps=move.steps, copy=False)
                yield move, run
            return
        evaluator, way = self.evaluator, self.evaluator.route
        nothing = lower(NOTHING, evaluator.model, slice(0, 0), way)

        def asked(move: M) -> tuple[M, RemotePass]:
            targets, steps = move.targets, move.steps
            program = self.watched(nothing, way, (), targets=targets, steps=steps, copy=False)
            return move, self._asked(move.batch, program, on)

        for group in requests(map(asked, moves)):
            found = self._remote([one for _, one in group], on)
            for (move, _), (log, logits) in zip(group, found, strict=True):
                run = evaluator.passed(log, logits, NOTHING.receipt(log))
                yield (
                    move,
                    SitePass(**vars(run), values={}, before={}, nodes={}, slopes=plain_slopes),
                )

    def _asked(self, batch: Batch, program: Program, on: Server) -> RemotePass:
        """A pass as a server is asked for it."""
        model, columns = self.evaluator.model, self.evaluator.columns(batch)
        inputs = (batch.inputs, batch.lengths, columns, pass_options(model, columns))
        return RemotePass(model, program, *inputs, on, self._deadline)

    def _remote(self, asked: Sequence[RemotePass], on: Server) -> list[tuple[Log, Tensor]]:
        """Passes on a server, in one request, which says where it ran."""
        found, there = run_remote(asked)
        if not on.is_local:
            self.heard({**called_there(self.evaluator.model, on.remote), **there})
        return found

    def heard(self, there: dict[str, str]) -> None:
        """Keep what a server said of itself."""
        if there and there not in self.there:
            self.there.append(there)

    def watched(
        self,
        program: Program,
        way: Route,
        gradient: Collection[int],
        *,
        targets: Mapping[int, Tensor] = {},
        steps: Mapping[int, Tensor] = {},
        share: Tensor | None = None,
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
            if number in steps:
                visits.add(place, order, Added(step=steps[number]))
            keep = Keep(
                number=number, plus=place.plus, copy=copy, gradient=number in gradient,
                first=detach and number == first, target=targets.get(number), share=share,
            )  # fmt: skip
            # where no gradient is taken as well: one that is taken upstream passes here
            if gradient and not keep.first and number in self.through:
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
