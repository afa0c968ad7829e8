"""``submit``'s arguments, as a value and as plain data for a job's file."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import whole
from ..errors import PromptError, RemoteError, SaefeatError
from ..files.hashing import digest
from ..generation.decode import Decode, Greedy, Sample
from ..generation.decoding import decoding
from ..generation.task import Task
from ..results.identity import model_key
from ..shipping.server import Server
from ..text.prompts import split
from ..verbs.base import Intervention, require_rows
from .batch import require_plain, with_stops
from .request import Requests

if TYPE_CHECKING:
    from nnsight import TransformersModel


class Call(NamedTuple):
    """``submit``'s arguments but for the model, the prompts and the intervention."""

    max_new_tokens: int
    decode: Decode
    batch_size: int
    allow_unfired: bool
    on: Server

    def requests(
        self, model: TransformersModel, prompts: dict[str, Tensor], intervention: Intervention
    ) -> Requests:
        """The call's batches, checked but for the preflight.

        Raises:
            RemoteError: for what is no server that a job could be left with, or beams.
        """
        require_server(self.on)
        whole("submit", "batch_size", self.batch_size, error=PromptError)
        require_rows(intervention, len(prompts["input_ids"]))
        with_stops(model)
        settings = decoding(model, self.max_new_tokens, self.decode)
        require_plain(model, settings, self.on.remote)
        task = Task("submit", model, intervention, settings, self.batch_size, self.allow_unfired)
        task.require_lowered()
        return Requests(task, split(prompts, self.batch_size), self.on)

    def fingerprint(
        self, model: TransformersModel, prompts: dict[str, Tensor], intervention: Intervention
    ) -> str:
        """A hash of all that decides the result, and not of where or how it is asked for.

        Raises:
            CheckpointError: for a function that cannot be told from another.
        """
        asked = [self.max_new_tokens, self.decode, self.batch_size, str(self.on.dtype)]
        return digest(prompts, intervention, asked, model_key(model))

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
