"""Watch: the places that an attribution looks at in one model, and the passes made there."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import nnsight
import torch
from torch import Tensor

from ..dictionaries.latents import Dictionary, Latents
from ..errors import GradientError, SiteError
from ..files.identity import model_key
from ..kernel.log import Log
from ..kernel.program import Program
from ..kernel.read import Norm, lift
from ..kernel.trace import whole_run
from ..kernel.view import View
from ..kernel.watch import Keep, Show
from ..metrics.base import Metric, Reader, Seen
from ..model.modules import torch_module
from ..model.route import Route, route
from ..model.sites import Place, Site
from ..results.receipt import Receipt
from ..shipping.payload import PAYLOAD_LIMIT
from ..verbs.base import Chain, Intervention
from ..verbs.lower import lower, sites_of
from ..verbs.visits import Visits
from .backward import Backward, Slopes, plain_slopes
from .remote_passes import Errand, leaves_of, nodes_of, pull, require_plain, run_afar
from .semantics import through

NOTHING = Chain(())


class Batch(NamedTuple):
    """Some prompts, left-padded, with what follows them.

    ``numbers`` [b] says which prompts of the data set they are, ``lengths`` [b, 1] how many real
    tokens of each row are the prompt's, None for all.
    """

    inputs: dict[str, Tensor]
    numbers: Tensor
    lengths: Tensor | None

    @property
    def tokens(self) -> int:
        """Columns of the batch times its rows: what a pass costs."""
        return self.inputs["input_ids"].numel()

    def rows(self) -> slice:
        """The prompts as a slice of the data set, for values that differ by prompt."""
        return slice(int(self.numbers[0]), int(self.numbers[-1]) + 1)

    def take(self, rows: Tensor) -> Batch:
        """Rows by number, repeated as wanted."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        lengths = None if self.lengths is None else self.lengths[rows]
        return Batch(inputs, self.numbers[rows], lengths)


class Pass(NamedTuple):
    """One forward pass.

    ``values`` at watched places [b, t, d] as edits left them, ``before`` as edits found them (if
    asked for), graph ``nodes``, the metric's own ``site`` value, ``logits`` [b, n, vocabulary].
    ``slopes`` computes gradients at the nodes.
    """

    values: dict[int, Tensor]
    before: dict[int, Tensor]
    nodes: dict[int, Tensor]
    site: Tensor | None
    logits: Tensor
    view: View
    receipt: Receipt
    slopes: Slopes = plain_slopes

    @property
    def last(self) -> Tensor:
        """[b, vocabulary], without graph."""
        return self.logits[:, -1].detach()


class Part(NamedTuple):
    """One dictionary's latents, and the numbers of the places it reads and writes."""

    dictionary: Dictionary
    indices: Sequence[int]
    read: int
    write: int
    transform: Norm


class Moved(NamedTuple):
    """Where places are moved to in a pass, and what share [b, 1, 1] of the way; None for all."""

    targets: Mapping[int, Tensor] = {}
    share: Tensor | None = None


