"""Prompts in batches, passes of one model over them, and a metric read off each pass.

``measure`` asks an ``Evaluator`` for values; attribution adds watched places and gradients to its
passes; validation measures under many edits with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import nnsight
import torch
from torch import Tensor

from ..arguments import checked
from ..checks import one_a_prompt, whole
from ..errors import PromptError, SaefeatError, SiteError
from ..generation.task import require_numbers
from ..kernel.program import Program, whole_run
from ..kernel.read import Norm, lift
from ..kernel.state import Log, View
from ..kernel.watch import Show
from ..model.alone import alone
from ..model.modules import torch_module
from ..model.route import Route, route
from ..model.sites import Site
from ..model.wrappers import require_logits, root
from ..results.receipt import Receipt, join_receipts
from ..text.limits import limits_of, require_fits
from ..text.padding import left_padded, pad_of
from ..text.prompts import Prompts, encode_for
from ..verbs.base import Chain, Intervention, require_fired, require_rows
from ..verbs.lower import Visits, lower, sites_of
from .apart import Asker, one_a_row, require_apart, require_in_order
from .base import Metric, Reader, Seen

if TYPE_CHECKING:
    from nnsight import TransformersModel

NOTHING = Chain(())
"""The intervention of a bare run."""


class Batch(NamedTuple):
    """Some prompts, left-padded, with what follows them.

    ``numbers`` [b] says which prompts of the data set they are, ``lengths`` [b, 1] how many real
    tokens of each row are the prompt's, None for all.
    """

    inputs: dict[str, Tensor]
    numbers: Tensor
    lengths: Tensor | None

    def rows(self) -> slice:
        """The prompts as a slice of the data set, for values that differ by prompt."""
        return slice(int(self.numbers[0]), int(self.numbers[-1]) + 1)

    def take(self, rows: Tensor) -> Batch:
        """Rows by number, repeated as wanted."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        lengths = None if self.lengths is None else self.lengths[rows]
        return Batch(inputs, self.numbers[rows], lengths)


