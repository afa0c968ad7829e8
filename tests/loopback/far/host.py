"""The model's side of a job whose block runs in a process of its own; see ``guest``.

A ``Proxy`` stands in the model's interleaver for one block. It is an nnsight mediator, so matching
places and steps, and cutting batches into rows, is nnsight's own code; what it switches to is not
a greenlet but the other process.
"""

from __future__ import annotations

import subprocess
from typing import Any

from nnsight.intervention.interleaver import (
    EarlyStopException,
    Mediator,
    OutOfOrderError,
    Pending,
)
from nnsight.intervention.serialization import dumps

from .pipe import Gone, Pipe
from .start import command


class Raised(Exception):
    """The block raised; its own process knows what."""


class Died(Exception):
    """The block's process ended in mid-job."""


class Host:
    """The process for blocks, and the requests it makes of the model here."""

    def __init__(self, folder: str) -> None:
        process = subprocess.Popen(command("guest"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None and process.stdout is not None
        self._process = process  # which, forgotten, would warn that it still runs
        self._line = Pipe(process.stdout.fileno(), process.stdin.fileno())
        self._line.send(folder)
        self._model: Any = None
        self._parks = self._trips = 0

    def wait(self) -> None:
        """Until the process can take jobs."""
        self._line.receive()

    def run(self, model: Any, blob: bytes, job: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """One request: the reply's head, with what crossed, and the result."""
        self._line.send("job", blob, job)
        self._model, self._parks, self._trips = model, 0, 0
        self._line.sent = self._line.received = 0
        result = error = None
        while result is error is None:
            try:
                result, error = self._answer(*self._line.receive())
            except Died as died:
                error = str(died)
        line = self._line
        crossed = [self._parks, self._trips, line.sent, line.received - len(result or b"")]
        head = {"ok": result is not None, "error": error or "", "crossed": crossed}
        return head, result or b""

    def _answer(self, kind: str, *rest: Any) -> tuple[bytes | None, str | None]:
        """Do what the other process asks for; the job's result, or its error, at the end."""
        if kind == "saved":
            return rest[0], None
        if kind == "failed":
            return None, rest[0]
        if kind == "died":
            raise Died(f"The block's process died (exit code {rest[0]}).")
        if kind == "run":
            self._forward(*rest)
        else:
            self._line.send("answer", *self._looked_up(kind, *rest))
        return None, None

    def _looked_up(self, kind: str, path: str, *rest: Any) -> tuple[Exception | None, Any]:
        """A module called on the side, or opened up for its ``source``: an error, or the result."""
        try:
            envoy = self._envoy(path)
            if kind == "source":
                return (None, bool(envoy.source))
            args, kwargs, hook = rest
            if hook:
                raise NotImplementedError("hook=True where the block runs in another process")
            return None, envoy(*args, **kwargs)
        except Exception as error:
            return portable(error), None

    def _envoy(self, path: str) -> Any:
        return next(envoy for envoy in self._model.modules() if envoy.path == path)

    def _forward(self, path: str, name: str, method: bool, args: Any, kwargs: Any, *rest: Any):
        """Run the model with proxies for the other process's blocks."""
        inputs, groups = rest
        envoy = self._envoy(path)
        proxies: list[Proxy] = []
        proxies += [Proxy(self, proxies, number, group) for number, group in enumerate(groups)]
        envoy.interleaver.mediators = list(proxies)
        try:
            batcher = inputs and rebuilt(envoy, *inputs)
            fn = getattr(envoy, name) if method else name
            result = envoy.interleave(fn, *args, batcher=batcher, **kwargs)
            self._line.send("done", None if batcher is not None else result)
        except (Gone, Died):
            raise
        except Exception as error:
            self._line.send("failed", portable(error))

    def move(self, kind: str, proxy: Proxy, *rest: Any) -> None:
        """Let a block run until it parks again, and note where each one is parked then.

        Raises:
            EarlyStopException: if the block stopped the run.
            Raised: if it failed.
            Died: if its process did.
        """
        self._trips += 1
        self._line.send(kind, proxy.number, *rest)
        while True:
            answer, *found = self._line.receive()
            if answer == "parked":
                break
            if answer == "raised":
                proxy.pending = None
                raise EarlyStopException() if found[0] == "stop" else Raised(found[0])
            try:
                self._answer(answer, *found)
            except Died:
                for other in proxy.all:
                    other.pending = None  # nobody is left to be told that the run is over
                raise
        self._parks += found[0]
        for number, (pending, iteration) in found[1].items():
            proxy.all[number].adopt(pending, iteration)
        if kind == "start":
            proxy.caches = [Watch(self, proxy, n, places) for n, places in enumerate(found[2])]

    def show(self, *seen: Any) -> None:
        """Send a cache of the block's what it keeps."""
        self._line.send("seen", *seen)


class Proxy(Mediator):
    """One block, as the model's interleaver sees it."""

    def __init__(self, host: Host, everyone: list[Proxy], number: int, group: Any) -> None:
        Mediator.__init__(self, None, {}, {})
        self.host, self.all, self.number, self.batch_group = host, everyone, number, group

    @property
    def alive(self) -> bool:
        """Whether the block waits for something."""
        return self.pending is not None

    def start(self, interleaver: Any = None) -> None:
        """Run the block to its first park."""
        self.interleaver, self.iteration = interleaver, 0
        self.counts_at_start = dict(interleaver.counts)
        self.worker: Any = self  # what nnsight throws into
        self.host.move("start", self)

    def switch(self, *args: Any) -> Any:
        """Resume the block with what it waited for; where it parks next."""
        self.pending = None
        self.host.move("resume", self, self.iteration, args)
        return self.pending

    def throw(self, error: Any) -> None:
        """Raise in the block: the run is over, with or without it."""
        try:
            if isinstance(error, OutOfOrderError):
                self.host.move("late", self, str(error))
            else:
                self.host.move("exit", self)
        except Raised as raised:
            raise error if raised.args == ("late",) else raised from None

    def adopt(self, pending: Any, iteration: int | None) -> None:
        """Take over where the block is parked; a request with no step is for the next one here."""
        self.iteration = iteration
        self.pending = None if pending is None else Pending(*pending)
        if self.pending is not None and self.pending.iteration is None and self.pending.provider:
            step = self.occurrence(self.pending.provider)
            self.pending = self.pending._replace(iteration=step)


class Watch:
    """A cache of the block's: told here what to keep, kept there."""

    def __init__(self, host: Host, proxy: Proxy, number: int, places: dict[str, Any]) -> None:
        self.host, self.proxy, self.number, self.places = host, proxy, number, places

    def subscriptions(self) -> dict[str, Any]:
        """Location → what of it to keep, and under which path."""
        return self.places

    def observe_selected(self, selected: Any, value: Any) -> None:
        """Pass on a value that the model has just reached."""
        self.host.show(self.proxy.number, self.number, selected, value)


def rebuilt(envoy: Any, invokes: list[Any], extra: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """The inputs of a trace's invokes, for the model's own batching."""
    batcher = envoy._batcher_class(envoy, kwargs)
    for inputs, named in invokes:
        batcher.add(*inputs, **named)
    batcher.extra_kwargs = extra
    return batcher


def portable(error: Exception) -> Exception:
    """An error that another process can raise."""
    try:
        dumps(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
