"""submit: a run on a server that one does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..execution.decoding import Decoding, decoding, until_stop, whole_number
from ..execution.one_batch import require_passes
from ..execution.result import Run, join, piece, provenance
from ..prompts import Prompts, encode_prompts, split
from ..verbs.base import Chain, Intervention, by_prompt, require_fired, require_rows
from ..verbs.lower import lower
from .batch import backend_of, received, remote_batch, remote_settings
from .jobfile import about, fingerprint
from .jobs import Job, Plan
from .preflight import PAYLOAD_LIMIT, preflight, require_light


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
    whole, key = lower(chosen, model), model.to_model_key()
    post = _Post(model, chosen, split(encoded, batch_size), whole, batch_size, settings)
    post = post._replace(new=max_new_tokens, dtype=dtype, remote=remote, unfired=allow_unfired)
    mark = fingerprint(encoded, whole, options, str(dtype), key)
    said = about(key, backend_of(model, remote).host, chosen, **options)
    plan = Plan(len(post.batches), mark, said, post.send, post.fetch, post.finish)
    return Job(plan, None if file is None else Path(file), limit)


class _Post(NamedTuple):
    """A run's batches on their way to a server and back."""

    model: Any
    intervention: Intervention
    batches: list[dict[str, Tensor]]
    whole: dict[str, Any]
    size: int
    settings: Decoding
    new: int = 0
    dtype: torch.dtype | None = None
    remote: bool | str = True
    unfired: bool = False

    def send(self, number: int) -> str:
        """Post a batch; the id of its job."""
        rows = slice(
            number * self.size, number * self.size + len(self.batches[number]["input_ids"])
        )
        own = by_prompt(self.intervention)
        program = lower(self.intervention, self.model, rows) if own else self.whole
        how: dict[str, Any] = {"dtype": self.dtype, "remote": self.remote, "blocking": False}
        batch = self.batches[number]
        _, backend = remote_batch(self.model, program, batch, self.new, **how)
        return backend.job_id

    def fetch(self, job: str) -> tuple[dict[str, Any] | None, str | None]:
        """Poll once: what was saved there, if it has ended, and the status, if there is one."""
        backend = backend_of(self.model, self.remote, job)
        saved = backend.poll()
        return saved, None if backend.status is None else backend.status.value

    def finish(self, saved: list[dict[str, Any]]) -> Run:
        """All batches as one result."""
        found = [received(s, b, self.new) for s, b in zip(saved, self.batches, strict=True)]
        given = (self.intervention, self.model, self.batches, found, self.settings)
        return finish(*given, allow_unfired=self.unfired)


def finish(
    intervention: Intervention,
    model: Any,
    batches: Sequence[dict[str, Tensor]],
    found: Sequence[tuple[dict[str, Any], Tensor, Tensor]],
    settings: Decoding,
    *,
    allow_unfired: bool,
) -> Run:
    """All batches a server has run as one result, from each one's log, token ids and logits."""
    source = provenance(model, intervention, settings.to_dict(model))
    pieces = []
    for batch, (log, tokens, logits) in zip(batches, found, strict=True):
        late = tokens[:, batch["input_ids"].shape[1] :]
        if intervention.parts() and not allow_unfired:
            require_passes(log, max(1, late.shape[1]), "submit")
        new = until_stop(late, settings.stops)
        pieces.append(piece(intervention, model, batch, (log, new, logits), source))
    result = join(pieces)
    if not allow_unfired:
        require_fired(result.receipt, "submit")
    return result