class Data(NamedTuple):
    """All prompts of a call, left-padded, and how long each prompt itself is, [n, 1]."""

    inputs: dict[str, Tensor]
    lengths: Tensor | None = None

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(self.inputs["input_ids"])

    def batches(self, size: int) -> list[Batch]:
        """Rows in order, at most ``size`` each, without columns that are all padding."""
        batches = []
        for start in range(0, self.prompts, size):
            rows = slice(start, start + size)
            mask = self.inputs["attention_mask"][rows]
            first = int((mask.sum(0) == 0).long().argmin())
            inputs = {name: tensor[rows, first:] for name, tensor in self.inputs.items()}
            lengths = None if self.lengths is None else self.lengths[rows]
            batches.append(Batch(inputs, torch.arange(start, start + len(mask)), lengths))
        return batches

    def take(self, rows: Tensor) -> Data:
        """Rows by number, repeated as wanted."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return Data(inputs, None if self.lengths is None else self.lengths[rows])


def metric_data(function: str, model: TransformersModel, prompts: Prompts, metric: Metric) -> Data:
    """Prompts encoded, and continued where the metric wants it."""
    inputs = encode_for(model, prompts)
    one_a_prompt(function, "metric", metric.prompts, len(inputs["input_ids"]))
    return continued(model, inputs, metric)


def continued(model: TransformersModel, inputs: dict[str, Tensor], metric: Metric) -> Data:
    """Prompts with what follows them, less its last token, which predicts nothing wanted."""
    if metric.continuation is None:
        return Data(inputs)
    tokenizer, limits = getattr(model, "tokenizer", None), limits_of(model)
    ids, mask = metric.continuation(tokenizer), inputs["attention_mask"].bool()
    rows = [row[real].tolist() for row, real in zip(inputs["input_ids"], mask, strict=True)]
    behind = ids if len(ids) > 1 else ids * len(rows)
    joined = [[*row, *more[:-1]] for row, more in zip(rows, behind, strict=True)]
    # What follows a prompt may end with EOS, which is no pad there: so past the gate of prompts.
    whole_rows = left_padded(joined, pad_of(tokenizer, limits))
    require_fits(whole_rows["input_ids"], whole_rows["attention_mask"], limits)
    return Data(whole_rows, mask.sum(1, keepdim=True))


@dataclass(frozen=True)
class Pass:
    """One forward pass, as a metric looks at it.

    Attributes:
        logits: [b, n, vocabulary], the columns that the metric reads.
        site: the value [b, t, d] at the metric's own site, if it has one.
        view: positions, ids and masks of the pass.
        receipt: what the intervention's edits did.
    """

    logits: Tensor
    site: Tensor | None
    view: View
    receipt: Receipt

    @property
    def last(self) -> Tensor:
        """[b, vocabulary], without graph."""
        return self.logits[:, -1].detach()


class References(NamedTuple):
    """What a metric compares some prompts with; None where it does not.

    ``top`` [n] long stands for ``BASELINE_TOP``; ``clean`` and ``base`` are last logits
    [n, vocabulary] of the clean and the baseline run.
    """

    top: Tensor | None = None
    clean: Tensor | None = None
    base: Tensor | None = None

    def at(self, rows: Tensor) -> References:
        """Those of some prompts, by number."""
        return References(*(None if values is None else values[rows] for values in self))


def forward(
    model: TransformersModel, batch: Batch, program: Program, columns: int
) -> tuple[Log, Tensor]:
    """One forward pass with a program: its log, and the last ``columns`` logits (0 for all)."""
    options = pass_options(model, columns)
    with alone(torch_module(model)), model.trace(**options) as tracer:
        with tracer.invoke(batch.inputs):
            log = nnsight.save(Log())
            whole_run(root(model), program, log, batch.lengths)
        with tracer.invoke():
            logits = nnsight.save(root(model).output.logits[:, -columns:])
    return log, logits


def pass_options(model: TransformersModel, columns: int) -> dict[str, Any]:
    """What a pass is called with: no cache, and no logits but those wanted."""
    wanted = {"use_cache": False} | ({"logits_to_keep": columns} if columns else {})
    accepted = inspect.signature(torch_module(model).forward).parameters
    return {name: value for name, value in wanted.items() if name in accepted}


class Evaluator:
    """One model and a metric, read for a public function, whose name and error it says no with;
    ``sites`` are others that its passes will be asked for.
    """

    def __init__(
        self,
        model: TransformersModel,
        metric: Metric,
        function: str,
        sites: Iterable[Site] = (),
        error: type[SaefeatError] = SaefeatError,
    ) -> None:
        self.model, self.metric, self.module = model, metric, torch_module(model)
        require_logits(function, self.module)
        self.asker = Asker(function, metric, error)
        self._sites = [*sites, *([] if metric.site is None else [metric.site])]
        self._routes: dict[frozenset[Site], Route] = {}
        self.route = self.route_with(NOTHING)
        self._reader: Reader = metric.reader(getattr(model, "tokenizer", None))
        self._by_place = False if metric.apart else None  # None: not known yet

    def route_with(self, intervention: Intervention) -> Route:
        """The route past all sites asked for and all that an intervention visits."""
        others = frozenset(sites_of(intervention))
        if others not in self._routes:
            self._routes[others] = route(self.model, [*self._sites, *others])
        return self._routes[others]

    def run(self, batch: Batch, intervention: Intervention = NOTHING) -> Pass:
        """One forward pass without gradients."""
        with torch.no_grad():
            log, logits = self.forward(batch, self.program(batch, intervention))
        return self.passed(log, logits, intervention.receipt(log))

    def program(self, batch: Batch, intervention: Intervention) -> Program:
        """An intervention's program for the batch, in which the metric's own site is read."""
        way = self.route_with(intervention)
        program = lower(intervention, self.model, batch.rows(), way)
        visits = Visits(program.visits)
        self.show(visits, way)
        return program.replace(visits=visits.ordered())

    def show(self, visits: Visits, way: Route) -> None:
        """Read the metric's own site, behind all that is done there so far."""
        if self.metric.site is None:
            return
        place = self.route.places[self.metric.site]
        if place.plus is not None:
            visits.stash(place.plus, way.starts[place.plus])
        order = way.orders[self.metric.site]
        visits.add(place, order, Show(name="metric", plus=place.plus))

    def forward(self, batch: Batch, program: Program) -> tuple[Log, Tensor]:
        """The pass itself: its log, and the logits of the columns that the metric reads."""
        return forward(self.model, batch, program, self.columns(batch))

    def columns(self, batch: Batch) -> int:
        """How many last columns of logits are wanted; 0 for all of them."""
        if self.metric.columns == "all":
            return 0
        if batch.lengths is None:
            return 1
        real = batch.inputs["attention_mask"].sum(1, keepdim=True)
        return int((real - batch.lengths).max()) + 1

    def passed(self, log: Log, logits: Tensor, receipt: Receipt) -> Pass:
        """What the metric looks at, from the kernel's log and the logits."""
        site = log.shown.get("metric")
        if site is not None and self.metric.site is not None:
            place = self.route.places[self.metric.site]
            site = lift(site, Norm(kind=place.transform, eps=place.eps))
        return Pass(logits, site, log.view, receipt)

    def read(self, run: Pass, numbers: Tensor, references: References) -> Tensor:
        """The metric of a pass, [b], whose rows are the prompts of these numbers [b]: one number
        a row, each row's own, or an error.
        """
        top, clean, base = references
        seen = Seen(run.logits, top, numbers, run.view, clean, base, run.site)
        values = one_a_row(self.asker, self._reader, seen)
        if self._by_place is None:
            self._by_place = require_apart(self.asker, self._reader, seen, values)
        if self._by_place:
            require_in_order(self.asker, numbers)
        return values

    def require_upstream(self, written: Iterable[Site]) -> None:
        """Refuse sites that the metric's own site does not depend on: zeros would say so badly."""
        at, orders = self.metric.site, self.route.orders
        late = [] if at is None else [site for site in written if orders[site] > orders[at]]
        if late:
            raise SiteError(
                f"{self.asker.function}: `metric` is at {at}, and latents written at {late[0]},"
                " wanted latents written no later than it. Likely cause: the model reaches these"
                " after what they are to explain. Try: latents of sites before it:"
                " saes.latents({0: [3]})"
            )


