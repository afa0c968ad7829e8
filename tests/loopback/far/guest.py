"""The block's side of a job whose block runs in a process of its own.

The process has a skeleton of the model. Where a block would run the model, it asks the other
process to, and its greenlets park over the pipe: nnsight's mediators are cut where they hand
control to the model (``Mediator.event``), and ``host`` holds the other half.

Two things follow from the cut, as they do on a server:

* What a block reads is a copy. It is sent back when the block moves on, whether it was changed
  or not, so that ``output[:] = 0`` works; every read is also a write.
* How often the model has passed a place is known on the model's side alone, so a request leaves
  here with the step it is pinned to, or with none.

Each job runs in a fork of a process that has imported everything and run nothing.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from .start import Blocker, end_with, replies


def main() -> None:
    """Build the skeleton, then run each job in a child of its own, until the input closes."""
    sys.meta_path.insert(0, Blocker())
    sink = replies()
    from .pipe import Gone, Pipe

    line = Pipe(0, sink)
    (folder,) = line.receive()
    from .job import skeleton

    model = skeleton(folder)
    cut_in_two(Guest(line))
    line.send("ready")
    while True:
        try:
            _, blob, job = line.receive()
        except Gone:
            return
        child = os.fork()
        if child == 0:
            answer(line, model, blob, job)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            line.send("died", code)


def answer(line: Any, model: Any, blob: bytes, job: dict[str, Any]) -> None:
    """Run one job, and say how it ended."""
    from .job import run

    end_with(0)
    try:
        line.send("saved", run(model, blob, job))
    except Exception:
        line.send("failed", traceback.format_exc())


def cut_in_two(guest: Guest) -> None:
    """Let everything in this process that reaches for the model ask for it."""
    from nnsight.intervention.envoy import Envoy
    from nnsight.intervention.interleaver import Mediator

    call, source = Envoy.__call__, Envoy.source.fget

    def called(envoy: Any, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        if guest.has(envoy):  # a module of the block's own
            return call(envoy, *args, hook=hook, **kwargs)
        return guest.ask("call", envoy.path, args, kwargs, hook)

    def sourced(envoy: Any) -> Any:
        guest.ask("source", envoy.path)
        return source(envoy)  # type: ignore[misc]

    def interleave(envoy: Any, fn: Any, *args: Any, batcher: Any = None, **kwargs: Any) -> Any:
        return guest.interleave(envoy, fn, args, batcher, kwargs)

    Envoy.interleave = interleave  # type: ignore[method-assign]
    Envoy.__call__ = called  # type: ignore[method-assign]
    Envoy.source = property(sourced)  # type: ignore[method-assign, assignment]
    flush = Mediator.flush
    Mediator.event = staticmethod(guest.event)  # type: ignore[method-assign, assignment]
    Mediator.wanted = lambda self, _: self.iteration  # type: ignore[method-assign]
    Mediator.flush = lambda self: (give_back(self), flush(self))[1]  # type: ignore[method-assign]


def give_back(mediator: Any) -> None:
    """Put what the block read last, and may have changed in place, back where it was."""
    from nnsight.intervention.interleaver import Event, Pending

    handed, mediator.handed = getattr(mediator, "handed", None), None
    if handed is not None:
        location, value = handed
        switch(Pending(Event.SWAP, location, None, value))


def switch(pending: Any) -> Any:
    """Leave the block until what it waits for is here."""
    from greenlet import getcurrent

    parent: Any = getcurrent().parent
    return parent.switch(pending)


class Guest:
    """Runs of the model that this process asked for, and its blocks in them."""

    def __init__(self, line: Any) -> None:
        self.line = line
        self.failed: BaseException | None = None
        self.parks = 0

    def event(self, kind: Any, location: str, *rest: Any) -> Any:
        """Park the running block until the model reaches a location."""
        from nnsight.intervention.interleaver import Event, Mediator, Pending

        mediator = Mediator.current(location)
        step = mediator.iteration
        mediator.flush()
        value = switch(Pending(kind, location, step, *rest))
        self.parks += 1
        if kind is Event.VALUE:
            mediator.handed = (location, value)  # type: ignore[attr-defined]
        return value

    def has(self, envoy: Any) -> bool:
        """Whether a module is here in the flesh, not as a skeleton."""
        return not any(tensor.is_meta for tensor in envoy._module.state_dict().values())

    def ask(self, *question: Any) -> Any:
        """Something of the model's that takes no turn of the run."""
        self.line.send(*question)
        _, error, found = self.line.receive()
        if error is not None:
            raise error
        return found

    def interleave(self, envoy: Any, fn: Any, args: Any, batcher: Any, kwargs: Any) -> Any:
        """Have the model run with this process's blocks in it; what ``Envoy.interleave`` does."""
        interleaver = envoy.interleaver
        interleaver.mediators = mediators = envoy._edits + interleaver.mediators
        inputs = None
        if batcher is not None:
            inputs = (batcher.invokes, batcher.extra_kwargs, batcher.kwargs)
        name = fn if isinstance(fn, str) else fn.__name__
        method = not isinstance(fn, str)
        groups = [mediator.batch_group for mediator in mediators]
        self.failed, interleaver.interleaving = None, True
        self.line.send("run", envoy.path, name, method, args, kwargs, inputs, groups)
        try:
            return self.until_done(interleaver, mediators)
        finally:
            interleaver.interleaving = False
            interleaver.cancel()

    def until_done(self, interleaver: Any, mediators: list[Any]) -> Any:
        """Do what the model's side asks of the blocks, until the run is over."""
        told: dict[int, Any] = {}
        while True:
            kind, *rest = self.line.receive()
            if kind == "done":
                return rest[0]
            if kind == "failed":
                raise self.failed or rest[0]
            if kind == "seen":
                number, place, selected, value = rest
                mediators[number].caches[place].observe_selected(selected, value)
                continue
            number, *rest = rest
            error = self.move(kind, interleaver, mediators[number], *rest)
            if error is not None:
                self.line.send("raised", error)
                continue
            caches = mediators[number].caches if kind == "start" else ()
            places = [cache.subscriptions() for cache in caches]
            parks, self.parks = self.parks, 0
            self.line.send("parked", parks, news(mediators, told), places)

    def move(self, kind: str, interleaver: Any, mediator: Any, *rest: Any) -> str | None:
        """Let one block run until it parks again; how it failed, if it did."""
        from greenlet import GreenletExit
        from nnsight.intervention.interleaver import EarlyStopException, OutOfOrderError

        late = OutOfOrderError(rest[0]) if kind == "late" else None
        try:
            if kind == "start":
                mediator.start(interleaver)
            elif kind == "resume":
                mediator.iteration, args = rest
                mediator.pending = mediator.switch(*args)
            elif kind == "late":
                mediator.worker.throw(late)
            else:
                mediator.worker.throw(GreenletExit)
        except BaseException as error:
            mediator.pending, self.failed = None, error
            if isinstance(error, EarlyStopException):
                return "stop"
            return "late" if error is late else "error"
        return None


def news(mediators: list[Any], told: dict[int, Any]) -> dict[int, Any]:
    """Where blocks are parked that were elsewhere before: a barrier moves several at once."""
    found = {}
    for number, mediator in enumerate(mediators):
        pending = mediator.pending if mediator.alive else None
        if number not in told or told[number] is not pending:
            found[number] = (pending and tuple(pending), mediator.iteration)
        told[number] = pending
    return found
