"""sweep: many interventions on the same prompts, side by side in one batch.

A setting is a few rows of the batch, so that thirty settings of one prompt cost little more than
one: the model's own passes, which are most of the time, are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..checks import whole
from ..errors import FiringError, LatentError, PromptError, RemoteError
from ..files.paths import expanded
from ..generation.decoding import decoding, until_stop
from ..generation.task import Piece, Task, require_passes, run_batch
from ..model.route import route
from ..remote.jobs import Job
from ..remote.scheduler import Scheduler
from ..remote.submit import submit
from ..results.run import Run
from ..shipping.server import Server
from ..text.prompts import Prompts, encode_for, split
from ..verbs.base import Chain, Intervention, require_rows
from ..verbs.gaps import warn_of_gaps
from ..verbs.lower import sites_of
from ..verbs.placement import beside, taken_apart

if TYPE_CHECKING:
    from nnsight import TransformersModel

Key = TypeVar("Key", bound=Hashable)


@checked(own=("batch_size", "max_new_tokens"))
def sweep(
    model: TransformersModel, prompts: Prompts, settings: Mapping[Key, Intervention | None], *,
    max_new_tokens: int = 0, batch_size: int = 32, allow_unfired: bool = False,
    progress: bool = False, on: Server | None = None, folder: str | Path | None = None,
) -> dict[Key, Run]:  # fmt: skip
    """Run the same prompts under many interventions, several to a batch.

    Each setting gives what ``run`` gives for it, to rounding; any interventions will do, with
    probes, conditions and values of their own. ``model``, ``prompts``, ``allow_unfired`` and
    ``progress`` are as in ``run``.

    Args:
        settings: name → intervention; None is the bare model.
        max_new_tokens: how many tokens to generate, greedily; 0 makes one forward pass.
        batch_size: rows a batch; prompts x settings rows are run in all.
        on: as in ``run``; each setting is a job (``submit``), and all together have at most the
            server's ``requests`` in flight.
        folder: a folder for the jobs' files: the same call with it asks again only for what has
            not arrived. Only with ``on``.

    Returns:
        Name → ``Run``, in the order given.

    Raises:
        LatentError: without settings.
        RemoteError: if a job failed; the others have been waited for.
        FiringError, PromptError, SiteError, ModelError: as in ``run``, naming the setting.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> values = {v: sf.Clamp(saes.latents({2: [7]}), v) for v in (0.0, 2.0, 4.0)}
        >>> runs = sf.sweep(model, ["how do i bake bread"], values, max_new_tokens=3)
        >>> list(runs), runs[2.0].receipt.rows[0].largest > 0
        ([0.0, 2.0, 4.0], True)
    """
    chosen = {key: one or Chain(()) for key, one in settings.items()}
    if not chosen:
        raise LatentError(
            "sweep: `settings` is empty, wanted at least one intervention. Likely cause: a search"
            ' space without points. Try: sweep(model, prompts, {"ablate": Ablate(latents)})'
        )
    if on is not None:
        submitted = partial(
            submit, model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
            allow_unfired=allow_unfired,
        )  # fmt: skip
        return _on_server(submitted, chosen, on, folder, progress)
    whole("sweep", "batch_size", batch_size, error=PromptError)
    greedy = decoding(model, max_new_tokens=max_new_tokens)
    encoded = encode_for(model, prompts, greedy.new)
    total = len(encoded["input_ids"])
    for one in chosen.values():
        require_rows(one, total)
        warn_of_gaps("sweep", one, model, encoded)
    batches = split(encoded, min(batch_size, total))
    way = route(model, [site for one in chosen.values() for site in sites_of(one)])
    tasks = [
        Task(f"sweep, setting {key!r}", model, one, greedy, batch_size, allow_unfired, way)
        for key, one in chosen.items()
    ]
    pieces: list[list[Piece]] = [[] for _ in tasks]
    together = max(1, batch_size // len(batches[0]["input_ids"]))  # settings that share a batch
    groups = [range(len(tasks))[n : n + together] for n in range(0, len(tasks), together)]
    start = 0
    count = len(batches) * len(groups)
    with tqdm(total=count, disable=not progress, desc="sweep", unit="batch") as bar:
        for batch in batches:
            for group in groups:
                results = _together([tasks[n] for n in group], batch, start)
                for n, result in zip(group, results, strict=True):
                    pieces[n].append(result)
                bar.update()
            start += len(batch["input_ids"])
    return {key: task.join(own) for key, task, own in zip(chosen, tasks, pieces, strict=True)}


def _together(tasks: list[Task], batch: dict[str, Tensor], start: int) -> list[Piece]:
    """One batch of prompts, the first of them number ``start``, under several settings."""
    (rows, width), settings = batch["input_ids"].shape, tasks[0].decoding
    programs = [task.program(start, rows) for task in tasks]
    shared = {name: value.repeat(len(tasks), 1) for name, value in batch.items()}
    log, tokens, logits = run_batch(tasks[0].model, beside(programs, rows), shared, settings)
    ends = [until_stop(part[:, width:], settings.stops) for part in tokens.split(rows)]
    passes = [max(1, *(len(row) for row in part)) for part in ends]
    if not tasks[0].allow_unfired and any(program.visits for program in programs):
        require_passes(log, max(passes), "sweep")
    logs = taken_apart(log, len(tasks), rows, passes)
    parts = zip(tasks, logs, ends, logits.split(rows), strict=True)
    return [task.result(batch, log, new, last) for task, log, new, last in parts]


def _on_server(
    submitted: Callable[..., Job],
    settings: Mapping[Key, Intervention],
    on: Server,
    folder: str | Path | None,
    progress: bool,
) -> dict[Key, Run]:
    """A job for each setting, all under the server's limit on requests in flight."""
    one, starts = replace(on, requests=1), {}
    for number, (key, intervention) in enumerate(settings.items()):
        file = (
            None if folder is None else expanded(folder, "sweep", "folder") / f"{number:05d}.json"
        )
        starts[key] = partial(submitted, intervention, on=one, file=file)
    jobs = Scheduler[Key](starts, on.requests)
    for _ in tqdm(jobs.ended(on.timeout), total=len(starts), disable=not progress, desc="sweep"):
        pass
    if not jobs.failed:
        return {key: jobs.results[key] for key in settings}
    key, error = next(iter(jobs.failed.items()))
    unfired = all(isinstance(error, FiringError) for error in jobs.failed.values())
    kept = f"The others lie in {folder}: the same call sends only these again." if folder else ""
    raise (FiringError if unfired else RemoteError)(
        f"sweep: {len(jobs.failed)} of {len(settings)} settings failed. The first, setting"
        f" {key!r}: {error}. {kept}"
    )
