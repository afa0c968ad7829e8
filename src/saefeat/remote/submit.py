"""submit: a run on a server that one does not wait for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..generation.decode import Decode, Greedy
from ..results.identity import model_key, require_unedited
from ..shipping.server import NDIF, Server
from ..text.prompts import Prompts, encode_prompts
from ..verbs.base import Chain, Intervention
from .batch import backend_of
from .call import Call
from .jobfile import JobFile, Part, not_ours
from .jobs import Job

if TYPE_CHECKING:
    from nnsight import TransformersModel


def submit(
    model: TransformersModel,
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
        >>> import loopback  # the repository's stand-in for a server, in its tests
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
    encoded = {name: tensor.long() for name, tensor in encoded.items()}  # as a file has them
    requests = call.requests(model, encoded, chosen)
    requests.require_light()
    if file is None:
        return Job(requests).resubmit()
    require_unedited(model)
    fingerprint = call.fingerprint(model, encoded, chosen)
    about = {"model": model_key(model), "call": call.to_dict()}
    about["host"] = backend_of(model, on.remote).host
    new = JobFile(Path(file), fingerprint, about, [Part() for _ in requests.batches])
    if new.path.exists():
        return Job.resumed(requests, _same_run(new)).resubmit()
    new.keep_call(encoded, chosen, model)
    return Job.resumed(requests, new).resubmit()


def _same_run(new: JobFile) -> JobFile:
    """The file that is there already, with this call's own address and limits.

    Raises:
        RemoteError: if it is of another run.
    """
    old = JobFile.read(new.path)
    if old.fingerprint != new.fingerprint or len(old.parts) != len(new.parts):
        raise not_ours(new.path, "of another run")
    old.about |= new.about
    return old
