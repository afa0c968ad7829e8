"""What attribution asks of a pass on a server: watched values, and gradients taken where they are.

A metric never travels. Its slope at the logits is worked out at home, on logits that came back, and
sent: from there the chain rule needs the server's graph alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .pack import pack, unpack
from .state import Log, Memory, View

NO_GRADIENT = "saefeat: no gradient crosses to this block"


def pack_pass(log: Log) -> dict[str, Any]:
    """The log of one pass as plain data: with watched values and the view, all without graph."""
    view = log.view
    names = ("ids", "position", "shown", "real", "lengths", "whole", "begins")
    seen = {name: getattr(view, name) for name in names} | {"text": view.memory.ids}
    shown = {name: value.detach().clone() for name, value in log.shown.items()}
    return pack(log) | {"view": seen, "shown": shown, "kept": log.kept, "before": log.before}


def unpack_pass(packed: dict[str, Any]) -> Log:
    """The log of one pass, as its actions wrote it there, without graph."""
    log, view = unpack(packed), dict(packed["view"])
    memory = Memory(view["lengths"])
    memory.ids = view.pop("text")
    log.view = View(**view, memory=memory, selected={})
    log.kept, log.before, log.shown = packed["kept"], packed["before"], packed["shown"]
    return log


def pulled_back(log: Log, logits: Tensor, slopes: dict[str, Tensor]) -> dict[int, Tensor]:
    """The metric's gradient at each node, from its slopes at the logits and at its own site."""
    outputs = {"logits": logits, **log.shown}
    ends = [outputs[name] for name in slopes]
    if not all(end.requires_grad for end in ends):
        raise RuntimeError(NO_GRADIENT)
    order = sorted(log.nodes)
    there = [s.to(e.device, e.dtype) for s, e in zip(slopes.values(), ends, strict=True)]
    nodes = [log.nodes[number] for number in order]
    found = torch.autograd.grad(ends, nodes, there, materialize_grads=True)
    return dict(zip(order, found, strict=True))
