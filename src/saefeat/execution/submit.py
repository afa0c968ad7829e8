"""submit: a run on a server that one does not wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..prompts import Prompts, encode_prompts, split
from ..verbs.base import Chain, Intervention, by_prompt, require_rows
from ..verbs.lower import lower
from .decoding import decoding, whole_number
from .jobfile import about, fingerprint
from .jobs import Job, Plan
from .preflight import PAYLOAD_LIMIT, preflight, require_light
from .remote import backend_of, received, remote_batch
from .result import Run
from .run import finish, remote_settings


def submit(
    model: Any,
    prompts: Prompts,
    intervention: Intervention | None = None,
    *,
    remote: bool | str = True,
    max_new_tokens: int = 0,
    batch_size: int = 32,
    allow_unfired: bool = False,
    dtype: torch.dtype | None = None,
    payload_limit: int = PAYLOAD_LIMIT,
    limit: int = 4,
    file: str | Path | None = None,
) -> Job:
    """Send a run to a server and return at once.

    With ``file`` nothing is lost: the same call with the same file, in a new process too, polls
    what is pending, sends again what failed, and keeps what has arrived.

    Args:
        model: as in ``run``; its weights need not be loaded.
        prompts: as in ``run``.
        intervention: as in ``run``.
        remote: True for the configured NDIF host, or a server's URL.
        max_new_tokens: as in ``run``.
        batch_size: as in ``run``; each batch is a request.
        allow_unfired: as in ``run``.
        dtype: as in ``run``.
        payload_limit: as in ``run``.
        limit: how many requests may be queued or running at once.
        file: a JSON file for the job's state; results that have arrived lie beside it.

    Returns:
        A ``Job``; its ``wait``, its ``poll`` or awaiting it gives the ``Run``.

    Raises:
        RemoteError: for a request too large or bound to fail, or the file of another run.
        SiteError, ModelError, PromptError, LatentError: as ``run``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> nnsight.CONFIG.APP.REMOTE_LOGGING = False  # else statuses are shown as they come
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> with sf.serve(model) as server:
        ...     job = sf.submit(model, ["hello"], remote=server.url)
        ...     job.wait().receipt.passes
        1
    """
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        whole_number(name, number, 1)
    settings = remote_settings(model, decoding(model, max_new_tokens=max_new_tokens))
    chosen = intervention if intervention is not None else Chain(())
    encoded = encode_prompts(getattr(model, "tokenizer", None), prompts)
    require_rows(chosen, len(encoded["input_ids"]))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    require_light(preflight(model, encoded, chosen, dtype=dtype, **options), payload_limit)
    batches = split(encoded, batch_size)
    whole = lower(chosen, model)

    def send(number: int) -> str:
        rows = slice(number * batch_size, (number + 1) * batch_size)
        program = lower(chosen, model, rows) if by_prompt(chosen) else whole
        _, backend = remote_batch(
            model,
            program,
            batches[number],
            max_new_tokens,
            dtype=dtype,
            remote=remote,
            blocking=False,
        )
        return backend.job_id

    def fetch(job: str) -> tuple[dict[str, Any] | None, str | None]:
        backend = backend_of(model, remote, job)
        saved = backend.poll()
        return saved, None if backend.status is None else backend.status.value

    def done(saved: list[dict[str, Any]]) -> Run:
        found = [received(s, b, max_new_tokens) for s, b in zip(saved, batches, strict=True)]
        return finish(chosen, model, batches, found, settings, allow_unfired=allow_unfired)

    mark = fingerprint(encoded, whole, options, str(dtype), model.to_model_key())
    backend = backend_of(model, remote)
    said = about(model.to_model_key(), backend.host, chosen, **options)
    plan = Plan(len(batches), mark, said, send, fetch, done)
    return Job(plan, None if file is None else Path(file), limit)
