"""Passes on a server, for attribution.

A pass brings back the values at watched sites [b, t, d_model] and the logits that the metric reads.
Where gradients are wanted, the metric is differentiated here with respect to those logits, and a
second job runs the same pass again and pulls that slope back to the sites. So the metric never
travels, and any metric will do; a pass with gradients costs two jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import nnsight
import torch
from nnsight.intervention.backends.remote import RemoteError as Refused
from torch import Tensor

from ..errors import GradientError, RemoteError, SaefeatError
from ..kernel.pack import whereabouts
from ..kernel.program import Program, whole_run
from ..kernel.slopes import NO_GRADIENT, pack_pass, pulled_back, unpack_pass
from ..kernel.state import Log
from ..kernel.watch import Keep
from ..shipping.client import Deadline
from ..shipping.narrow import narrowed
from ..shipping.payload import parts_of, require_fits, weight
from ..shipping.program import register, require_known_functions
from ..shipping.server import Server
from .waiting import Waiting, refused

if TYPE_CHECKING:
    from nnsight import TransformersModel


M = TypeVar("M")

_NO_GRADIENT = (
    "Attribute: `on` is a server that lets no gradient cross between the model and the block,"
    " wanted a block that runs beside the model. Likely cause: NDIF runs the blocks of ordinary"
    " keys in a process of their own, and copies values. Try: method=Exact() or FiniteDifference(),"
    " which need forward passes alone, on the few latents that matter; or a key for which blocks"
    " run beside the model"
)


class RemotePass(NamedTuple):
    """A pass to be made on a server; ``columns`` is how many last columns of logits, 0 for all."""

    model: TransformersModel
    program: Program
    inputs: Mapping[str, Tensor]
    lengths: Tensor | None
    columns: int
    options: dict[str, Any]
    on: Server
    deadline: Deadline

    def where(self) -> dict[str, Any]:
        """The arguments that send a trace or a session of traces to the server."""
        if self.on.is_local:
            return {"remote": "local"}
        return {"backend": Waiting(self.model, self.on.remote, self.deadline)}

    def packed(self, program: Program) -> tuple[Program, dict[str, Tensor]]:
        """The program and the inputs as they are sent."""
        register()
        own = narrowed(program, self.on.dtype)
        batch = {n: x.clone() for n, x in self.inputs.items()}  # a view ships what it is a view of
        require_known_functions("Attribute", own, self.model)
        parts = {**parts_of(own), "inputs": weight(list(batch.values()))}
        require_fits("Attribute", parts, sum(parts.values()), self.on.payload_limit)
        return own, batch

    def size(self) -> int:
        """About how many bytes the pass costs a request and its result."""
        rows, tokens = self.inputs["input_ids"].shape
        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", 0)
        logits = rows * (self.columns or tokens) * vocabulary * 4
        return sum(parts_of(self.program).values()) + logits


PASSES = 64
"""The most passes in a request: what a server ends after its own limit is lost whole."""


def requests(passes: Iterable[tuple[M, RemotePass]]) -> Iterator[list[tuple[M, RemotePass]]]:
    """Passes in groups, each small enough for a request and its result."""
    group: list[tuple[M, RemotePass]] = []
    total = 0
    for named in passes:
        size, limit = named[1].size(), named[1].on.payload_limit
        if group and (total + size > limit or len(group) == PASSES):
            yield group
            group, total = [], 0
        group.append(named)
        total += size
    if group:
        yield group


def run_remote(passes: Sequence[RemotePass]) -> tuple[list[tuple[Log, Tensor]], dict[str, str]]:
    """Passes without gradients, in one request: each one's log and logits, and where it ran.

    The block that runs a sandboxed request costs some seconds before its first pass.
    """
    model, made = passes[0].model, None
    asked = [
        (*one.packed(still(one.program)), one.lengths, one.columns, one.options) for one in passes
    ]
    # The log is made before each trace: made in an invoke, the next invoke of a later trace in the
    # session would see that of the trace before (nnsight 0.8.1, tried).
    try:
        with model.session(**passes[0].where()):
            made = nnsight.save([])
            for own, batch, lengths, columns, options in asked:
                seen = Log()
                with model.trace(**options) as tracer:
                    with tracer.invoke(batch):
                        whole_run(model, own, seen, lengths)
                    with tracer.invoke():
                        logits = model.output.logits[:, -columns:].detach().clone()
                        made.append((pack_pass(seen), logits, whereabouts(model, logits)))
    except Refused as error:
        raise refused(error) from error
    right = isinstance(made, list) and all(type(one) is tuple and len(one) == 3 for one in made)
    if not right or len(made) != len(passes):
        raise unfit(f"{made!r:.80} for its passes", f"{len(passes)} of them")
    there: dict[str, str] = {}
    logs = []
    for one, (log, logits, where) in zip(passes, made, strict=True):
        require_pass(one, log, logits)
        there = require_whereabouts(where)
        logs.append((unpack_pass(log), logits))
    return logs, there


def remote_slopes(remote_pass: RemotePass, slopes: dict[str, Tensor]) -> dict[int, Tensor]:
    """The gradient at each of the program's nodes, from the metric's slope at what it reads."""
    model, lengths, columns = remote_pass.model, remote_pass.lengths, remote_pass.columns
    own, batch = remote_pass.packed(remote_pass.program)
    found = None
    try:
        with model.trace(**remote_pass.where(), **remote_pass.options) as tracer:
            log = Log()
            with tracer.invoke(batch):
                whole_run(model, own, log, lengths)
            with tracer.invoke():
                logits = model.output.logits[:, -columns:]
                found = nnsight.save(pulled_back(log, logits, slopes))
    except (Refused, SaefeatError) as error:
        if NO_GRADIENT in str(error):
            raise GradientError(_NO_GRADIENT) from error
        if isinstance(error, Refused):
            raise refused(error) from error
        raise
    require_values(remote_pass, "gradients", found, nodes_of(remote_pass.program))
    return found


def pull(
    remote_pass: RemotePass, leaves: dict[str, Tensor], total: Tensor, *_: Any
) -> dict[int, Tensor]:
    """What computes gradients of a metric's ``total`` on a server; ``leaves`` is what it read."""
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return remote_slopes(remote_pass, dict(zip(leaves, grads, strict=True)))


