"""A run's batches on their way to a server and back, and the arguments they were sent with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RemoteError
from ..files.identity import digest, model_key
from ..generation.batch import require_passes
from ..generation.decoding import Decoding, decoding, until_stop, whole_number
from ..generation.result import join, piece, provenance
from ..results.run import Run
from ..shipping.payload import PAYLOAD_LIMIT
from ..text.prompts import split
from ..verbs.base import Intervention, by_prompt, require_fired, require_rows
from ..verbs.lower import lower
from .batch import backend_of, remote_batch, require_plain, with_stops
from .preflight import inspected, require_light
from .validate import Piece, received


class Call(NamedTuple):
    """``submit``'s arguments that are plain: they stand in the job's file."""

    max_new_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[int, ...] = ()
    batch_size: int = 32
    allow_unfired: bool = False
    dtype: str | None = None
    payload_limit: int = PAYLOAD_LIMIT
    limit: int = 4

    def settings(self, model: Any, remote: bool | str) -> Decoding:
        """How tokens are chosen, checked."""
        for name in ("batch_size", "limit", "payload_limit"):
            whole_number(name, getattr(self, name), 1)
        with_stops(model)
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
        found = decoding(model, **{name: getattr(self, name) for name in names})
        require_plain(model, found, remote)
        return found

    @classmethod
    def read(cls, said: Any) -> Call:
        """The arguments in a job's file.

        Raises:
            RemoteError: for others than ``submit`` has.
        """
        if not isinstance(said, dict) or set(said) != set(cls._fields):
            got = sorted(said) if isinstance(said, dict) else type(said).__name__
            raise RemoteError(
                f"Job.load: `file` is one with arguments {got}, wanted those of submit:"
                f" {', '.join(cls._fields)}. Likely cause: a file from another version of saefeat."
                " Try: submit(...) again, with a new file"
            )
        return cls(**{**said, "stop": tuple(said["stop"])})


@dataclass(frozen=True)
class Plan:
    """What a job needs of the run it belongs to.

    ``send(i)`` posts batch i and returns its id; ``fetch(id)`` polls once, giving the saved values
    and the status; ``check(i, saved)`` refuses what does not fit batch i; ``finish`` makes a result
    of all the saved values.
    """

    parts: int
    fingerprint: str
    about: dict[str, Any]
    send: Callable[[int], str]
    fetch: Callable[[str], tuple[dict[str, Any] | None, str | None]]
    check: Callable[[int, Any], object]
    finish: Callable[[list[dict[str, Any]]], Any]


def require_server(remote: Any) -> None:
    """Refuse what is no server that a job could be left with.

    Raises:
        RemoteError: for ``"local"``, False, or a host without its scheme.
    """
    if remote is True or (isinstance(remote, str) and remote.startswith(("http://", "https://"))):
        return
    raise RemoteError(
        f"submit: `remote` is {remote!r}, wanted True, or a server's URL with http:// or https://."
        " Likely cause: a job is left with a server, which a run here is not. Try: run(model,"
        ' prompts, intervention, remote="local"), which waits'
    )


class Post(NamedTuple):
    """A run's batches, and where they go."""

    model: Any
    intervention: Intervention
    prompts: dict[str, Tensor]
    batches: list[dict[str, Tensor]]
    call: Call
    settings: Decoding
    remote: bool | str

    @classmethod
    def of(
        cls,
        model: Any,
        prompts: dict[str, Tensor],
        intervention: Intervention,
        call: Call,
        remote: bool | str,
    ) -> Post:
        """Checked, but for the preflight."""
        require_server(remote)
        require_rows(intervention, len(prompts["input_ids"]))
        settings = call.settings(model, remote)
        prompts = {name: tensor.long() for name, tensor in prompts.items()}  # as a file has them
        batches = split(prompts, call.batch_size)
        return cls(model, intervention, prompts, batches, call, settings, remote)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the matrices that are sent."""
        return None if self.call.dtype is None else getattr(torch, self.call.dtype)

    def require_light(self) -> None:
        """Refuse what would fail there, or weighs too much."""
        given = (self.model, self.batches, self.intervention, self.settings, self.dtype)
        require_light(inspected(*given), self.call.payload_limit, "submit")

    def plan(self, fingerprint: str = "") -> Plan:
        """What a job needs."""
        said = {"model": model_key(self.model), "call": self.call._asdict()}
        said["host"] = backend_of(self.model, self.remote).host
        size = len(self.batches)
        return Plan(size, fingerprint, said, self.send, self.fetch, self.check, self.finish)

    def fingerprint(self) -> str:
        """A hash of all that decides the result, and not of where or how it is asked for.

        Raises:
            CheckpointError: for a function that cannot be told from another.
        """
        asked = self.call._replace(limit=1, payload_limit=1, allow_unfired=False)
        return digest(self.prompts, self.intervention, asked._asdict(), model_key(self.model))

    def start(self, number: int) -> int:
        """The number of a batch's first prompt."""
        return number * self.call.batch_size

    def send(self, number: int) -> str:
        """Post a batch; the id of its job."""
        batch, start = self.batches[number], self.start(number)
        own = by_prompt(self.intervention)
        rows = slice(start, start + len(batch["input_ids"])) if own else slice(None)
        program = lower(self.intervention, self.model, rows)
        how: dict[str, Any] = {"dtype": self.dtype, "remote": self.remote, "blocking": False}
        _, backend = remote_batch(self.model, program, batch, self.settings.at(start), **how)
        return backend.job_id

    def fetch(self, job: str) -> tuple[dict[str, Any] | None, str | None]:
        """Poll once: what was saved there, if it has ended, and the status, if there is one."""
        backend = backend_of(self.model, self.remote, job)
        found = backend.poll()
        saved = found.get("saved") if isinstance(found, dict) else found
        return saved, None if backend.status is None else backend.status.value

    def check(self, number: int, saved: Any) -> Piece:
        """A batch's result, if it fits."""
        new = self.settings.new
        return received(saved, self.intervention, self.batches[number], new, "submit")

    def finish(self, saved: list[dict[str, Any]]) -> Run:
        """All batches as one result."""
        found = [self.check(number, one) for number, one in enumerate(saved)]
        generation = {**self.settings.to_dict(self.model), "batch_size": self.call.batch_size}
        source = provenance(self.model, self.intervention, generation)
        pieces = []
        for batch, (log, tokens, logits) in zip(self.batches, found, strict=True):
            late = tokens[:, batch["input_ids"].shape[1] :]
            if self.intervention.parts() and not self.call.allow_unfired:
                require_passes(log, max(1, late.shape[1]), "submit")
            new = until_stop(late, self.settings.stops)
            pieces.append(piece(self.intervention, self.model, batch, (log, new, logits), source))
        result = join(pieces)
        if not self.call.allow_unfired:
            require_fired(result.receipt, "submit")
        return result
