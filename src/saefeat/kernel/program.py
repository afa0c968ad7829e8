"""What is done to a model in one forward pass: visits to places, and the actions of each.

An edit is one ``Read``, where its latents are encoded, and one ``Write``, where the change is
added: at the same visit for an SAE, at a later one for a transcoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from .beams import Beams
from .frozen import Frozen, Placed
from .log import State
from .view import Ends, Memory

if TYPE_CHECKING:
    from jaxtyping import Float


@runtime_checkable
class Action(Protocol):
    """One thing that is done with the value of a place."""

    def apply(self, x: Tensor, state: State) -> Tensor:
        """The value [b, t, d] to leave behind: x itself if nothing is written."""
        ...


class Visit(Frozen):
    """What is done with the output of a module."""

    path: str  # the module
    order: tuple[int, int, int, str]  # sorts visits as a forward pass reaches them
    actions: tuple[Action, ...]
    end: ClassVar[str] = "output"

    def arrive(self, envoy: Any, cache: Any, memory: Memory, first: bool) -> Any:
        """What the module gives: a tensor, or a tuple that begins with it."""
        return envoy.output

    def leave(self, envoy: Any, value: Any) -> None:
        """Put another value in its place."""
        envoy.output = value


class InputVisit(Visit):
    """What is done with the first thing that a module is given."""

    end: ClassVar[str] = "input"

    def arrive(self, envoy: Any, cache: Any, memory: Memory, first: bool) -> Any:
        """What the module is given first; ``cache`` is what the model was given."""
        # Beside it may stand the key-value cache. It is another object than the model's own where
        # the block runs in a process of its own; then this module fills a copy of it.
        args, kwargs = envoy.inputs
        own = kwargs.get("past_key_values")
        copied = own is not None and type(own) is type(cache) and own is not cache
        if memory.copied or (copied and not first):
            raise RuntimeError(
                f"saefeat: the input of {envoy.path} is read in a generation, on a server that runs"
                " blocks apart from the model and gives them copies. The module goes on with a copy"
                " of the key-value cache, so later tokens would not see this one. Likely cause: an"
                " ordinary key, and a site such as resid_pre.0 or a path that ends in .input. Try:"
                " one forward pass, without new tokens; another site; or a trusted key."
            )
        memory.copied = memory.copied or copied  # harmless if no pass follows
        return args[0] if args else next(iter(kwargs.values()))

    def leave(self, envoy: Any, value: Any) -> None:
        """Put another value in its place."""
        envoy.input = value


def visit_at(
    path: str, end: str, order: tuple[int, int, int, str], actions: tuple[Action, ...]
) -> Visit:
    """The visit of a module's input or output."""
    kind = InputVisit if end == "input" else Visit
    return kind(path=path, order=order, actions=actions)


class Program(Frozen):
    """An intervention, lowered for one model."""

    visits: tuple[Visit, ...]  # in the order a forward pass reaches them
    ends: Ends | None  # how the model ends a row
    beams: Beams | None  # given if an action looks back over its row
    placed: Placed  # the actions' tensors where runs have needed them
    embedding: str | None = None  # the module that embeds tokens, if later passes are read there

    @property
    def actions(self) -> tuple[Action, ...]:
        """Those of all visits."""
        return tuple(action for visit in self.visits for action in visit.actions)


def visit(
    actions: tuple[Action, ...], x: Float[Tensor, "*batch d"], state: State
) -> Float[Tensor, "*batch d"]:
    """Apply a visit's actions to the value x of its place; return the value to leave behind."""
    # Under autocast, as some servers run blocks, a product of float32 would be one of bfloat16:
    # other latents would fire. Not every device knows of it; the meta device does not.
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return visit(actions, x, state)
    new = before = by_token(x, *state.view.real.shape)
    for action in actions:
        new = action.apply(new, state)
    return x if new is before else new.reshape(x.shape)  # x itself need not be written back


def by_token(x: Float[Tensor, "*batch d"], rows: int, tokens: int) -> Float[Tensor, "b t d"]:
    """The value with a row for each sequence: some modules are given all tokens in one row."""
    if x.ndim == 3 and tuple(x.shape[:2]) == (rows, tokens):
        return x
    if x.ndim == 2 and x.shape[0] == rows * tokens:
        return x.reshape(rows, tokens, -1)
    raise ValueError(  # fewer tokens than the pass has would broadcast against their mask
        f"saefeat: a site's value is of shape {tuple(x.shape)}, and this pass has {rows} rows of"
        f" {tokens} tokens. Likely cause: a module that sees only part of them, as the unembedding"
        " does in generate, or that is given all invokes' tokens in one row. Try: the input or"
        " output of another module, or one invoke."
    )