def require_finite(
    function: str,
    values: Tensor,
    numbers: Tensor,
    run: str,
    error: type[SaefeatError] = SaefeatError,
) -> Tensor:
    """The metric of a run, [b] float32 on the CPU, if every prompt's is finite."""
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if not bad:
        return values.float().cpu()
    raise error(
        f"{function}: `metric` is {float(values[bad[0]])} for prompt {int(numbers[bad[0]])} in the"
        f" {run} run, and for {len(bad)} of {len(numbers)} prompts, wanted a finite number for"
        " every prompt. Likely cause: the log of zero in it, or a model that overflows. Try: the"
        " other prompts alone, or a metric that is finite there"
    )


@checked(own=("batch_size",))
def measure(
    model: TransformersModel,
    prompts: Prompts,
    metric: Metric,
    intervention: Intervention | None = None,
    *,
    batch_size: int = 32,
) -> Tensor:
    """Any metric of ``Attribute``, read off a run: what an attribution is to be checked against.

    Args:
        model: an nnsight ``TransformersModel``.
        prompts: strings, chats or token ids.
        metric: what to measure. ``BASELINE_TOP`` stands for the run's own most likely token,
            ``kl("clean")`` compares with the run without the intervention.
        intervention: what to apply; None runs the bare model.
        batch_size: prompts a batch.

    Returns:
        [prompts] float32, on the CPU, all finite. Truths are given as 0 and 1.

    Raises:
        PromptError: for values made for another number of prompts.
        SaefeatError: for a metric that compares with a baseline run, of which there is none; for
            one that is not one finite number a prompt, each prompt's own.
        FiringError: if an edit selected no token in the whole run.
        ModelError: for logits that are not finite.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> metric = sf.metrics.log_prob([5, 6])
        >>> sf.metrics.measure(model, ["hello", "how do i bake bread"], metric).shape
        torch.Size([2])
    """
    whole("measure", "batch_size", batch_size, error=PromptError)
    edit = NOTHING if intervention is None else intervention
    data = metric_data("measure", model, prompts, metric)
    if metric.reference == "baseline":
        raise SaefeatError(
            f"measure: `metric` is {metric!r}, wanted one that needs no baseline run. Likely cause:"
            ' it was made for Attribute(..., baseline=...). Try: kl("clean"), or kl(logits)'
        )
    require_rows(edit, data.prompts)
    evaluator, values, receipts = Evaluator(model, metric, "measure"), [], []
    for batch in data.batches(batch_size):
        run = evaluator.run(batch, edit)
        clean = evaluator.run(batch) if metric.reference == "clean" else run
        require_numbers("measure", torch_module(model), torch.cat([run.last, clean.last]))
        references = References(run.last.argmax(-1), clean.last, run.last)
        with torch.no_grad():
            value = evaluator.read(run, batch.numbers, references)
        values.append(require_finite("measure", value, batch.numbers, "measured"))
        receipts.append(run.receipt)
    require_fired(join_receipts(receipts), "measure")
    return torch.cat(values)
