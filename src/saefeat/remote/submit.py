"""submit: a run on a server that one does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..files.identity import require_unedited
from ..shipping.narrow import require_floating
from ..shipping.payload import PAYLOAD_LIMIT
from ..text.prompts import Prompts, encode_prompts
from ..verbs.base import Chain, Intervention
from .jobfile import Part, keep_call, not_ours, read_job
from .jobs import Job
from .request import Call, Post


def submit(
    model: Any,
    prompts: Prompts,
    intervention: Intervention | None = None,
    *,
    remote: bool | str = True,
    max_new_tokens: int = 0,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Sequence[int] = (),
    batch_size: int = 32,
    allow_unfired: bool = False,
    dtype: torch.dtype | None = None,
    payload_limit: int = PAYLOAD_LIMIT,
    limit: int = 4,
    file: str | Path | None = None,
) -> Job:
    """Send a run to a server and return at once.

    With ``file`` nothing is lost: the same call with the same file, in a new process too, polls
    what is pending, sends again what failed, and keeps what has arrived. So does ``Job.load`` with
    the file and the model alone.

    Args:
        model: as in ``run``; its weights need not be loaded.
        prompts: as in ``run``.
        intervention: as in ``run``.
        remote: True for the configured NDIF host, or a server's URL.
        max_new_tokens: as in ``run``, and so are the next five.
        batch_size: as in ``run``; each batch is a request.
        allow_unfired: as in ``run``.
        dtype: as in ``run``.
        payload_limit: as in ``run``.
        limit: how many requests may be queued or running at once.
        file: a JSON file for the job's state. Beside it lie the prompts, the intervention (unless
            it has a function, which no file can hold) and results that have arrived.

    Returns:
        A ``Job``; its ``wait``, its ``poll`` or awaiting it gives the ``Run``.

    Raises:
        RemoteError: for a request too large or bound to fail, the file of another run, or a server
            that does not answer.
        CheckpointError: with ``file``, for a function that cannot be told from another.
        SiteError, ModelError, PromptError, LatentError: as ``run``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> nnsight.CONFIG.APP.REMOTE_LOGGING = False  # else statuses are shown as they come
        >>> model = tiny.model("chat")
        >>> with loopback.serve(model) as server:
        ...     job = sf.remote.submit(model, ["hello"], remote=server.url)
        ...     job.wait().receipt.passes
        1
    """
    require_floating(dtype)
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    call = Call(
        max_new_tokens, temperature, top_p, top_k, seed, tuple(stop), batch_size, allow_unfired,
        name, payload_limit, limit,
    )  # fmt: skip
    chosen = intervention if intervention is not None else Chain(())
    encoded = encode_prompts(getattr(model, "tokenizer", None), prompts)
    post = Post.of(model, encoded, chosen, call, remote)
    post.require_light()
    return _job(post, None if file is None else Path(file)).resubmit()


def _job(post: Post, file: Path | None) -> Job:
    """The job, as its file has it if there is one."""
    if file is None:
        return Job(post.plan(), None, post.call.limit)
    require_unedited(post.model)
    plan = post.plan(post.fingerprint())
    parts = [Part() for _ in post.batches]
    if file.exists():
        held = read_job(file)
        if held.fingerprint != plan.fingerprint or len(held.parts) != len(parts):
            raise not_ours(file, "of another run")
        parts = held.parts
        plan.about.update({n: v for n, v in held.about.items() if n not in plan.about})
    else:
        plan.about.update(keep_call(file, post.prompts, post.intervention, post.model))
    return Job(plan, file, post.call.limit, parts)
