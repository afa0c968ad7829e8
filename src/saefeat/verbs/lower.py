"""Verbs made into the kernel's program for one model.

All checks that need the model happen here, before anything runs: families, layers, widths, train
mode. Every tensor of a program has a storage of its own: a view would drag its whole matrix over
the wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count, groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..dictionaries.exclusion import either, untrained
from ..dictionaries.latents import Dictionary
from ..errors import LatentError, ModelError, SiteError
from ..kernel.beams import Beams
from ..kernel.edit import Write
from ..kernel.encode import encoder_of, scored
from ..kernel.frozen import Placed
from ..kernel.program import Action, Part, Program, Visit, visit_at
from ..kernel.read import Collect, LookingBack, Norm, Read, Source, Test
from ..kernel.sequences import Beside
from ..kernel.spread import Gather, Gathered, WriteOn
from ..kernel.state import Ends
from ..kernel.tokens import Everywhere, Where, reads_turns
from ..kernel.watch import Stash
from ..model.modules import check_ready, takes_logits_to_keep, torch_module
from ..model.route import Route, route
from ..model.sites import Order, Place, Site
from ..text.tokens import Tokens, plain
from .forms import Form, frozen, orthogonal, reselect
from .reach import apart, require_behind, require_reached
from .steps import StepBase, numbered
from .when import When

if TYPE_CHECKING:
    from nnsight import TransformersModel


class HasParts(Protocol):
    """An intervention, seen from below."""

    def parts(self) -> tuple[StepBase, ...]: ...

    def groups(self) -> tuple[tuple[StepBase, ...], ...]: ...


def lower(
    intervention: HasParts,
    model: TransformersModel,
    rows: slice | Tensor = slice(None),
    way: Route | None = None,
) -> Program:
    """The program of an intervention on a model, visits sorted in the order they are reached.

    ``rows`` picks the prompts of this batch out of values that differ by prompt: a slice, or their
    numbers, repeated where a prompt has several rows. ``way`` is the route past its sites and
    others that visits will be added for; by default past its own.

    Raises:
        ModelError: train mode with dropout, or a family without a site table.
        SiteError: a layer the model lacks, a dictionary of another width, or a condition that
            is only known after the edit.
    """
    refuse_flat(model)
    builder = _Builder(model, rows, way or route(model, sites_of(intervention)))
    steps = numbered(intervention.parts())
    for group in intervention.groups():
        # all reads first: no dictionary of a group sees what another of it has written
        together = [(step, numbers) for step, numbers in islice(steps, len(group))]
        for step, numbers in together:
            for number, (basis, indices) in zip(numbers, step.latents.parts, strict=True):
                builder.read(step, number, basis, indices)
            builder.condition(step, numbers[0])
        for step, numbers in together:
            builder.writes(step, numbers)
    return Program(
        visits=builder.visits.ordered(),
        ends=ends_of(getattr(builder.module, "generation_config", None)),
        beams=Beams() if builder.remembers else None,
        placed=Placed(),
        beside=Beside(),
        keeps=takes_logits_to_keep(builder.module),
    )


def refuse_flat(model: TransformersModel) -> None:
    """Refuse nnsight's vLLM models: their passes hold tokens of many requests in one row.

    Raises:
        ModelError: for such a model.
    """
    if not type(model).__module__.startswith("nnsight.modeling.vllm"):
        return
    raise ModelError(
        "saefeat: `model` is a vLLM model of nnsight, wanted a TransformersModel. Likely cause:"
        " vLLM's values are [tokens, d_model], and no attention mask says whose they are. Try:"
        ' nnsight.TransformersModel(name, task="text-generation")'
    )


def sites_of(intervention: HasParts) -> Iterator[Site]:
    """Every site an intervention reads or writes, those of its conditions included."""
    for step in intervention.parts():
        when = step.condition
        for basis, _ in (*step.latents.parts, *(() if when is None else when.latents.parts)):
            yield from basis.read_sites
            yield from basis.write_sites
        if when is not None and when.site is not None:
            yield when.site


def ends_of(config: Any) -> Ends:
    """How a generation configuration, or none, ends a row."""
    stops, pad = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
    listed = [] if stops is None else torch.as_tensor(stops).flatten().tolist()
    if pad is None:  # generate takes the first stop token then
        pad = listed[0] if listed else -1
    return Ends(stops=tuple(listed), pad=int(pad), honored=False)


class _Builder:
    """Collects visits for one model; steps must be added in the intervention's order."""

    def __init__(self, model: TransformersModel, rows: slice | Tensor, way: Route) -> None:
        self.model, self.rows, self.route = model, rows, way
        self.module = torch_module(model)
        self.visits = Visits()
        self.remembers = False  # whether an action must know passes before its own
        self._forms: dict[int, Form] = {}
        self._edited: dict[int, set[int]] = {}
        self._spans: dict[Site, tuple[Tokens, Tensor]] = {}  # of the step at hand
        self._when: dict[int, str] = {}  # a step's first number → its condition's name
        self._sources = count()
        check_ready(self.module, "saefeat")

    def read(
        self, step: StepBase, number: int, dictionary: Dictionary, indices: Sequence[int]
    ) -> None:
        """Where one dictionary of a step is read."""
        self.route.check(dictionary, "dictionary")
        require_reached(repr(step), dictionary, self.route.orders)
        how = "frozen" if step.change is None else step.change.how
        if apart(dictionary) and how != "orthogonal":
            self._once(step, dictionary, indices)
        rule = acts_at(step.rule, dictionary, self.model)
        if how == "orthogonal":
            form = orthogonal(dictionary, indices, self._before(step, rule, dictionary))
            place = dictionary.write_site
            self._spans[place] = rule, torch.cat([self._spans[place][1], form.directions])
        else:
            form = (reselect if how == "reselect" else frozen)(dictionary, indices)
        self._forms[number] = form
        wanted = plain(rule.rule, self.model)
        tokens = Everywhere() if wanted == ("all",) else Where(rule=wanted)
        self.remembers |= isinstance(tokens, Where) and reads_turns(wanted)
        place, order = self.route.places[form.sites[-1]], self.route.orders[form.sites[-1]]
        source = self._source(form.sites, form.columns)
        self.visits.add(place, order, Read(number=number, source=source, tokens=tokens))
        if step.change is None:
            self.visits.add(place, order, Collect(number=number, reduce=step.reduction))

    def writes(self, step: StepBase, numbers: Sequence[int]) -> None:
        """Where the dictionaries of an edit are written."""
        when, start = self._when.get(numbers[0]), 0
        for number, (dictionary, indices) in zip(numbers, step.latents.parts, strict=True):
            span = slice(start, start := start + len(indices))
            if step.change is None:
                continue
            form = self._forms[number]
            change = form.changed(step.change.take(step.latents, span, self.rows))
            if step.condition is not None:
                self._early(step, step.condition, dictionary)
            require_behind(repr(step), dictionary, self.route.orders)
            first = {dictionary.write_site: form.directions}
            for site, rows in (first | form.further(dictionary, indices)).items():
                kind = Write if site in first else WriteOn
                write = kind(number=number, change=change, directions=rows, when=when)
                place = self.route.writable(site, step)
                self.visits.add(place, self.route.orders[site], write)
            if apart(dictionary):
                self._edited.setdefault(id(dictionary), set()).update(indices)

    def _before(self, step: StepBase, rule: Tokens, dictionary: Dictionary) -> Tensor:
        """[n, d]: what dictionaries before this one of the step span at its write site.

        Each removes only what those before it leave, so all must act at the same tokens.
        """
        place = dictionary.write_site
        empty = torch.zeros(0, dictionary.d_out, dtype=torch.float64)
        other, rows = self._spans.setdefault(place, (rule, empty))
        if other != rule:
            raise LatentError(
                f"{step!r}: `where` is None, for dictionaries of {place} that skip different tokens"
                " by default, wanted one rule for all that span one space. Likely cause:"
                " dictionaries of different releases at one site. Try:"
                " Ablate(latents.span(), where=Tokens.all())"
            )
        return rows

    def _once(self, step: StepBase, dictionary: Dictionary, indices: Sequence[int]) -> None:
        """Refuse to read a transcoder's latents again after an edit: they are read upstream."""
        again = self._edited.get(id(dictionary), set()).intersection(indices)
        if again:
            raise LatentError(
                f"{step!r}: `latents` is latent {min(again)} of {dictionary.name!r}, edited earlier"
                " in the chain, wanted latents that no earlier step has edited. Likely cause: a"
                " transcoder is read upstream of where it writes, so a later step cannot see the"
                " earlier one's change. Try: one edit for each of its latents, and probes before it"
            )

    def condition(self, step: StepBase, number: int) -> None:
        """Test actions for a step's condition, after its reads and before anything is written."""
        when, self._spans = step.condition, {}
        if when is None:
            return
        name = self._when[number] = f"when-{number}"
        tests: list[tuple[tuple[Site, ...], dict[str, Any]]] = []
        if when.site is not None:
            own = {"activation": partial(scored, when.scorer), "norm": "none"}
            tests.append(((when.site,), own))
        for dictionary, indices in when.latents.parts:
            self.route.check(dictionary, "dictionary")
            require_reached("when", dictionary, self.route.orders)
            tests.append((dictionary.read_sites, frozen(dictionary, indices).columns))
        self.remembers |= when.hold
        for sites, columns in tests:
            test = Test(
                name=name, source=self._source(sites, columns), above=when.above, below=when.below,
                every=when.match == "all", hold=when.hold, of=len(tests),
            )  # fmt: skip
            self.visits.add(self.route.places[sites[-1]], self.route.orders[sites[-1]], test)

    def _early(self, step: StepBase, when: When, edited: Dictionary) -> None:
        """Refuse a condition that the model reaches after the edit."""
        sites = when.latents.sites if when.site is None else (when.site,)
        orders = self.route.orders
        late = [site for site in sites if orders[site] > orders[edited.write_site]]
        if late:
            parameter = "latents" if when.site is None else "site"
            raise SiteError(
                f"when: `{parameter}` is read at {late[0]}, wanted a site no later than"
                f" {edited.write_site}, where {step!r} writes. Likely cause: the model reaches the"
                " condition after the edit. Try: condition on an earlier site, or edit a later one"
            )

    def _source(self, sites: Sequence[Site], columns: dict[str, Any]) -> Source:
        """Latents, read where the value of the last of their sites is whole."""
        *earlier, site = sites
        place = self._whole(site)
        norm, encoder = Norm(kind=place.transform, eps=place.eps), encoder_of(columns)
        if earlier:
            keys = tuple(self._gather(one) for one in earlier)
            return Gathered(encoder=encoder, norm=norm, plus=place.plus, keys=keys)
        if not columns.get("prefix"):
            return Source(encoder=encoder, norm=norm, plus=place.plus)
        self.remembers = True
        key = next(self._sources)
        return LookingBack(encoder=encoder, norm=norm, plus=place.plus, key=key)

    def _gather(self, site: Site) -> str:
        """Hold an earlier site's value; the key by which it is found."""
        place, key = self._whole(site), f"gathered-{next(self._sources)}"
        norm = Norm(kind=place.transform, eps=place.eps)
        self.visits.add(place, self.route.orders[site], Gather(key=key, norm=norm, plus=place.plus))
        return key

    def _whole(self, site: Site) -> Place:
        """The site's place, where its whole value can be had."""
        place = self.route.places[site]
        if place.plus is not None:
            self.visits.stash(place.plus, self.route.starts[place.plus])
        return place


