"""submit: a run on a server that one does not wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files.identity import require_unedited
from ..generation.decode import Decode, Greedy
from ..shipping.server import NDIF, Server
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
    max_new_tokens: int = 0,
    decode: Decode | None = None,
    batch_size: int = 32,
    allow_unfired: bool = False,
    on: Server = NDIF,
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
        max_new_tokens: as in ``run``.
        decode: as in ``run``.
        batch_size: as in ``run``; each batch is a request.
        allow_unfired: as in ``run``.
        on: the server, the NDIF host that nnsight is set to by default.
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
        ...     job = sf.remote.submit(model, ["hello"], on=sf.remote.Server(server.url))
        ...     job.wait().receipt.passes
        1
    """
    call = Call(max_new_tokens, decode or Greedy(), batch_size, allow_unfired, on)
    chosen = intervention if intervention is not None else Chain(())
    encoded = encode_prompts(getattr(model, "tokenizer", None), prompts)
    post = Post.of(model, encoded, chosen, call)
    post.require_light()
    return _job(post, None if file is None else Path(file)).resubmit()


def _job(post: Post, file: Path | None) -> Job:
    """The job, as its file has it if there is one."""
    if file is None:
        return Job(post.plan(), None, post.call.on.requests)
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
    return Job(plan, file, post.call.on.requests, parts)
