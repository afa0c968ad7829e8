"""preflight: what a remote run would send, before anything is queued."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from nnsight import __version__ as NNSIGHT
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from torch import Tensor

from ..arguments import checked
from ..checks import whole
from ..errors import PromptError, RemoteError
from ..generation.decoding import Decode, Decoding, decoding
from ..kernel.edit import MOST_LATENTS, Write
from ..kernel.program import Program
from ..model.modules import torch_module
from ..shipping.narrow import narrowed
from ..shipping.payload import (
    compressed,
    parts_of,
    require_fits,
    require_known,
    strangers,
    tensors,
    weight,
)
from ..shipping.program import embedding
from ..shipping.server import Server
from ..text.prompts import Prompts, encode_for, split
from ..verbs.base import Chain, Intervention, by_prompt, require_rows
from ..verbs.lower import lower
from ..verbs.steps import numbered
from .asked import deployed
from .batch import Requests, remote_batch, with_stops
from .dry_run import Dry, Expected, dry_run, expected

if TYPE_CHECKING:
    from nnsight import TransformersModel


@checked
@dataclass(frozen=True)
class Preflight:
    """What a remote run would send; printed, it is a table.

    Attributes:
        payload: bytes of the first batch's request as sent, compressed.
        parts: bytes before compression: each place's tensors, the inputs, the code.
        strangers: modules named by reference that a server does not have: the run would fail there.
        fails: what a dry run on fake tensors found wrong; empty if nothing.
        untried: why the dry run could not tell; empty if it could.
        batches: how many requests the run makes.
        parks: how often a forward pass stops to hand a value over, each a round trip there.
        passes: forward passes a batch, at most.
        tokens: for each step, how many prompt tokens its token rule selects, in all batches.
        expected: for each step, how many tokens it will act on in all batches, ``prompt`` and
            ``generated``, each the least and the most: the same where nothing depends on data. A
            condition can leave none of those its rule selects, and a generated token may be any.
        result: bytes of the first batch's result, at most, before compression.
        dtypes: of the tensors sent.
        device: where the model is here; ``"meta"`` if its weights are not loaded.
        nnsight: the version here and the server's, None if it was not asked or did not answer.
        dtype: of the model here and of the server's, None as before.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> report = sf.remote.preflight(model, ["hello"], sf.Ablate(saes.latents({1: [3, 4]})))
        >>> report.parks, report.strangers, report.fails
        (3, (), '')
    """

    payload: int
    parts: dict[str, int]
    strangers: tuple[str, ...]
    fails: str
    untried: str
    batches: int
    parks: int
    passes: int
    tokens: tuple[tuple[str, int], ...]
    expected: tuple[Expected, ...]
    result: int
    dtypes: tuple[str, ...]
    device: str
    nnsight: tuple[str, str | None]
    dtype: tuple[str, str | None]

    def __str__(self) -> str:
        (here, there), (own, other) = self.nnsight, self.dtype
        shown = [
            ("payload", f"{self.payload:,} bytes a batch, {self.batches} in all"),
            *((f"  {name}", f"{size:,} bytes") for name, size in self.parts.items()),
            ("result", f"at most {self.result:,} bytes a batch"),
            ("parks", f"{self.parks} a forward pass, at most {self.passes} passes"),
            ("sent as", ", ".join(self.dtypes) or "no tensors"),
            ("model", f"{own} on {self.device} here, {other or 'unknown'} there"),
            ("nnsight", f"{here} here, {there or 'unknown'} there"),
            ("would fail", "; ".join((*self.strangers, *filter(None, [self.fails]))) or "nothing"),
            *([("not known", self.untried)] if self.untried else []),
            *((f"  {acts.step}", f"acts on {acts}") for acts in self.expected),
        ]
        width = min(40, max(len(name) for name, _ in shown))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in shown)


@checked(own=("batch_size", "max_new_tokens"))
def preflight(
    model: TransformersModel, prompts: Prompts, intervention: Intervention | None = None, *,
    max_new_tokens: int = 0, decode: Decode | None = None, batch_size: int = 32,
    on: Server | None = None,
) -> Preflight:  # fmt: skip
    """Build the request of a remote run, try it on fake tensors, and send nothing.

    The request is the real one, made by nnsight and taken apart again here, so that what it names
    by reference is known. Then the model runs on fake tensors, which have shapes and dtypes and no
    numbers, under the very program that would be sent: a prompt's pass, and one of a generated
    token if there are any, for the first batch (and a smaller last one, where values differ by
    prompt). So the model needs no weights, and errors of sites, shapes and dtypes appear before
    anything queues. Tokens are counted over all batches. What depends on numbers (whether a
    condition is met, which token comes next, whether an index is in range) no dry run can know, and
    neither the server's device. What is not listed here is as in ``run``.

    Args:
        model: an nnsight ``TransformersModel``, loaded or not.
        on: as in ``run``: the server that is asked for its nnsight version and the model's dtype
            there; a warning says so where that is another. None, and ``Server("local")``, ask
            nobody.

    Returns:
        A ``Preflight``.

    Raises:
        SiteError, ModelError, PromptError, LatentError: as ``run``.
        RemoteError: for a dictionary that cannot be sent, or a dtype that cannot hold it.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> sf.remote.preflight(model, ["hello", "hello"], batch_size=1).batches
        2
    """
    chosen = intervention if intervention is not None else Chain(())
    with_stops(model)
    whole("preflight", "batch_size", batch_size, error=PromptError)
    settings = decoding(model, max_new_tokens, decode)
    encoded = encode_for(model, prompts, settings.new)
    require_rows(chosen, len(encoded["input_ids"]))
    dtype = None if on is None else on.dtype
    report = inspected(model, split(encoded, batch_size), chosen, settings, dtype)
    there = deployed(model, on)
    own = report.dtype[0]
    if there.dtype not in (None, own):
        warnings.warn(
            f"saefeat: preflight: the model is {own} here and {there.dtype} on the server, so the"
            f" same call gives other numbers there. To compare, load it here in {there.dtype}",
            stacklevel=3,
        )
    return replace(report, nnsight=(NNSIGHT, there.nnsight), dtype=(own, there.dtype))


def inspected(
    model: TransformersModel,
    batches: Sequence[dict[str, Tensor]],
    chosen: Intervention,
    settings: Decoding,
    dtype: torch.dtype | None,
) -> Preflight:
    """The report on batches that are encoded and settings that are checked; asks no server."""
    programs = _programs(model, batches, chosen, dtype)
    (program, batch), *_ = programs
    first = next(torch_module(model).parameters())
    raw = captured(model, program, batch, settings)
    parts = {**parts_of(program), "inputs": weight(list(batch.values()))}
    parts["code"] = len(raw) - sum(parts.values())
    acts = expected(chosen, program, batches, settings.new, settings.stops)
    tried = [dry_run(model, program, batch, settings.new) for program, batch in programs]
    tried = [dry for dry in tried if any(dry)]
    return Preflight(
        payload=compressed(raw),
        parts=parts,
        strangers=strangers(model, raw),
        **(tried[0] if tried else Dry())._asdict(),
        batches=len(batches),
        parks=parks(program),
        passes=max(settings.new, 1),
        tokens=tuple((one.step, one.prompt[1]) for one in acts),
        expected=acts,
        result=result_size(model, chosen, program, batch, settings),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors(program)})),
        device=str(first.device),
        nnsight=(NNSIGHT, None),
        dtype=(str(first.dtype).removeprefix("torch."), None),
    )


def _programs(
    model: TransformersModel,
    batches: Sequence[dict[str, Tensor]],
    chosen: Intervention,
    dtype: torch.dtype | None,
) -> list[tuple[Program, dict[str, Tensor]]]:
    """The first batch and its program, and the last's if values by prompt meet fewer rows there."""
    differ, sizes = by_prompt(chosen), [len(batch["input_ids"]) for batch in batches]
    programs = []
    for number in sorted({0, len(batches) - 1} if differ and sizes[-1] != sizes[0] else {0}):
        start = sum(sizes[:number])
        rows = slice(start, start + sizes[number]) if differ else slice(None)
        program = narrowed(lower(chosen, model, rows), dtype)
        programs.append((program.replace(embedding=embedding(model)), batches[number]))
    return programs


