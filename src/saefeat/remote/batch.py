"""A run's batches on a server: what travels there, and what came back, held against what was asked.

What comes back is reduced over there: selected readings, counts, token ids, and one row of logits
a prompt, in the model's own dtype. A server may be of another version, out of memory half-way, or
not a server at all, and readings of the wrong tokens would look like readings: so shapes, dtypes
and indices are all checked here, and that the tokens begin with the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import nnsight
import torch
from torch import Tensor
from transformers import GenerationConfig

from ..errors import RemoteError
from ..generation.decoding import Decoding
from ..generation.task import Piece, Task, honoring
from ..kernel.draws import require_drawn, seeded
from ..kernel.pack import pack, unpack, whereabouts
from ..kernel.program import Program, whole_run
from ..kernel.state import Log
from ..model.modules import torch_module
from ..model.wrappers import require_unwrapped
from ..results.provenance import called_there, elsewhere, model_key
from ..results.run import Run
from ..shipping.client import Client, Deadline
from ..shipping.narrow import narrowed
from ..shipping.program import embedding, register
from ..shipping.server import Server
from ..verbs.base import Intervention
from ..verbs.steps import numbered

if TYPE_CHECKING:
    from nnsight import TransformersModel


def remote_batch(
    model: TransformersModel,
    program: Program,
    batch: dict[str, Tensor],
    settings: Decoding,
    *,
    dtype: torch.dtype | None = None,
    **how: Any,
) -> tuple[dict[str, Any] | None, Any]:
    """Send one batch; what was saved, where the call waits for it, and nnsight's backend.

    ``how`` goes to nnsight: ``remote``, ``blocking`` or ``backend``. A run without new tokens is a
    generation of one, which is one forward pass too, without a graph for gradients and with logits
    for the last token alone. Samples are drawn by the server's model from the seed that the block
    sets there; where the block runs in another process than the model, that is an error.
    """
    register()
    program = honoring(program, settings).replace(embedding=embedding(model))
    program = narrowed(program, dtype)
    batch = {name: tensor.clone() for name, tensor in batch.items()}  # a view ships its storage
    seed, saved = settings.seed, None
    arguments = {**settings.arguments(), "max_new_tokens": max(settings.new, 1)}
    with model.generate(**arguments, **how) as tracer:
        with tracer.invoke(batch):
            draws, log = seeded(seed), Log()
            whole_run(model, program, log)
        with tracer.invoke():
            logits = model.output.logits[:, -1].clone()
            tokens = tracer.result
            require_drawn(draws)
            found = {"log": pack(log), "tokens": tokens, "logits": logits}
            saved = nnsight.save({**found, "where": whereabouts(model, logits)})
    return saved, tracer.backend


def client(
    model: TransformersModel, remote: bool | str, deadline: Deadline, job: str | None = None
) -> Client:
    """What sends a batch without waiting for it, or polls the ``job`` that was sent."""
    return Client(model_key(model), remote, deadline, blocking=False, job_id=job)


def with_stops(model: TransformersModel) -> None:
    """Give a model without weights the checkpoint's own settings for generation.

    nnsight builds it from ``config.json`` alone; which tokens end a turn stands in
    ``generation_config.json``, and the server's model has read that.
    """
    module: Any = torch_module(model)
    if module.device.type == "meta" and isinstance(getattr(model, "repo_id", None), str):
        try:
            module.generation_config = GenerationConfig.from_pretrained(
                model.repo_id, revision=model.revision
            )
        except OSError:  # a checkpoint without that file: config.json is all there is
            return


def require_plain(model: TransformersModel, settings: Decoding, remote: bool | str) -> None:
    """Refuse a wrapper, and beams: edits follow them through the cache, which stays there."""
    require_unwrapped("run", model)
    if remote != "local":
        model_key(model)
    if settings.beams > 1:
        raise RemoteError(
            f"run: `decode` searches {settings.beams} beams, with on=, wanted greedy decoding, or"
            " sampling with a seed. Likely cause: beams change places between passes, and only the"
            " key-value cache, which a block on a server does not have, tells of it. Try:"
            " decode=None, or Sample(0.8, seed=0)"
        )


class Requests:
    """A run's batches, each a request to a server.

    Args:
        task: what is run.
        batches: ``input_ids`` and ``attention_mask`` of each.
        on: the server.
        start: the number of the first prompt, which seeds and values by prompt go by.
    """

    def __init__(
        self, task: Task, batches: Sequence[dict[str, Tensor]], on: Server, start: int = 0
    ) -> None:
        self.task, self.batches, self.on = task, batches, on
        self._start, self._run_here = start, dict[int, Any]()
        self._outputs: dict[int, Outputs] = {}

    def send(self, number: int, deadline: Deadline) -> str:
        """Post a batch; the id of its request.

        A request to ``"local"`` has been run when this returns.
        """
        batch = self.batches[number]
        start = self._start + sum(len(b["input_ids"]) for b in self.batches[:number])
        how: dict[str, Any] = {"remote": "local"}
        if not self.on.is_local:
            how = {"backend": client(self.task.model, self.on.remote, deadline)}
        program = self.task.program(start, len(batch["input_ids"]))
        saved, backend = remote_batch(
            self.task.model, program, batch, self.task.decoding.at(start), dtype=self.on.dtype,
            **how,
        )  # fmt: skip
        if not self.on.is_local:
            return backend.job_id
        self._run_here[number] = saved
        return f"local-{number}"

    def fetch(self, number: int, request: str, deadline: Deadline) -> tuple[Any, str | None]:
        """Ask for a batch once: what was saved there, if it has ended, and its status, if any."""
        if self.on.is_local:
            return self._run_here.pop(number), "COMPLETED"
        backend = client(self.task.model, self.on.remote, deadline, request)
        answer = backend.poll()
        saved = answer.get("saved") if isinstance(answer, dict) else answer
        if isinstance(saved, dict) and isinstance(saved.get("where"), dict):
            # now: a job may be loaded from its file for another address of the server
            saved["where"] |= called_there(self.task.model, self.on.remote)
        return saved, None if backend.status is None else backend.status.value

    def accept(self, number: int, saved: Any) -> None:
        """Keep what a batch's block saved, if it fits."""
        task, batch = self.task, self.batches[number]
        new = task.decoding.new
        self._outputs[number] = received(saved, task.intervention, batch, new, task.function)

    def piece(self, number: int) -> Piece:
        """The result of a batch that was accepted."""
        log, tokens, logits, there = self._outputs[number]
        piece = self.task.piece(self.batches[number], log, tokens, logits)
        run = piece.run
        if not self.on.is_local:
            run = replace(run, provenance=elsewhere(run.provenance, there))
        return piece._replace(run=run)

    def run(self) -> Run:
        """All batches as one result."""
        return self.task.join([self.piece(number) for number in range(len(self.batches))])