class Watch:
    """The places to watch in one model, for some latents and a metric."""

    def __init__(
        self,
        latents: Latents,
        model: Any,
        metric: Metric,
        *,
        semantics: str = "pass_through",
        backward: Backward | None = None,
        remote: bool | str = False,
        limit: int = PAYLOAD_LIMIT,
    ) -> None:
        self.model, self.metric, self.backward = model, metric, backward
        self.remote, self.limit = remote, limit
        if remote:
            require_plain(semantics, backward)
            if remote != "local":
                model_key(model)
        self.module = torch_module(model)
        bases: list[Any] = [basis for basis, _ in latents.parts]
        self._sites = [site for basis in bases for site in (basis.site, basis.write_site)]
        self._sites += [] if metric.site is None else [metric.site]
        self._ways: dict[frozenset[Site], Route] = {}
        self.route = self.way(NOTHING)
        self._places: dict[Place, tuple[int, Site]] = {}
        self.parts = [self._part(basis, indices) for basis, indices in latents.parts]
        self.written = {part.write: part.dictionary.write_site for part in self.parts}
        self.through = through(self.parts) if semantics == "through_sae" else {}
        self.reader: Reader = metric.reader(getattr(model, "tokenizer", None))
        self.site = None if metric.site is None else self.route.places[metric.site]
        require_upstream("Attribute", metric, self.written.values(), self.route)

    def _part(self, basis: Any, indices: Sequence[int]) -> Part:
        dictionary: Dictionary = basis
        self.route.check(dictionary, "dictionary")
        self.route.writable(dictionary.write_site, "Attribute")
        _require_tokenwise(dictionary)
        read, place = self._number(dictionary.site), self.route.places[dictionary.site]
        write = self._number(dictionary.write_site)
        norm = Norm(kind=place.transform, eps=place.eps)
        return Part(dictionary, indices, read, write, norm)

    def way(self, intervention: Intervention) -> Route:
        """The route past all that is watched and all that an intervention visits."""
        others = frozenset(sites_of(intervention))
        if others not in self._ways:
            self._ways[others] = route(self.model, [*self._sites, *others])
        return self._ways[others]

    def _number(self, site: Site) -> int:
        place = self.route.places[site]
        key = Place(place.path, place.end, plus=place.plus)
        return self._places.setdefault(key, (len(self._places), site))[0]

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
    ) -> Pass:
        """One forward pass; ``gradient`` numbers the places whose values are nodes of the graph.

        The values are kept as the intervention left them. Each goes to its target first, or a
        ``share`` [b, 1, 1] of the way from where this pass has it.
        """
        way = self.way(intervention)
        program = lower(intervention, self.model, batch.rows(), way)
        moved = Moved(targets or {}, share)
        program = self.add(program, gradient, moved, way, before=before, copy=copy)
        if self.remote:
            return self._afar(batch, program, intervention, bool(gradient))
        slopes: Slopes = plain_slopes
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(bool(gradient)))
            if self.backward is not None and gradient:
                slopes = stack.enter_context(self.backward.applied(self.module))
            log, logits = self.trace(batch, program)
        return self.seen(log, logits, intervention.receipt(log))._replace(slopes=slopes)

    def _afar(
        self, batch: Batch, program: Program, intervention: Intervention, gradient: bool
    ) -> Pass:
        """The pass on a server; with ``gradient``, slopes that are taken there."""
        columns = self.columns(batch)
        place = (self.model, self.remote, program, batch.inputs, batch.lengths, columns)
        errand = Errand(*place, self._options(columns), self.limit)
        log, logits = run_afar(errand)
        receipt = intervention.receipt(log)
        if not gradient:
            return self.seen(log, logits, receipt)
        leaves = leaves_of(log, logits)
        here = self.seen(log, logits, receipt)
        nodes: dict[int, Any] = dict.fromkeys(nodes_of(program))  # they are there, by number
        return here._replace(nodes=nodes, slopes=partial(pull, errand, leaves))

    def _options(self, columns: int) -> dict[str, Any]:
        """What a pass is called with: no cache, and no logits but those wanted."""
        wanted = {"use_cache": False} | ({"logits_to_keep": columns} if columns else {})
        accepted = inspect.signature(self.module.forward).parameters
        return {name: value for name, value in wanted.items() if name in accepted}

    def trace(self, batch: Batch, program: Program) -> tuple[Log, Tensor]:
        """The pass itself: its log, and the logits of the columns that the metric reads."""
        model, columns = self.model, self.columns(batch)
        options = self._options(columns)
        with model.trace(**options) as tracer:
            with tracer.invoke(batch.inputs):
                log = nnsight.save(Log())
                whole_run(model, program, log, batch.lengths)
            with tracer.invoke():
                logits = nnsight.save(model.output.logits[:, -columns:])
        return log, logits

    def columns(self, batch: Batch) -> int:
        """How many last columns of logits are wanted; 0 for all of them."""
        if self.metric.columns == "all":
            return 0
        if batch.lengths is None:
            return 1
        real = batch.inputs["attention_mask"].sum(1, keepdim=True)
        return int((real - batch.lengths).max()) + 1

    def seen(self, log: Log, logits: Tensor, receipt: Receipt) -> Pass:
        """The site values, masks and logits of one forward pass, from its log."""
        site = log.shown.get("metric")
        if site is not None and self.site is not None:
            site = lift(site, Norm(kind=self.site.transform, eps=self.site.eps))
        return Pass(log.kept, log.before, log.nodes, site, logits, log.view, receipt)

    def add(
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
        reached = sorted(self._places.values(), key=lambda entry: way.orders[entry[1]])
        first = next((number for number, _ in reached if number in gradient), None)
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
        self._show(visits, way)
        return program.replace(visits=visits.ordered())

    def _show(self, visits: Visits, way: Route) -> None:
        """Values that are read with their graph: the metric's site, transcoders' inputs."""
        sources = {source for source, _ in self.through.values() if source is not None}
        for place, (number, site) in self._places.items():
            if number in sources:
                visits.add(place, way.orders[site], Show(name=number, plus=place.plus))
        if self.site is not None and self.metric.site is not None:
            if self.site.plus is not None:
                visits.stash(self.site.plus, way.starts[self.site.plus])
            order = way.orders[self.metric.site]
            visits.add(self.site, order, Show(name="metric", plus=self.site.plus))

    def read(self, batch: Batch, here: Pass, clean: Tensor, base: Tensor | None) -> Tensor:
        """The metric of a pass, [b]; ``clean`` and ``base`` are those runs' last logits."""
        top = None if base is None else base.argmax(-1)
        return self.reader(Seen(here.logits, top, batch.numbers, here.view, clean, base, here.site))


def require_upstream(where: str, metric: Metric, written: Iterable[Site], way: Route) -> None:
    """Refuse sites that the metric's own site does not depend on: zeros would say so badly.

    Raises:
        SiteError: naming the first such site.
    """
    if metric.site is None:
        return
    late = [site for site in written if way.orders[site] > way.orders[metric.site]]
    if late:
        raise SiteError(
            f"{where}: `metric` is at {metric.site}, and latents written at {late[0]}, wanted"
            " latents written no later than the metric's site. Likely cause: the model reaches"
            " these latents after what they are to explain. Try: latents of the sites before it:"
            " saes.latents({0: [3]})"
        )


def _require_tokenwise(dictionary: Dictionary) -> None:
    """Refuse latents that depend on earlier tokens: their change reaches later tokens' latents.

    Raises:
        GradientError: naming the dictionary.
    """
    if dictionary.prefix:
        raise GradientError(
            f"Attribute: `target` is {dictionary!r}, wanted latents that depend on their own"
            " token's value alone. Likely cause: a temporal SAE, whose latents mix positions, so"
            " that scores of single tokens mean nothing. Try: ablate them one by one with run"
        )
