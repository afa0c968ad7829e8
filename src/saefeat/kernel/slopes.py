"""What attribution asks of a pass on a server: watched values, and gradients taken where they are.

A metric never travels. Its slope at the logits is worked out at home, on logits that came back, and
sent: from there the chain rule needs the server's graph alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NO_GRADIENT = "saefeat: no gradient crosses to this block"


def seen(log: dict[str, Any]) -> dict[str, Any]:
    """The log of one pass without graph: watched values, and the view of the sequence."""
    view = log["view"]
    kept = {name: view[name] for name in ("ids", "position", "real", "lengths", "whole")}
    memory = {"ids": view["memory"]["ids"]} if "ids" in view["memory"] else {}
    shown = {name: value.detach().clone() for name, value in log["shown"].items()}
    log |= {"view": {**kept, "selected": {}, "memory": memory}, "shown": shown, "nodes": {}}
    return log


def pulled_back(
    log: dict[str, Any], logits: Tensor, slopes: dict[str, Tensor]
) -> dict[int, Tensor]:
    """The metric's gradient at each node, from its slopes at the logits and at its own site."""
    outputs = {"logits": logits, **log["shown"]}
    ends = [outputs[name] for name in slopes]
    if not all(end.requires_grad for end in ends):
        raise RuntimeError(NO_GRADIENT)
    order = sorted(log["nodes"])
    there = [s.to(e.device, e.dtype) for s, e in zip(slopes.values(), ends, strict=True)]
    nodes = [log["nodes"][number] for number in order]
    found = torch.autograd.grad(ends, nodes, there, materialize_grads=True)
    return dict(zip(order, found, strict=True))