def require_light(report: Preflight, limit: int, function: str = "run") -> None:
    """Refuse a request that would fail, or is larger than wanted."""
    require_known(function, report.strangers)
    if report.fails:
        raise RemoteError(
            f"{function}: `intervention` is one that fails on fake tensors ({report.fails}), wanted"
            " one that runs on this model and these prompts. Likely cause: a function, or values,"
            " of another shape than the site's. Try: run(model, prompts[:1], intervention) on a"
            " small model of the family here"
        )
    require_fits(function, report.parts, report.payload, limit)


def require_sendable(requests: Requests) -> None:
    """The same of a run's batches, before the first of them is sent."""
    task, on = requests.task, requests.on
    report = inspected(task.model, requests.batches, task.intervention, task.decoding, on.dtype)
    require_light(report, on.payload_limit, task.function)


class Capture(Backend):
    """Keeps the request instead of sending it."""

    raw = b""

    def __call__(self, tracer: Any) -> None:
        pull_env()  # as nnsight does before it sends: modules that lie beside a script travel
        self.raw = RequestModel.serialize(tracer)


def captured(
    model: TransformersModel, program: Program, batch: dict[str, Tensor], settings: Decoding
) -> bytes:
    """A batch's request, before compression."""
    backend = Capture()
    remote_batch(model, program, batch, settings, backend=backend)
    return backend.raw


def parks(program: Program) -> int:
    """How often a forward pass hands a value to the block or takes one: inputs, reads, writes."""
    writes = [any(isinstance(a, Write) for a in visit.actions) for visit in program.visits]
    return 1 + len(writes) + sum(writes)


EVENT = 5 * 8 + 3 * 4
"""Bytes of one change in a result: five whole numbers, and three float32."""


def result_size(
    model: TransformersModel,
    intervention: Intervention,
    program: Program,
    batch: dict[str, Tensor],
    settings: Decoding,
) -> int:
    """Bytes that come back: readings, changes, one row of logits a prompt, token ids."""
    module: Any = torch_module(model)
    (rows, columns), new = batch["input_ids"].shape, settings.new
    acts = expected(intervention, program, [batch], new, settings.stops)
    total = rows * module.config.get_text_config().vocab_size * module.dtype.itemsize
    for (step, numbers), expects in zip(numbered(intervention.parts()), acts, strict=True):
        sizes = [len(indices) for _, indices in step.latents.parts]
        if step.change is None:
            kept, mask = expects.most, rows * (columns + new)
            if step.reduction:
                kept, mask = rows, 8 * rows
            total += 4 * kept * sum(sizes) + mask * len(numbers)
        else:
            total += EVENT * expects.most * sum(size for size in sizes if size <= MOST_LATENTS)
            total += 12 * max(new, 1) * len(numbers)
    return total + 8 * rows * (columns + new + 1)
