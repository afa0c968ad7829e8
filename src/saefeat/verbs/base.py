"""What an intervention is: one edit or reading, or several in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Self, cast, final

import torch
from torch import Tensor

from ..arguments import checked
from ..dictionaries.latents import Latents
from ..dictionaries.twins import rivals, shared
from ..errors import FiringError, LatentError, RemoteError
from ..kernel.pack import unpack
from ..kernel.program import whole_run
from ..kernel.state import Log, last_position
from ..model.modules import require_tracing
from ..model.requests import in_requests
from ..model.wrappers import root
from ..results.readings import Readings, join_time
from ..results.receipt import Fired, Receipt, record_events
from ..shipping.program import as_shipped
from ..values.base import Value
from .lower import lower
from .steps import StepBase, numbered

if TYPE_CHECKING:
    from nnsight import TransformersModel


@checked
class Intervention(ABC):
    """An edit, a reading, or several of them in order: what every way of running takes.

    Interventions are immutable and hold no results, so one object can be used in a trace, in
    a generation, as an edited model, on a plain Hugging Face model, and again.

    Examples:
        >>> v = sf.Direction(torch.ones(8), site="resid_post.1")
        >>> sf.Ablate(v) | sf.Probe(v)
        Ablate(Latents(1: resid_post.1 [0])) | Probe(Latents(1: resid_post.1 [0]))
    """

    @abstractmethod
    def groups(self) -> tuple[tuple[Step, ...], ...]:
        """The single steps in order; those of one group read before any of them writes."""

    def parts(self) -> tuple[Step, ...]:
        """The single steps, in order."""
        return tuple(step for group in self.groups() for step in group)

    def __or__(self, other: Intervention) -> Chain:
        """One after the other: at one site ``other`` reads what this leaves."""
        return Chain((*_links(self), *_links(other)))

    def __and__(self, other: Intervention) -> Joint:
        """Both at once: every part reads before any of them writes.

        Raises:
            LatentError: for what has no joint meaning; see ``Joint``.
        """
        return Joint((*_members(self), *_members(other)))

    def __call__(self, model: TransformersModel, *, step: int | None = None) -> Log:
        """Apply inside an nnsight block, to the forward pass of a trace or to all of a generation.

        Call it before reading any layer. In a loop over ``tracer.iter`` pass the loop's number as
        ``step``, so that only that pass is edited. The block's later reads see the edit; in a
        generation, put them in a block of their own (``tracer.invoke()``).

        Args:
            model: the nnsight model being traced.
            step: which forward pass of a generation this is, if the block loops over them.

        Returns:
            The log, to be kept with ``nnsight.save``; ``readings`` and ``receipt`` read it.

        Raises:
            SiteError, ModelError: if the model lacks a site, is in train mode with dropout, or runs
                no block.
        """
        if step is not None:
            require_memoryless(self)
        require_tracing("intervention", model)
        log = Log()
        whole_run(root(model), lower(self, model), log, step=step)
        return log

    def bind(self, model: TransformersModel) -> Self:
        """The same intervention, which may be named in a remote block on this model.

        In a remote request it becomes its own program for the model. Everything else it does as
        before; copies of it, and what ``|`` makes of it, are not bound.

        Args:
            model: the nnsight model that the block traces; its weights need not be loaded.

        Examples:
            >>> from saefeat.studies.refusal import tiny
            >>> model = tiny.model("chat")
            >>> bound = sf.Ablate(sf.Direction(torch.ones(64), site="resid_post.1")).bind(model)
            >>> with model.trace("hello", remote="local"):
            ...     log = nnsight.save(bound(model))
            >>> bound.receipt(log).passes
            1
        """
        bound = copy(self)
        object.__setattr__(bound, "_model", model)  # steps are frozen
        return bound

    def __getstate__(self) -> dict[str, Any]:
        """Without the model it is bound to, which no copy or pickle should bring along."""
        return {name: value for name, value in self.__dict__.items() if name != "_model"}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        in_requests(cls, _shipped)

    def readings(self, log: Log | dict[str, Any]) -> tuple[Readings, ...]:
        """What each ``Probe`` of this intervention read, in order."""
        found, log = [], unpack(log)  # a server's log is packed
        for step, numbers in numbered(self.parts()):
            if step.change is None:
                values = [join_time(log.readings[n]).cpu() for n in numbers]
                counts = [join_time(log.masks[n]).cpu().unsqueeze(-1) for n in numbers]
                totals = None
                if step.reduction == "mean":  # the kernel kept sums
                    pairs = list(zip(values, counts, strict=True))
                    values = [v / c.clamp(min=1) for v, c in pairs]
                    totals = torch.cat([c.expand_as(v) for v, c in pairs], -1)
                masks = [(c > 0).expand_as(v) for c, v in zip(counts, values, strict=True)]
                starts = None if step.reduction else _starts(log, values[0].shape[1])
                joined = torch.cat(values, -1), torch.cat(masks, -1)
                found.append(Readings(step.latents, *joined, starts, totals))
        return tuple(found)

    def receipt(self, log: Log | dict[str, Any]) -> Receipt:
        """How often each edit acted, and where."""
        rows, log = [], unpack(log)
        for step, numbers in numbered(self.parts()):
            if step.change is not None:
                counts = [_counts(log.acted.get(n, [])) for n in numbers]
                total = torch.stack([c.to("cpu", torch.float64).sum(0) for c in counts])
                largest = max(float(c[:, 2].max()) for c in counts)
                selected, pairs = total[:, 0].int().tolist(), int(total[:, 1].sum())
                events = record_events(step.latents, numbers, log)
                rows.append(Fired.counted([repr(step), pairs, largest, selected], events))
        return Receipt(tuple(rows), passes=log.passes)


def _shipped(intervention: Intervention) -> Any:
    """What a request has in an intervention's place: its program, applied by the kernel.

    Raises:
        RemoteError: if it is not bound to a model.
    """
    model = intervention.__dict__.get("_model")
    if model is None:
        raise RemoteError(
            f"remote trace: the block names {intervention!r}, which is not bound to a model, wanted"
            " an intervention that is. Try: bound = intervention.bind(model) before the block, and"
            " bound(model) in it"
        )
    return as_shipped(lower(intervention, model), model).__reduce__()


@dataclass(frozen=True, repr=False, eq=False)
class Step(StepBase, Intervention):
    """One verb on one selection. Subclasses are ``Ablate``, ``Clamp`` and ``Probe``."""

    def groups(self) -> tuple[tuple[Step, ...], ...]:
        return ((self,),)


@final
@dataclass(frozen=True)
class Chain(Intervention):
    """Several steps in order; at one site the second reads what the first left.

    Examples:
        >>> len(sf.verbs.base.Chain(()).parts())
        0
    """

    steps: tuple[Step | Joint, ...]

    def groups(self) -> tuple[tuple[Step, ...], ...]:
        return tuple(group for step in self.steps for group in step.groups())

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.steps)) or "Chain(())"


@final
@dataclass(frozen=True)
class Joint(Intervention):
    """Several steps at once, as ``a & b`` makes them: all read before any writes.

    So two sets of latents at one site can be changed in different ways, each from the value that
    the model itself had there: clamp A while B keeps its clean values. In a chain the second edit
    would read what the first left, and undo or repeat a part of it. At a later site every part
    reads what earlier sites have become, as always. A ``Probe`` reads what the edits read.

    Args:
        steps: edits and probes, at least one.

    Raises:
        LatentError: for a chain as a part, a latent that two parts edit, ``latents.span()``, whose
            part of the value nothing else may write to, and for ``latents.reselect()`` beside
            another edit of its dictionary.

    Examples:
        >>> v = sf.Neurons("resid_post.1", 8)
        >>> sf.Clamp(v.latents([0]), 2.0) & sf.Ablate(v.latents([1]))
        Clamp(Latents(1: resid_post.1 [0]), value=2.0) & Ablate(Latents(1: resid_post.1 [1]))
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        _require_apart(self.steps)

    def groups(self) -> tuple[tuple[Step, ...], ...]:
        return (self.steps,)

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.steps))


