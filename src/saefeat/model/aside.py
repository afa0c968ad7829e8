"""A model's own forward hooks put aside while saefeat tries it out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def hooks_aside(module: nn.Module) -> Iterator[None]:
    """Every forward hook put aside: a user's would count, record or edit a pass nobody asked for.

    accelerate and tensor parallelism wrap ``forward`` itself, and stay.
    """
    parts = list(module.modules())
    held = [(part._forward_hooks, part._forward_pre_hooks) for part in parts]
    try:
        for part in parts:
            part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for part, (after, before) in zip(parts, held, strict=True):
            part._forward_hooks, part._forward_pre_hooks = after, before
