"""How an intervention crosses to a server: as the kernel and a plain program, nothing else.

Pickled for a request, an intervention that is bound to a model becomes its program for that model,
together with the kernel function that applies it; the kernel's functions travel as source, since no
server has them. What an edited copy carries does the same.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import nnsight
from nnsight.intervention.serialization import dumps

from ..kernel.pack import applied
from ..kernel.program import Program, whole_run
from ..model.modules import torch_module
from ..model.requests import in_requests
from ..model.wrappers import require_unwrapped, root
from .narrow import narrowed
from .payload import PAYLOAD_LIMIT, leaves, parts_of, require_known, strangers

if TYPE_CHECKING:
    from nnsight import TransformersModel

KERNEL = "saefeat.kernel"


def register() -> None:
    """Let the kernel travel by value: the kernel alone, so that nothing else does by mistake."""
    nnsight.register(KERNEL)


@dataclass(frozen=True)
class Carried:
    """What an edited copy of a model applies to every pass of every run."""

    program: Program
    model: TransformersModel

    def __call__(self, copy: Any) -> None:
        whole_run(root(copy), self.program, None)


def _carried(edit: Carried) -> Any:
    """The same in a request: the kernel, and a program that suits a server."""
    register()
    return partial(whole_run, program=shipped(edit.program, edit.model), log=None).__reduce__()


in_requests(Carried, _carried)


def as_shipped(program: Program, model: TransformersModel) -> Any:
    """The program as a function of the model that runs without this package."""
    register()
    repository = getattr(model, "repo_id", None)
    return partial(applied, shipped(program, model), repository=repository)


def shipped(program: Program, model: TransformersModel) -> Program:
    """The program as it goes into a request of the user's own.

    Raises:
        RemoteError: for what no server can run.
    """
    require_unwrapped("intervention(model)", model)
    program = narrowed(program)
    if program.beams is None:  # what does must follow beams, which only the cache tells of
        program = program.replace(embedding=embedding(model))
    require_known_functions("intervention(model)", program, model)
    parts = parts_of(program)
    if sum(parts.values()) > PAYLOAD_LIMIT:
        largest = max(parts, key=lambda name: parts[name])
        warnings.warn(
            f"saefeat: the intervention brings {sum(parts.values()):,} bytes into this request, of"
            f" which {largest} is {parts[largest]:,}. sf.remote.preflight shows the others; sf.run"
            " with on=Server(dtype=..., payload_limit=...) narrows and limits them.",
            stacklevel=2,
        )
    return program


def require_known_functions(function: str, program: Program, model: TransformersModel) -> None:
    """Refuse functions of a program that use what a server does not have; nothing else can.

    Raises:
        RemoteError: naming the modules.
    """
    if any(callable(leaf) for leaf in leaves(program.visits)):
        require_known(function, strangers(model, dumps(program)))


def embedding(model: TransformersModel) -> str | None:
    """The path of the module that embeds tokens, where later passes' tokens are read."""
    module: Any = torch_module(model)
    wanted = module.get_input_embeddings()
    return next((name for name, part in module.named_modules() if part is wanted), None)