class Visits:
    """The places a program visits and the actions there, in any order until all are known."""

    def __init__(self, visits: Iterable[Visit] = ()) -> None:
        self._orders: dict[tuple[str, str], Order] = {}
        self._actions: dict[tuple[str, str], list[tuple[Part | None, Action]]] = {}
        for visit in visits:
            self._orders[visit.path, visit.end] = visit.order
            actions = self._actions.setdefault((visit.path, visit.end), [])
            actions += ((visit.part, action) for action in visit.actions)

    def add(self, place: Place, order: Order, action: Action, *, first: bool = False) -> None:
        """An action at a place, behind those that are there, or ``first`` of all.

        A site with a transform shares its visit with the plain value.
        """
        key = (place.path, place.end)
        self._orders.setdefault(key, order)
        actions = self._actions.setdefault(key, [])
        actions.insert(0 if first else len(actions), (place.part, action))

    def stash(self, block: str, order: Order) -> None:
        """Keep a block's input until its attention's output is there, for resid_mid."""
        there = self._actions.get((block, "input"), ())
        if not any(_stashes(action) for _, action in there):
            self.add(Place(block, "input"), order, Stash(name=block))

    def ordered(self) -> tuple[Visit, ...]:
        """As a forward pass reaches them; stashing comes last: what is kept is what edits left."""
        visits = [
            visit_at(*key, self._orders[key], tuple(action for _, action in some), part)
            for key, actions in self._actions.items()
            for part, some in groupby(sorted(actions, key=_late), key=itemgetter(0))
        ]
        return tuple(sorted(visits, key=lambda visit: visit.order))