def _links(intervention: Intervention) -> tuple[Any, ...]:
    return intervention.steps if isinstance(intervention, Chain) else (intervention,)


def _members(intervention: Intervention) -> tuple[Step, ...]:
    if len(intervention.groups()) == 1:
        return intervention.parts()
    raise LatentError(
        f"intervention: a part of a & b is {intervention!r:.200}, wanted single edits and probes."
        " Likely cause: | and & mixed: a chain reads what its own first step has written, and a"
        " joint edit reads before anything is. Try: a & b | c, which is (a & b) | c"
    )


def _require_apart(steps: tuple[Step, ...]) -> None:
    """Refuse edits whose changes, added up, would not mean what each says alone."""
    edits = [step for step in steps if step.change is not None]
    for number, step in enumerate(edits):
        earlier = edits[:number]
        if len(edits) > 1 and step.latents.written == "span":
            got, call = "removes a span, of which another edit may write a part", "a | b"
        elif any(_meet(step, other) for other in earlier):
            got, call = "has a latent that an earlier part edits", "one edit for each latent"
        elif any(_compete(step, other) for other in earlier):
            got = "has a dictionary whose largest latents are selected anew"
            call = "one Clamp with values for all of the latents"
        else:
            continue
        raise LatentError(
            f"Joint: `steps` is one of which {step!r} {got}, wanted edits of latents of their own."
            " Likely cause: edits that overlap: added up, neither would have its value. Try:"
            f" {call}"
        )


def _meet(one: Step, other: Step) -> bool:
    """Whether two steps edit one latent, of one dictionary or of one that was loaded twice."""
    pairs = product(one.latents.parts, other.latents.parts)
    return any(shared(*part, *theirs) for part, theirs in pairs)


