"""A run's batches on their way to a server and back, and the arguments they were sent with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import whole
from ..errors import PromptError, RemoteError, SaefeatError
from ..files.identity import digest, model_key
from ..generation.batch import require_passes
from ..generation.decode import Decode, Greedy, Sample
from ..generation.decoding import Decoding, decoding, until_stop
from ..generation.result import join, piece, provenance
from ..results.run import Run
from ..shipping.server import Server
from ..text.prompts import split
from ..verbs.base import Intervention, by_prompt, require_fired, require_rows
from ..verbs.lower import lower
from .batch import backend_of, remote_batch, require_plain, with_stops
from .preflight import inspected, require_light
from .validate import Piece, received


class Call(NamedTuple):
    """``submit``'s arguments but for the model, the prompts and the intervention."""

    max_new_tokens: int
    decode: Decode
    batch_size: int
    allow_unfired: bool
    on: Server

    def settings(self, model: Any) -> Decoding:
        """How tokens are chosen, checked."""
        whole("submit", "batch_size", self.batch_size, error=PromptError)
        with_stops(model)
        settings = decoding(model, self.max_new_tokens, self.decode)
        require_plain(model, settings, self.on.remote)
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the job's file, which has no address: that stands beside it."""
        dtype = None if self.on.dtype is None else str(self.on.dtype).removeprefix("torch.")
        return {
            "max_new_tokens": self.max_new_tokens,
            "decode": {"kind": type(self.decode).__name__, **asdict(self.decode)},
            "batch_size": self.batch_size,
            "allow_unfired": self.allow_unfired,
            "dtype": dtype,
            "payload_limit": self.on.payload_limit,
            "requests": self.on.requests,
        }

    @classmethod
    def read(cls, said: Any, url: str | None) -> Call:
        """The arguments in a job's file, for a server at this address.

        Raises:
            RemoteError: for others than ``submit`` has.
        """
        try:
            decode, dtype = dict(said["decode"]), said["dtype"]
            kind = {"Greedy": Greedy, "Sample": Sample}[decode.pop("kind")]
            dtype = None if dtype is None else getattr(torch, dtype)
            limits = {name: said[name] for name in ("payload_limit", "requests")}
            names = ("max_new_tokens", "batch_size", "allow_unfired")
            rest = {name: said[name] for name in names}
            return cls(**rest, decode=kind(**decode), on=Server(url, dtype=dtype, **limits))
        except (KeyError, TypeError, ValueError, AttributeError, SaefeatError) as error:
            raise RemoteError(
                f"Job.load: `file` is one with arguments {said!r:.200}, wanted those of submit"
                f" ({type(error).__name__}: {error}). Likely cause: a file from another version of"
                " saefeat. Try: submit(...) again, with a new file"
            ) from error


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


def require_server(on: Any) -> None:
    """Refuse what is no server that a job could be left with.

    Raises:
        RemoteError: for None, ``Server("local")``, or anything else.
    """
    if isinstance(on, Server) and not on.is_local:
        return
    raise RemoteError(
        f'submit: `on` is {on!r}, wanted a Server() or Server("http://..."). Likely cause: a job'
        " is left with a server, which a run here is not. Try: run(model, prompts, intervention,"
        ' on=Server("local")), which waits'
    )


class Post(NamedTuple):
    """A run's batches, and where they go."""

    model: Any
    intervention: Intervention
    prompts: dict[str, Tensor]
    batches: list[dict[str, Tensor]]
    call: Call
    settings: Decoding

    @classmethod
    def of(
        cls,
        model: Any,
        prompts: dict[str, Tensor],
        intervention: Intervention,
        call: Call,
    ) -> Post:
        """Checked, but for the preflight."""
        require_server(call.on)
        require_rows(intervention, len(prompts["input_ids"]))
        settings = call.settings(model)
        prompts = {name: tensor.long() for name, tensor in prompts.items()}  # as a file has them
        batches = split(prompts, call.batch_size)
        return cls(model, intervention, prompts, batches, call, settings)

    def require_light(self) -> None:
        """Refuse what would fail there, or weighs too much."""
        on = self.call.on
        given = (self.model, self.batches, self.intervention, self.settings, on.dtype)
        require_light(inspected(*given), on.payload_limit, "submit")

    def plan(self, fingerprint: str = "") -> Plan:
        """What a job needs."""
        said = {"model": model_key(self.model), "call": self.call.to_dict()}
        said["host"] = backend_of(self.model, self.call.on.remote).host
        size = len(self.batches)
        return Plan(size, fingerprint, said, self.send, self.fetch, self.check, self.finish)

    def fingerprint(self) -> str:
        """A hash of all that decides the result, and not of where or how it is asked for.

        Raises:
            CheckpointError: for a function that cannot be told from another.
        """
        call = self.call
        asked = [call.max_new_tokens, call.decode, call.batch_size, str(call.on.dtype)]
        return digest(self.prompts, self.intervention, asked, model_key(self.model))

    def start(self, number: int) -> int:
        """The number of a batch's first prompt."""
        return number * self.call.batch_size

    def send(self, number: int) -> str:
        """Post a batch; the id of its job."""
        batch, start = self.batches[number], self.start(number)
        own = by_prompt(self.intervention)
        rows = slice(start, start + len(batch["input_ids"])) if own else slice(None)
        program = lower(self.intervention, self.model, rows)
        on = self.call.on
        _, backend = remote_batch(
            self.model, program, batch, self.settings.at(start),
            dtype=on.dtype, remote=on.remote, blocking=False,
        )  # fmt: skip
        return backend.job_id

    def fetch(self, job: str) -> tuple[dict[str, Any] | None, str | None]:
        """Poll once: what was saved there, if it has ended, and the status, if there is one."""
        backend = backend_of(self.model, self.call.on.remote, job)
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
