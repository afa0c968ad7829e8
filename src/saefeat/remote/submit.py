"""``submit``: a run that is sent to a server and left with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import checked
from ..checks import whole
from ..errors import PromptError
from ..files.paths import expanded
from ..generation.decoding import Decode, Greedy
from ..results.provenance import host_of, model_key, require_unedited
from ..shipping.server import NDIF, Server
from ..text.prompts import Prompts, encode_for
from ..verbs.base import Chain, Intervention
from .jobfile import Call, JobFile, Part, not_ours
from .jobs import Job
from .preflight import require_sendable

if TYPE_CHECKING:
    from nnsight import TransformersModel


@checked(own=("batch_size", "max_new_tokens", "on"))
def submit(
    model: TransformersModel, prompts: Prompts, intervention: Intervention | None = None, *,
    max_new_tokens: int = 0, decode: Decode | None = None, batch_size: int = 32,
    allow_unfired: bool = False, on: Server = NDIF, file: str | Path | None = None,
) -> Job:  # fmt: skip
    """Send a run to a server and return at once.

    With ``file`` nothing is lost: the same call with the same file, in a new process too, polls
    what is pending, sends again what failed, and keeps what has arrived. So does ``Job.load`` with
    the file and the model alone. What is not listed here is as in ``run``.

    Args:
        model: an nnsight ``TransformersModel``; its weights need not be loaded.
        batch_size: prompts a batch; each is a request.
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
        >>> import loopback  # NDIF's server code on this machine, in the repository's tests
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
    whole("submit", "max_new_tokens", max_new_tokens, 0, error=PromptError)
    encoded = encode_for(model, prompts, max_new_tokens)
    encoded = {name: tensor.long() for name, tensor in encoded.items()}  # as a file has them
    requests = call.requests(model, encoded, chosen)
    require_sendable(requests)
    if file is None:
        return Job(requests).resubmit()
    require_unedited(model)
    about = {"model": model_key(model), "call": call.to_dict()}
    about["host"] = host_of(on.remote)
    parts = [Part() for _ in requests.batches]
    fingerprint = call.fingerprint(model, encoded, chosen)
    job = JobFile(expanded(file, "submit", "file"), fingerprint, about, parts)
    if job.path.exists():
        old = JobFile.read(job.path)
        if old.fingerprint != fingerprint or len(old.parts) != len(parts):
            raise not_ours(job.path, "of another run")
        old.about |= about  # this call's own address and limits
        return Job.resumed(requests, old).resubmit()
    job.keep_call(encoded, chosen, model)
    return Job.resumed(requests, job).resubmit()
