"""One run of a model at a time: nnsight keeps a run's state on the model, and mixes two threads'.

Tried (0.8.1): of two traces at once one loses its results, or takes the other's, without a word.
Two models in two threads do not disturb one another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import ModelError

_NAME = "_saefeat_run"


class _Mark:
    """Says on a module which thread runs it, for as long as it does; in a copy it says nothing."""

    def __init__(self, thread: int | None = None) -> None:
        self.thread = thread

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        return _Mark()

    def __reduce__(self) -> Any:
        return _Mark, ()


@contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Run a model while no other thread does; runs within a run of one thread are one.

    Raises:
        ModelError: if another thread is running it.
    """
    state, mark = vars(module), _Mark(threading.get_ident())
    held = state.setdefault(_NAME, mark)  # one step, so that of two threads one comes first
    if held.thread is None:  # of the model that this is a copy of
        held = state[_NAME] = mark
    if held.thread != mark.thread:
        raise ModelError(
            "saefeat: `model` is run by two threads at once, wanted one run after the other. Likely"
            " cause: a server, or a pool of threads that share a model; nnsight would mix the two."
            " Try: a lock around the calls, or a model for each thread"
        )
    try:
        yield
    finally:
        if held is mark:
            del state[_NAME]