def _stashes(action: Action) -> bool:
    return isinstance(action, Stash)


def _late(entry: tuple[Part | None, Action]) -> bool:
    return _stashes(entry[1])


def acts_at(where: Tokens | None, dictionary: Dictionary, model: TransformersModel) -> Tokens:
    """The tokens asked for, less those the dictionary was not trained on.

    A rule that says all tokens, or names tokens by their ids, means them; one that names positions
    means those positions, whatever positions the dictionary skips.
    """
    if where is None:
        return default_rule(dictionary, model)
    rule = untrained(dictionary.excluded)
    if rule is None or where.rule == ("all",) or _names(where.rule, ("ids", "special")):
        return where
    if _names(where.rule, ("positions",)):
        rule = either(*(part for part in _alternatives(rule) if part.rule[0] != "positions"))
    return where if rule is None else where & _without(rule, model)


def _names(rule: tuple, kinds: tuple[str, ...]) -> bool:
    """Whether a rule asks for tokens in one of these ways, and not only for others than those."""
    kind, *rest = rule
    if kind in ("and", "or"):
        return any(_names(part, kinds) for part in rest)
    return kind in kinds


def _alternatives(rule: Tokens) -> list[Tokens]:
    """The rules that a union is made of."""
    kind, *rest = rule.rule
    return [r for part in rest for r in _alternatives(Tokens(part))] if kind == "or" else [rule]


def default_rule(dictionary: Dictionary, model: TransformersModel) -> Tokens:
    """Every real token, less those the dictionary was not trained on."""
    rule = untrained(dictionary.excluded)
    return Tokens.all() if rule is None else _without(rule, model)


def _without(rule: Tokens, model: TransformersModel) -> Tokens:
    found = Tokens(plain(rule.rule, model))
    return Tokens.all() if found == Tokens.ids() else ~found
