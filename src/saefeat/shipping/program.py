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
import torch
from nnsight.intervention.serialization import dumps
from torch import Tensor

from ..errors import RemoteError
from ..kernel.pack import applied
from ..kernel.tokens import looks_back
from ..model.modules import torch_module
from ..model.requests import Request, request
from .payload import PAYLOAD_LIMIT, leaves, parts_of, require_known, strangers
from .upstream import upstream

KERNEL = "saefeat.kernel"


def register() -> None:
    """Let the kernel travel by value: the kernel alone, so that nothing else does by mistake."""
    nnsight.register(KERNEL)


class Program(dict[str, Any]):
    """A program that an edited copy carries: in a remote request, one that suits a server."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        here = request()
        return dict, (dict(self) if here is None else shipped(dict(self), here),)


def as_shipped(program: dict[str, Any], here: Request) -> Any:
    """The program as a function of the model that runs without this package."""
    register()
    return partial(applied, shipped(program, here))


def shipped(program: dict[str, Any], here: Request) -> dict[str, Any]:
    """The program as it goes into a request of the user's own.

    Raises:
        RemoteError: for what no server can run.
    """
    require_sequential(program, here)
    program = narrowed(program)
    if not looks_back(program):  # what does must follow beams, which only the cache tells of
        program["embedding"] = embedding(here.model)
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


def require_known_functions(where: str, program: dict[str, Any], model: Any) -> None:
    """Refuse functions of a program that use what a server does not have; nothing else can.

    Raises:
        RemoteError: naming the modules.
    """
    if any(callable(leaf) for leaf in leaves(program["visits"])):
        require_known(where, strangers(model, dumps(program)))


def require_sequential(program: dict[str, Any], here: Request) -> None:
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
    if bad is None and not (looks_back(program) and (beams or 1) > 1):
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


def narrowed(program: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The program with its matrices in the dtype asked for, or the narrowest that holds them.

    The kernel computes in float32 all the same. Vectors, thresholds and values stay as they are:
    they are small, and a rounded threshold switches latents.

    Raises:
        RemoteError: for a dictionary that cannot be sent, or a dtype that cannot hold one.
    """
    require_floating(dtype)
    visits = [
        {**visit, "actions": [_lean(action, dtype) for action in visit["actions"]]}
        for visit in upstream(program["visits"])
    ]
    return {**program, "visits": visits}


def _lean(action: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """An action with narrow matrices, without what an earlier run cached on it."""
    action = {name: value for name, value in action.items() if name != "placed"}
    if "tensors" in action:
        require_sendable(action["tensors"])
        action["tensors"] = {
            name: narrow(value, dtype) if name in MATRICES else value
            for name, value in action["tensors"].items()
        }
    return action


MATRICES = ("encoder", "directions", "decoder")


def narrow(value: Any, dtype: torch.dtype | None) -> Any:
    """A tensor in ``dtype``, or in bfloat16 or float16 where that loses nothing."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if dtype is not None:
        return _held(value, dtype)
    for half in (torch.bfloat16, torch.float16):
        if torch.equal(value.to(half).to(value.dtype), value):
            return value.to(half)
    return value


def _held(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype, unless that makes a number infinite."""
    found = value.to(dtype)
    if bool((found.float().isfinite() | ~value.isfinite()).all()):
        return found
    raise RemoteError(
        f"run: `dtype` is {dtype}, for a matrix with numbers up to {float(value.abs().max()):.3g},"
        f" wanted a dtype that reaches further than {torch.finfo(dtype).max:.3g}. Likely cause:"
        " float16 and narrower have a small range. Try: dtype=torch.bfloat16, or none, which rounds"
        " nothing"
    )


def require_floating(dtype: Any) -> None:
    """Refuse a dtype that would cut off fractions.

    Raises:
        RemoteError: naming it.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise RemoteError(
        f"run: `dtype` is {dtype!r}, wanted a floating dtype, or None. Likely cause: a dtype by its"
        " name, or one of integers. Try: dtype=torch.bfloat16"
    )


def require_sendable(tensors: dict[str, Any]) -> None:
    """Refuse a dictionary that is encoded by an object that stays here.

    Raises:
        RemoteError: saying which.
    """
    if tensors.get("local"):
        raise RemoteError(
            f"run: `remote` is given, and {tensors['local']}, wanted dictionaries made of tensors,"
            " or of plain torch functions. Likely cause: a matching pursuit or temporal SAE, which"
            " needs its own code. Try: run(...) without remote, or an SAE of another architecture"
        )
