"""How an intervention crosses to a server: as the kernel and a plain program, nothing else.

A block in a remote trace travels as source with the names it reads, so ``intervention(model)`` in
it ships the object itself. Pickled for a request, the object becomes its own program for the model
that is being traced, bound to a kernel function; the kernel's functions travel as source, since no
server has them. The program that an edited copy carries does the same.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import nnsight
from nnsight.intervention.serialization import dumps

from ..errors import RemoteError
from ..kernel.pack import applied
from ..kernel.program import Program
from ..model.modules import torch_module
from ..model.requests import Request, request
from .narrow import narrowed
from .payload import PAYLOAD_LIMIT, leaves, parts_of, require_known, strangers

KERNEL = "saefeat.kernel"


def register() -> None:
    """Let the kernel travel by value: the kernel alone, so that nothing else does by mistake."""
    nnsight.register(KERNEL)


class Carried(Program):
    """A program that an edited copy carries: in a remote request, one that suits a server."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        here, plain = request(), Program(**vars(self))
        program = plain if here is None else shipped(plain, here)
        return partial(Program, **vars(program)), ()


def as_shipped(program: Program, here: Request) -> Any:
    """The program as a function of the model that runs without this package."""
    register()
    return partial(applied, shipped(program, here))


def shipped(program: Program, here: Request) -> Program:
    """The program as it goes into a request of the user's own.

    Raises:
        RemoteError: for what no server can run.
    """
    require_sequential(program, here)
    program = narrowed(program)
    if not program.remembers:  # what does must follow beams, which only the cache tells of
        program = program.replace(embedding=embedding(here.model))
    require_known_functions("intervention(model)", program, here.model)
    parts = parts_of(program)
    if sum(parts.values()) > PAYLOAD_LIMIT:
        largest = max(parts, key=lambda name: parts[name])
        warnings.warn(
            f"saefeat: the intervention brings {sum(parts.values()):,} bytes into this request, of"
            f" which {largest} is {parts[largest]:,}. remote.preflight shows the others; sf.run"
            " takes a dtype and a limit.",
            stacklevel=2,
        )
    return program


def require_known_functions(where: str, program: Program, model: Any) -> None:
    """Refuse functions of a program that use what a server does not have; nothing else can.

    Raises:
        RemoteError: naming the modules.
    """
    if any(callable(leaf) for leaf in leaves(program.visits)):
        require_known(where, strangers(model, dumps(program)))


def require_sequential(program: Program, here: Request) -> None:
    """Refuse ways of generating whose passes a server's block cannot follow.

    Raises:
        RemoteError: for guessed tokens, and for beams where rows must be followed.
    """
    module: Any = torch_module(here.model)
    beams = here.options.get("num_beams")
    if beams is None:
        config = here.options.get("generation_config", getattr(module, "generation_config", None))
        beams = getattr(config, "num_beams", None)
    guesses = ("assistant_model", "prompt_lookup_num_tokens")
    bad = next((name for name in guesses if here.options.get(name) is not None), None)
    if bad is None and not (program.remembers and (beams or 1) > 1):
        return
    parameter = bad or "num_beams"
    got = "given, in a remote generation" + ("" if bad else " with a held condition or role")
    raise RemoteError(
        f"intervention(model): `{parameter}` is {got}, wanted greedy decoding or sampling. Likely"
        " cause: guesses that are taken back, and beams that change places, show in the key-value"
        " cache, and a block on a server has no more than a copy of it. Try: model.generate(...,"
        " remote=...) without it"
    )


def embedding(model: Any) -> str | None:
    """The path of the module that embeds tokens, where later passes' tokens are read."""
    module: Any = torch_module(model)
    wanted = module.get_input_embeddings()
    return next((name for name, part in module.named_modules() if part is wanted), None)