def _compete(one: Step, other: Step) -> bool:
    """Whether two steps edit one dictionary, of which one of them selects the largest anew."""
    if "reselect" not in (one.latents.written, other.latents.written):
        return False
    pairs = product(one.latents.parts, other.latents.parts)
    return any(rivals(*part, *theirs) for part, theirs in pairs)


def _starts(log: Log, columns: int) -> Tensor:
    """[b]: the column of position 0, from where the last column stands in its row's text."""
    return columns - 1 - last_position(log.view)[:, 0].cpu()


def _counts(entries: list[Any]) -> Tensor:
    """[passes, 3] from what the kernel noted: counts, or the steps themselves to be counted."""
    rows = [entry if isinstance(entry, Tensor) else entry.counts() for entry in entries]
    return torch.stack(rows) if rows else torch.zeros(1, 3, dtype=torch.float32)


def per_latent(function: str, parameter: str, value: Any, latents: Latents) -> Any:
    """A finite number, values [k] or [prompts, k], or a ``Value`` that fits the latents.

    Raises:
        LatentError: for another length, or a value that is not finite.
    """
    if value is None:
        return None
    if isinstance(value, Value):
        value.check(function, parameter, latents)
        return value
    try:
        listed = isinstance(value, (list, tuple))  # whose dtype would be torch's default
        device = None if isinstance(value, Tensor) else "cpu"  # and the device also
        number = torch.as_tensor(value, dtype=torch.float32 if listed else None, device=device)
    except (TypeError, ValueError, RuntimeError):
        number = None
    # True is no 1.0, and an imaginary part would be left out
    real = number is not None and number.dtype != torch.bool and not number.is_complex()
    finite = number is None or bool(torch.isfinite(number).all())
    if number is not None and real and finite and number.ndim == 0:
        return float(cast("float", value))  # not through a tensor: 0.7 stays 0.7
    fits = number is not None and number.ndim in (1, 2) and number.shape[-1] == len(latents)
    if number is not None and real and finite and fits and len(number):
        return number.detach().clone()
    got = type(value).__name__
    if number is not None:
        got += f" of shape {tuple(number.shape)}" + ("" if real else f", {number.dtype}")
        wide = number.shape[-1] if number.ndim else len(latents)
        got += "" if wide == len(latents) else f", {wide} values for {len(latents)} latents"
        got += "" if finite else " and not finite"
    cause = "values made for another selection"
    if isinstance(value, Readings):
        cause = "readings without a word on how to use them"
    elif number is not None and not real:
        cause = "a mask, or numbers with an imaginary part, which would be left out"
    raise LatentError(
        f"{function}: `{parameter}` is {got}, wanted a finite real number, [{len(latents)}] or"
        f" [prompts, {len(latents)}] values, or a Schedule, Patch or Resample. Likely cause:"
        f" {cause}. Try: {function}(latents, {parameter}=readings.mean()), or"
        f" {parameter}=Patch(readings), or {parameter}=Resample(readings)"
    )


def require_memoryless(intervention: Intervention) -> None:
    """Refuse, one pass at a time, what must be remembered from pass to pass.

    Raises:
        LatentError: for a held condition, a chat role, or latents that depend on earlier tokens.
    """
    for step in intervention.parts():
        when = () if step.condition is None else step.condition.latents.parts
        held = step.condition is not None and step.condition.hold
        held = held or any(basis.prefix for basis, _ in (*step.latents.parts, *when))
        if held or (step.rule is not None and "'role'" in repr(step.rule.rule)):
            raise LatentError(
                f"intervention: `step` is given, for {step!r}, wanted an edit that each pass can"
                " decide on its own. Likely cause: a held condition, a chat role or a temporal SAE"
                " looks back over the whole sequence. Try: intervention(model) without step,"
                " which edits every pass itself"
            )


def by_prompt(intervention: Intervention) -> bool:
    """Whether any values differ by prompt, so that each batch needs its own program."""
    changes = [step.change for step in intervention.parts()]
    return any(change is not None and change.numbered() for change in changes)


def require_fired(receipt: Receipt, function: str) -> None:
    """Refuse a result in which an edit never selected a token: it would read as "no effect".

    Raises:
        FiringError: naming the edit.
    """
    if receipt.unfired:
        raise FiringError(
            f"{function}: `intervention` is an edit that selected no token: {receipt.unfired[0]},"
            " wanted at least one token selected by each edit. Likely cause: a token rule or"
            " condition that matches nothing in these prompts. Try: run(..., allow_unfired=True) if"
            " that is meant"
        )


def require_rows(intervention: Intervention, prompts: int) -> None:
    """Refuse values made for another number of prompts: rows would meet the wrong prompt.

    Raises:
        LatentError: naming both numbers.
    """
    for step in intervention.parts():
        wanted = None if step.change is None else step.change.prompts()
        if wanted is not None and wanted != prompts:
            raise LatentError(
                f"run: `intervention` is values for {wanted} prompts in {step!r}, wanted values for"
                f" the {prompts} prompts given. Likely cause: the prompts were filtered or batched"
                " after the values were made. Try: make the values from the same prompts, in the"
                " same order"
            )
