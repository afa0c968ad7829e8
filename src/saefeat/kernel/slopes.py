"""What attribution asks of a pass on a server: watched values, and gradients taken where they are.

A metric never travels. Its slope at the logits is worked out at home, on logits that came back, and
sent: from there the chain rule needs the server's graph alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import SaefeatError
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
    """The metric's gradient at each node, from its slopes at the logits and at its own site.

    A node without one must at least reach the logits: then the metric does not depend on it. One
    that reaches neither was cut off. No flag tells: a block in a process of its own is given copies
    that require a gradient and have no graph (ndif 0.1.2, tried), whose slopes would all be zero.
    """
    outputs = {"logits": logits, **log.shown}
    ends = [outputs[name] for name in slopes]
    order = sorted(log.nodes)
    nodes = [log.nodes[number] for number in order]
    there = [s.to(e.device, e.dtype) for s, e in zip(slopes.values(), ends, strict=True)]
    found = pulled(ends, nodes, there)
    if any(slope is None for slope in found):
        reached = pulled([logits], nodes, [torch.ones_like(logits)])
        if any(a is None and b is None for a, b in zip(found, reached, strict=True)):
            raise SaefeatError(NO_GRADIENT)
    full = [torch.zeros_like(x) if g is None else g for g, x in zip(found, nodes, strict=True)]
    return dict(zip(order, full, strict=True))


def pulled(ends: list[Tensor], nodes: list[Tensor], there: list[Tensor]) -> tuple[Any, ...]:
    """Slopes at nodes, from those at ends; None where the graph does not lead."""
    with_graph = [(end, slope) for end, slope in zip(ends, there, strict=True) if end.requires_grad]
    if not with_graph:
        return (None,) * len(nodes)
    ends, there = map(list, zip(*with_graph, strict=True))
    return torch.autograd.grad(ends, nodes, there, retain_graph=True, allow_unused=True)