def leaves_of(log: Log, logits: Tensor) -> dict[str, Tensor]:
    """The logits and the metric's own site, each the beginning of a graph here."""
    metric = {"metric": log.shown["metric"]} if "metric" in log.shown else {}
    return {name: value.requires_grad_() for name, value in ({"logits": logits} | metric).items()}


def require_pass(remote_pass: RemotePass, log: Any, logits: Any) -> None:
    """Refuse a pass that is not the one asked for."""
    rows, tokens = remote_pass.inputs["input_ids"].shape
    wanted = (rows, remote_pass.columns or tokens)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != wanted:
        raise unfit(f"logits {_of(logits)}", f"{[*wanted, 'vocabulary']}")
    if not isinstance(log, dict) or not isinstance(log.get("kept"), dict):
        raise unfit(f"a log {_of(log)}", "the values at the watched sites")
    keeps = [a for a in remote_pass.program.actions if isinstance(a, Keep) and a.copy]
    for group in ("kept", "before"):
        numbers = [keep.number for keep in keeps if keep.before == (group == "before")]
        require_values(remote_pass, "values", log.get(group), numbers)


def require_whereabouts(there: Any) -> dict[str, str]:
    """What a server says of where a pass ran, each text of a limited length."""
    if not isinstance(there, dict) or not {"dtype", "device"} <= set(there):
        raise unfit(f"{there!r:.80} for where it ran", "its dtype, device and versions")
    return {name: f"{text:.200}" for name, text in there.items()}


def require_values(remote_pass: RemotePass, what: str, found: Any, numbers: list[Any]) -> None:
    """Refuse other places or tokens than those asked for."""
    if not isinstance(found, dict) or set(found) != set(numbers):
        got = list(found) if isinstance(found, dict) else _of(found)
        raise unfit(f"{what} of places {got}", f"of {numbers}")
    shape = remote_pass.inputs["input_ids"].shape
    for value in found.values():
        right = isinstance(value, Tensor) and value.ndim >= 2 and value.is_floating_point()
        if not right or value.shape[:-1].numel() != shape.numel():
            raise unfit(f"{what} {_of(value)}", f"{[*shape, 'd']}")


def _of(value: Any) -> str:
    shaped = isinstance(value, Tensor)
    return str(list(value.shape)) if shaped else f"of type {type(value).__name__}"


def unfit(got: str, wanted: str) -> RemoteError:
    """The error for a pass that does not fit its request."""
    return RemoteError(
        f"Attribute: `on` is a server whose result has {got}, wanted {wanted}. Likely cause: a"
        " server of another version, or one that is none. Try: preflight(model, prompts,"
        " on=...), which shows the server's nnsight"
    )


def still(program: Program) -> Program:
    """The program without nodes: values are moved as before, no graph is begun."""
    quiet = {"gradient": False, "first": False, "through": None, "source": None}
    visits = []
    for visit in program.visits:
        actions = [a.replace(**quiet) if isinstance(a, Keep) else a for a in visit.actions]
        visits.append(visit.replace(actions=tuple(actions)))
    return program.replace(visits=tuple(visits))


def nodes_of(program: Program) -> list[int]:
    """The numbers of the places where the program asks for a gradient."""
    return [a.number for a in program.actions if isinstance(a, Keep) and a.gradient]


def require_plain(semantics: str, backward: object) -> None:
    """Refuse what needs the model's modules or whole dictionaries beside the pass."""
    if backward is not None:
        got = f"backward={backward!r}"
        cause = "a backward rule hooks the model's own modules, and no hook travels"
        call = "backward=None and IG(8, 'midpoint'), which mends most of what the rule is for"
    elif semantics != "pass_through":
        got = f"semantics={semantics!r}"
        cause = "whole dictionaries would have to stand in the server's graph"
        call = "semantics='pass_through', whose gradients need none"
    else:
        return
    raise SaefeatError(
        f"Attribute: `on` is given with {got}, wanted pass_through semantics and the plain"
        f" gradient. Likely cause: {cause}. Try: {call}, Exact() on the latents that matter, or a"
        " model here"
    )
