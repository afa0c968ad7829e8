"""Passes on a server, for attribution.

A pass brings back the values at watched sites [b, t, d_model] and the logits that the metric reads.
Where gradients are wanted, the metric is differentiated here with respect to those logits, and a
second job runs the same pass again and pulls that slope back to the sites. So the metric never
travels, and any metric will do; a pass with gradients costs two jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import nnsight
import torch
from nnsight.intervention.backends.remote import RemoteError as Refused
from torch import Tensor

from ..errors import GradientError, SaefeatError, explain
from ..kernel.program import new_log
from ..kernel.slopes import NO_GRADIENT, pulled_back, seen
from ..kernel.trace import whole_run
from ..verbs.travel import narrowed, register


class Errand(NamedTuple):
    """A pass to be made on a server; ``columns`` is how many last columns of logits, 0 for all."""

    model: Any
    remote: bool | str
    program: dict[str, Any]
    inputs: Mapping[str, Tensor]
    lengths: Tensor | None
    columns: int
    options: dict[str, Any]


def run_afar(errand: Errand) -> tuple[dict[str, Any], Tensor]:
    """One pass without gradients: its log, and the logits."""
    register()
    model, remote, program, inputs, lengths, columns, options = errand
    own, batch = narrowed(still(program)), own_storage(inputs)
    log = logits = None
    with model.trace(remote=remote, **options) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save(new_log())
            whole_run(model, own, log, lengths)
            seen(log)
        with tracer.invoke():
            logits = nnsight.save(model.output.logits[:, -columns:].detach().clone())
    assert log is not None and logits is not None
    return log, logits


def slopes_afar(errand: Errand, slopes: dict[str, Tensor]) -> dict[int, Tensor]:
    """The gradient at each of the program's nodes, from the metric's slope at what it reads.

    Raises:
        GradientError: where the server lets no gradient cross to the block.
    """
    model, remote, program, inputs, lengths, columns, options = errand
    own, batch = narrowed(program), own_storage(inputs)
    found = None
    try:
        with model.trace(remote=remote, **options) as tracer:
            log = new_log()
            with tracer.invoke(batch):
                whole_run(model, own, log, lengths)
            with tracer.invoke():
                logits = model.output.logits[:, -columns:]
                found = nnsight.save(pulled_back(log, logits, slopes))
    except (Refused, RuntimeError) as error:
        if NO_GRADIENT in str(error):
            raise GradientError(no_gradient()) from error
        raise
    assert found is not None
    return found


def pull(errand: Errand, leaves: dict[str, Tensor], total: Tensor, *_: Any) -> dict[int, Tensor]:
    """What computes gradients of a metric's ``total`` on a server; ``leaves`` is what it read."""
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return slopes_afar(errand, dict(zip(leaves, grads, strict=True)))


def leaves_of(log: dict[str, Any], logits: Tensor) -> dict[str, Tensor]:
    """The logits and the metric's own site, each the beginning of a graph here."""
    metric = {name: value for name, value in log["shown"].items() if name == "metric"}
    return {name: value.requires_grad_() for name, value in ({"logits": logits} | metric).items()}


def still(program: dict[str, Any]) -> dict[str, Any]:
    """The program without nodes: values are moved as before, no graph is begun."""
    visits = [
        {**visit, "actions": [quiet(action) for action in visit["actions"]]}
        for visit in program["visits"]
    ]
    return {**program, "visits": visits}


def nodes_of(program: dict[str, Any]) -> list[int]:
    """The numbers of the places where the program asks for a gradient."""
    actions = [action for visit in program["visits"] for action in visit["actions"]]
    return [action["id"] for action in actions if action.get("gradient")]


def quiet(action: dict[str, Any]) -> dict[str, Any]:
    """A keep action without gradient; others as they are."""
    off = {"gradient": False, "first": False, "through": None, "source": None}
    return {**action, **off} if action["do"] == "keep" else action


def own_storage(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clones: a view would ship what it is a view of."""
    return {name: tensor.clone() for name, tensor in inputs.items()}


def require_plain(semantics: str, backward: object) -> None:
    """Refuse what needs the model's modules or whole dictionaries beside the pass.

    Raises:
        SaefeatError: for ``through_sae`` or a backward rule.
    """
    if semantics == "pass_through" and backward is None:
        return
    raise SaefeatError(
        explain(
            "Attribute",
            "remote",
            got=f"given with {'backward=' + repr(backward) if backward else repr(semantics)}",
            wanted="pass_through semantics and the plain gradient",
            cause="a rule hooks the model's modules, and through_sae needs whole dictionaries:"
            " neither is there",
            call="Attribute(..., semantics='pass_through'), or run it on a model here",
        )
    )


def no_gradient() -> str:
    """What to do where gradients do not exist."""
    return explain(
        "Attribute",
        "remote",
        got="a server that lets no gradient cross between the model and the block",
        wanted="a block that runs beside the model",
        cause="NDIF runs the blocks of ordinary keys in a process of their own, and copies values",
        call="method=Exact() or FiniteDifference(), which need forward passes alone, on the few"
        " latents that matter; or a key for which blocks run beside the model",
    )