Outputs = tuple[Log, Tensor, Tensor, dict[str, str]]
"""A batch's log, all its token ids, the logits after the prompt, and where it ran."""

CHANGES = ("row", "latent", "before", "after", "norm", "position", "step", "token")


def received(
    saved: Any, intervention: Intervention, batch: dict[str, Tensor], new: int, where: str = "run"
) -> Outputs:
    """What came back, as a local batch would have left it."""
    if not isinstance(saved, dict) or not isinstance(saved.get("log"), dict):
        wrong(where, f"{type(saved).__name__}", "a log, tokens and logits")
    rows = len(batch["input_ids"])
    tokens = _tokens(where, saved.get("tokens"), batch["input_ids"], max(new, 1))
    logits = saved.get("logits")
    if not (isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim == 2):
        wrong(where, f"logits {_of(logits)}", "a number for each prompt and token")
    if len(logits) != rows or not logits.shape[1]:
        wrong(where, f"logits {_of(logits)}", f"{rows} rows, one a prompt")
    log = saved["log"]
    passes = log.get("passes")
    if type(passes) is not int or not 1 <= passes <= max(new, 1):
        wrong(where, f"a log of {passes!r} passes", f"one of at most {max(new, 1)}")
    position = log["view"].get("position") if isinstance(log.get("view"), dict) else None
    if _of(position) != f"[{rows}, 1] int64":
        wrong(where, f"positions {_of(position)}", f"whole numbers [{rows}, 1]")
    columns = batch["input_ids"].shape[1] + passes - 1
    wanted: dict[str, set[int]] = {"readings": set(), "masks": set(), "fired": set()}
    for step, numbers in numbered(intervention.parts()):
        for number, (_, indices) in zip(numbers, step.latents.parts, strict=True):
            if step.change is None:
                wanted["readings"].add(number)
                wanted["masks"].add(number)
                _reading(where, log, number, step.reduction, (rows, columns, len(indices)))
            else:
                wanted["fired"].add(number)
                _fired(where, log, number, (rows, passes, len(indices)))
    for group, numbers in wanted.items():
        if set(log[group]) != numbers:
            wrong(where, f"{group} of steps {sorted(log[group])}", f"of {sorted(numbers)}")
    there = saved.get("where")
    if not isinstance(there, dict) or not {"dtype", "device"} <= set(there):
        wrong(where, f"{there!r:.80} for where it ran", "its dtype, device and versions")
    there = {str(name): f"{value:.200}" for name, value in there.items()}
    tokens = tokens if new else batch["input_ids"]
    return unpack(log), tokens, logits.float().cpu(), there


