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
from ..kernel.program import lift, new_log
from ..kernel.trace import whole_run
from ..metrics.base import Metric, Reader, Seen
from ..model.modules import torch_module
from ..model.route import Route, route
from ..model.sites import Place, Site
from ..results.receipt import Receipt
from ..shipping.payload import PAYLOAD_LIMIT
from ..verbs.base import Chain, Intervention
from ..verbs.lower import add_stash, add_visit, in_order, lower, sites_of
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
    view: dict[str, Any]
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
    transform: dict[str, Any]


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
        transform = {"transform": place.transform, "eps": place.eps}
        return Part(dictionary, indices, read, write, transform)

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
        self.add(program, gradient, Moved(targets or {}, share), way, before=before, copy=copy)
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
        self, batch: Batch, program: dict[str, Any], intervention: Intervention, gradient: bool
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
        log["nodes"] = dict.fromkeys(nodes_of(program))
        return self.seen(log, logits, receipt)._replace(slopes=partial(pull, errand, leaves))

    def _options(self, columns: int) -> dict[str, Any]:
        """What a pass is called with: no cache, and no logits but those wanted."""
        wanted = {"use_cache": False} | ({"logits_to_keep": columns} if columns else {})
        accepted = inspect.signature(self.module.forward).parameters
        return {name: value for name, value in wanted.items() if name in accepted}

    def trace(self, batch: Batch, program: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """The pass itself: its log, and the logits of the columns that the metric reads."""
        model, columns = self.model, self.columns(batch)
        options = self._options(columns)
        with model.trace(**options) as tracer:
            with tracer.invoke(batch.inputs):
                log = nnsight.save(new_log())
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

    def seen(self, log: dict[str, Any], logits: Tensor, receipt: Receipt) -> Pass:
        """A log as a pass."""
        kept = log["kept"]
        values = {key: value for key, value in kept.items() if isinstance(key, int)}
        before = {key[1]: value for key, value in kept.items() if not isinstance(key, int)}
        site = log["shown"].get("metric")
        if site is not None and self.site is not None:
            site = lift(site, {"transform": self.site.transform, "eps": self.site.eps})
        return Pass(values, before, log["nodes"], site, logits, log["view"], receipt)

    def add(
        self,
        program: dict[str, Any],
        gradient: Collection[int],
        moved: Moved,
        way: Route,
        *,
        before: bool = False,
        copy: bool = True,
        detach: bool = True,
    ) -> None:
        """A keep action at the end of each watched visit, and what else is to be read."""
        visits = {Place(visit["path"], visit["end"]): visit for visit in program["visits"]}
        reached = sorted(self._places.values(), key=lambda entry: way.orders[entry[1]])
        first = next((number for number, _ in reached if number in gradient), None)
        for place, (number, site) in self._places.items():
            if place.plus is not None:
                add_stash(visits, place.plus, way.starts[place.plus])
            actions = add_visit(visits, place, way.orders[site])["actions"]
            plain: dict[str, Any] = {"do": "keep", "id": number, "plus": place.plus, "copy": copy}
            plain |= {"target": None, "share": moved.share, "gradient": False, "first": False}
            plain |= {"through": None, "source": None}
            if before:
                actions.insert(0, plain | {"id": ("before", number)})
            graph: dict[str, Any] = {
                "gradient": number in gradient,
                "first": detach and number == first,
            }
            if graph["gradient"] and not graph["first"] and number in self.through:
                graph["source"], graph["through"] = self.through[number]
            actions.append(plain | graph | {"target": moved.targets.get(number)})
        self._show(visits, way)
        program["visits"] = in_order(visits)

    def _show(self, visits: dict[Place, dict[str, Any]], way: Route) -> None:
        """Values that are read with their graph: the metric's site, transcoders' inputs."""
        sources = {source for source, _ in self.through.values() if source is not None}
        for place, (number, site) in self._places.items():
            if number in sources:
                action = {"do": "show", "id": number, "plus": place.plus}
                add_visit(visits, place, way.orders[site])["actions"].append(action)
        if self.site is not None and self.metric.site is not None:
            if self.site.plus is not None:
                add_stash(visits, self.site.plus, way.starts[self.site.plus])
            action = {"do": "show", "id": "metric", "plus": self.site.plus}
            order = way.orders[self.metric.site]
            add_visit(visits, self.site, order)["actions"].append(action)

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
