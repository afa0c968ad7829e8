"""A sweep on a server: a job for each setting, a few at a time, none lost."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ..errors import FiringError, RemoteError, SaefeatError
from ..remote.jobs import MISSED, Job, Unreached, pauses
from ..remote.submit import submit
from ..results.run import Run
from ..text.prompts import Prompts
from ..verbs.base import Intervention

Key = TypeVar("Key", bound=Hashable)


def sweep_jobs(
    model: Any,
    prompts: Prompts,
    settings: Mapping[Key, Intervention],
    options: dict[str, Any],
    limit: int,
    folder: str | Path | None,
    progress: bool,
) -> dict[Key, Run]:
    """Each setting's ``Run``; ``options`` go to ``submit``.

    A job's first request is sent when it is its turn, at most ``limit`` requests being out. A
    failed job does not stop the others.
    """
    waiting, active = list(enumerate(settings)), {}
    found: dict[Key, Run] = {}
    failed: dict[Key, SaefeatError] = {}
    strikes: dict[Key, int] = {}
    bar, pause = tqdm(total=len(waiting), disable=not progress, desc="sweep"), pauses(None)
    while waiting or active:
        free = limit - sum(job.flying for job in active.values())
        while waiting and free > 0:
            number, key = waiting.pop(0)
            file = None if folder is None else Path(folder) / f"{number:05d}.json"
            try:
                one = replace(options["on"], requests=1)
                active[key] = submit(
                    model, prompts, settings[key], **{**options, "on": one}, file=file
                )
            except Unreached as error:
                if not _struck(key, error, failed, strikes):
                    waiting.append((number, key))
                break
            except SaefeatError as error:
                if not active and not found:  # nothing would be lost by saying so at once
                    raise
                failed[key] = error
                continue
            free -= active[key].flying
        for key, job in list(active.items()):
            ended = _look(key, job, found, failed, strikes)
            if ended:
                del active[key]
                bar.update()
                pause = pauses(None)
        if active or waiting:
            time.sleep(next(pause))
    if failed:
        kind = (
            FiringError if all(isinstance(e, FiringError) for e in failed.values()) else RemoteError
        )
        raise kind(_report(failed, len(settings), folder))
    return {key: found[key] for key in settings}


def _look(
    key: Key,
    job: Job,
    found: dict[Key, Run],
    failed: dict[Key, SaefeatError],
    strikes: dict[Key, int],
) -> bool:
    """Poll one job; whether it has ended, well or badly."""
    try:
        result = job.poll()
    except Unreached as error:
        return _struck(key, error, failed, strikes)
    except SaefeatError as error:
        if job.flying:  # others of its batches are still to arrive, and are kept
            return False
        failed[key] = error
        return True
    strikes.pop(key, None)
    if result is not None:
        found[key] = result
    return result is not None


def _struck(
    key: Key, error: SaefeatError, failed: dict[Key, SaefeatError], strikes: dict[Key, int]
) -> bool:
    """Whether a server has not answered for so long that the setting is given up."""
    strikes[key] = strikes.get(key, 0) + 1
    if strikes[key] >= MISSED:
        failed[key] = error
    return strikes[key] >= MISSED


def _report(failed: Mapping[Any, SaefeatError], total: int, folder: object) -> str:
    key, error = next(iter(failed.items()))
    kept = f"The others lie in {folder}: the same call sends only these again." if folder else ""
    return (
        f"sweep: {len(failed)} of {total} settings failed. The first, setting {key!r}: {error}."
        f" {kept}"
    )