def _tokens(where: str, tokens: Any, prompts: Tensor, new: int) -> Tensor:
    """[rows, columns]: the prompts, and at most ``new`` tokens behind them."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 2:
        wrong(where, f"tokens {_of(tokens)}", "ids [prompts, tokens]")
    rows, width = prompts.shape
    if len(tokens) != rows or not width < tokens.shape[1] <= width + new:
        wrong(where, f"tokens {_of(tokens)}", f"{rows} rows of {width + 1}..{width + new}")
    tokens = tokens.cpu()
    if not torch.equal(tokens[:, :width], prompts.cpu()) or bool((tokens < 0).any()):
        wrong(where, "tokens that do not begin with the prompts", "the prompts, continued")
    return tokens


def _reading(
    where: str, log: dict[str, Any], number: int, reduce: str | None, shape: tuple[int, int, int]
) -> None:
    """Masks [rows, columns] (or counts [rows, 1]), and as many values [n, k] as they select."""
    rows, columns, k = shape
    f: Any = log.get("readings", {}).get(number)
    mask: Any = log.get("masks", {}).get(number)
    wanted = [rows, 1 if reduce else columns]
    if _of(mask) != f"{wanted} {'int64' if reduce else 'bool'}":
        wrong(where, f"a mask {_of(mask)} of step {number}", f"{wanted}")
    chosen = int((mask > 0).sum())
    fits = isinstance(f, Tensor) and f.is_floating_point() and f.shape == (chosen, k)
    if not fits:
        wrong(where, f"readings {_of(f)} of step {number}", f"[{chosen}, {k}], as its mask says")


def _fired(where: str, log: dict[str, Any], number: int, shape: tuple[int, int, int]) -> None:
    """Counts [passes, 3], and the changes of each pass, if they were kept."""
    rows, passes, k = shape
    counts = log["fired"].get(number)
    fits = isinstance(counts, Tensor) and counts.is_floating_point()
    if not fits or counts.shape != (passes, 3) or not bool((counts[:, :2] >= 0).all()):
        wrong(where, f"counts {_of(counts)} of step {number}", f"[{passes}, 3]")
    for seen in log["events"].get(number, []):
        changes = seen.get("changes", {})
        sizes = {tuple(column.shape) for column in changes.values()}
        if set(changes) != set(CHANGES) or len(sizes) != 1 or len(next(iter(sizes))) != 1:
            ragged = f"changes of step {number} that are ragged"
            wrong(where, ragged, "a column each, of one length")
        inside = (changes["row"] >= 0) & (changes["row"] < rows)
        inside &= (changes["latent"] >= 0) & (changes["latent"] < k)
        if not bool(inside.all()):
            wrong(where, f"changes of step {number} outside", f"{rows} rows and {k} latents")


def _of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"of type {type(value).__name__}"


def wrong(where: str, got: str, wanted: str) -> NoReturn:
    """The error for a result that does not fit its request."""
    raise RemoteError(
        f"{where}: `on` is a server whose result has {got}, wanted {wanted}. Likely cause: a"
        " server of another version, or one that is none. Try: preflight(model, prompts,"
        " on=...), which shows the server's nnsight"
    )
