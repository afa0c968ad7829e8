"""What is done to a model in a forward pass, and the loop that does it inside an nnsight block.

A program is a list of visits to places, each with its actions. An edit is one ``Read``, where its
latents are encoded, and one ``Write``, where the change is added: at the same visit for an SAE, at
a later one for a transcoder.

nnsight facts these few lines rest on (0.8.1, each tried before it was used):

* One worker must ask for locations in the order the model reaches them, so visits are sorted
  and the model's own inputs (the attention mask) are read before any layer.
* Without ``Iterations`` a block acts on the first forward pass of a generation only. The loop
  over all passes ends in an ``OutOfOrderError`` thrown where it waits for a pass that never
  comes; swallowing it here lets the rest of the block run. ``tracer.iter`` cannot be pickled
  inside an edit, ``Iterations()`` can.
* Decoder layers return plain tensors, attention modules return tuples: ``output[0]`` of a
  tensor is batch row 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from torch import Tensor

from .beams import Beams
from .errors import SaefeatError
from .frozen import Frozen, Placed, plainly
from .state import Ends, Log, Memory, State, View, cache_of, past_length, require_sequential, window

if TYPE_CHECKING:
    from jaxtyping import Float

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


# ---------------------------------------------------------------- programs


@runtime_checkable
class Action(Protocol):
    """One thing that is done with the value of a place."""

    def apply(self, x: Tensor, state: State) -> Tensor:
        """The value [b, t, d] to leave behind: x itself if nothing is written."""
        ...


Part = tuple[int, int, int, float]
"""Some of a value's columns, one head's or the queries of a joint projection: the value is
``groups`` equal spans side by side, and of each these are ``width`` columns from ``start`` on,
times ``scale``, by which the model multiplies them before it uses them.
(start, width, groups, scale)"""


def taken(x: Float[Tensor, "b t d"], part: Part) -> Float[Tensor, "b t part"]:
    """These columns of a value, as a tensor of their own."""
    start, width, groups, scale = part
    return x.unflatten(-1, (groups, -1)).narrow(-1, start, width).flatten(-2) * scale


def put(x: Float[Tensor, "b t d"], part: Part, new: Tensor) -> Float[Tensor, "b t d"]:
    """The value with other numbers in these columns."""
    start, width, groups, scale = part
    if scale != 1:  # what nobody changed keeps its bits
        old = taken(x.detach(), (start, width, groups, 1.0))
        new = old + (new - old * scale) / scale
    spans = x.clone().unflatten(-1, (groups, -1))
    spans.narrow(-1, start, width).copy_(new.unflatten(-1, (groups, -1)))
    return spans.flatten(-2)


class Visit(Frozen):
    """What is done at a place: the output of a module, or its input (``InputVisit``)."""

    path: str  # the module
    order: tuple[int, int, int, str]  # sorts visits as a forward pass reaches them
    actions: tuple[Action, ...]
    part: Part | None = None  # the columns that the actions see; all of them by default
    end: ClassVar[str] = "output"

    def arrive(self, envoy: Any, cache: Any, memory: Memory, first: bool) -> Any:
        """What the module gives: a tensor, or a tuple that begins with it."""
        return envoy.output

    def act(self, x: Float[Tensor, "*batch d"], state: State) -> Float[Tensor, "*batch d"]:
        """Apply the actions to the place's value x; return the value to leave behind."""
        whole = by_token(x, *state.view.real.shape)
        new = before = whole if self.part is None else taken(whole, self.part)
        with plainly(x.device.type):
            for action in self.actions:
                new = action.apply(new, state)
        if new is before:
            return x  # it need not be written back
        new = new if self.part is None else put(whole, self.part, new)
        if x.ndim == 4:
            return new.unflatten(-1, (len(x), -1)).movedim(-2, 0)
        return new.reshape(x.shape)

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
            raise SaefeatError(
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
    path: str,
    end: str,
    order: tuple[int, int, int, str],
    actions: tuple[Action, ...],
    part: Part | None = None,
) -> Visit:
    """The visit of a module's input or output."""
    kind = InputVisit if end == "input" else Visit
    return kind(path=path, order=order, actions=actions, part=part)


@runtime_checkable
class AnySequences(Protocol):
    """Which sequence a pass belongs to; see ``sequences``."""

    def at(
        self, cache: Any, shape: tuple[int, int], ids: Tensor | None, decodes: bool
    ) -> tuple[Memory, int]: ...


@runtime_checkable
class AnyBeside(Protocol):
    """What only a block in the model's own process can tell; see ``sequences``."""

    def sequences(self, first: Memory) -> AnySequences: ...

    def ends(self, model: Any, ends: Ends) -> Ends: ...

    def beams(self, model: Any) -> int: ...

    def check(self, model: Any) -> None: ...


class Program(Frozen):
    """An intervention, lowered for one model."""

    visits: tuple[Visit, ...]  # in the order a forward pass reaches them
    ends: Ends | None  # how the model ends a row
    beams: Beams | None  # given if an action looks back over its row
    placed: Placed  # the actions' tensors where runs have needed them
    beside: AnyBeside | None = None  # what is known beside the model, and not on a server
    embedding: str | None = None  # the module that embeds tokens, if later passes are read there
    # Whether the model's forward takes logits_to_keep. A block that runs apart from the model
    # cannot look: there is no module there (ndif 0.1.2 with transformers 5.23, tried).
    keeps: bool = True

    @property
    def actions(self) -> tuple[Action, ...]:
        """Those of all visits."""
        return tuple(action for visit in self.visits for action in visit.actions)


# ---------------------------------------------------------------- running one


def whole_run(
    model: Any,
    program: Program,
    log: Log | None,
    lengths: Tensor | None = None,
    step: int | None = None,
) -> None:
    """Apply the program to every forward pass of the run that the block belongs to.

    Args:
        model: the nnsight model of the block.
        program: for this model.
        log: what to record in, if anything.
        lengths: [b, 1], how many real tokens of the first pass are the prompt's; all by default.
        step: the number of the pass, for a block that loops over the passes itself.
    """
    try:
        inputs = model.inputs
    except OutOfOrderError as error:
        if step:  # a user's open loop has outrun the generation: how such loops end
            raise
        raise SaefeatError(
            "saefeat: an intervention was applied after the block had already read a layer, or"
            " applied another, so the attention mask is gone. Call it before anything else in the"
            " block, and compose several with |."
        ) from error
    memory, sequences = Memory(lengths, step or 0), None
    decodes = generating(program.keeps, inputs[1])
    if program.beside is not None:
        sequences = program.beside.sequences(memory)
        program.beside.check(model)
        if decodes:
            memory.beams = program.beside.beams(model)
        if decodes and program.ends is not None:
            program = program.replace(ends=program.beside.ends(model, program.ends))
    memory = one_pass(model, program, log, inputs, memory, sequences, not step)
    # In a trace there is one pass, and the block goes on while the model is still running, so that
    # it can read later layers.
    loops = decodes and step is None
    if loops:
        ended(model, program, memory)
    for _ in Iterations()[1:] if loops else ():
        try:
            inputs = later_inputs(model, program, memory)
        except OutOfOrderError:
            return
        memory = one_pass(model, program, log, inputs, memory, sequences, False)
        ended(model, program, memory)


def ended(model: Any, program: Program, memory: Memory) -> None:
    """Wait for the end of a pass of a generation, if rows must be told apart there."""
    if program.beams is not None and program.embedding is None:
        program.beams.note(cache_of(model.output), memory)


def later_inputs(model: Any, program: Program, memory: Memory) -> Inputs:
    """A later pass's inputs; from its new tokens alone, where the program says where those are."""
    if program.embedding is None or memory.mask is None:
        return model.inputs
    # A model's inputs hold its key-value cache, and on a server every value that a block reads is
    # sent to it: for a 70B model 320 kB a token, at each step. So the tokens are read where they
    # are embedded, and the mask grows by ones.
    mask, ids = memory.mask, locate(model, program.embedding).input
    past = mask.shape[1] if ids.shape[1] <= mask.shape[1] else 0  # without a cache: all again
    if past and ids.shape[1] > 1:
        raise SaefeatError(
            f"saefeat: this forward pass feeds {ids.shape[1]} tokens behind the first pass at once,"
            " which a block on a server cannot tell from guesses that are taken back. Likely cause:"
            " assisted generation, prompt lookup, or prefill_chunk_size. Try: generate without it."
        )
    more = past + ids.shape[1] - mask.shape[1]
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], more)], 1)
    return (), {"input_ids": ids, "attention_mask": mask, "past_key_values": past}


def generating(keeps: bool, kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass was made by transformers' generate; ``keeps`` as in ``Program``."""
    # It passes the first two always, and the third to a model that takes it (5.23). The first two
    # alone may be a trace by somebody who wants no cache: waiting there for a second pass would
    # end their block. A PEFT model's own call passes return_dict=None.
    both = kwargs.get("return_dict") is not None and "use_cache" in kwargs
    return both and ("logits_to_keep" in kwargs or not keeps)


def one_pass(
    model: Any,
    program: Program,
    log: Log | None,
    inputs: Inputs,
    memory: Memory,
    sequences: AnySequences | None,
    first: bool,
) -> Memory:
    """Visit every site of one forward pass in order; the memory of the sequence it belongs to.

    That is ``memory``, unless ``sequences`` can tell several apart.
    """
    args, kwargs = inputs
    ids = kwargs.get("input_ids", args[0] if args else None)
    shown = ids if ids is not None else kwargs["inputs_embeds"]
    require_sequential(kwargs)
    # the cache is looked at here, before the pass fills it
    mask, cache, shape = kwargs.get("attention_mask"), cache_of(kwargs), tuple(shown.shape[:2])
    if sequences is None:
        past = past_length(cache)
    else:
        decodes = not first or generating(program.keeps, kwargs)
        memory, past = sequences.at(cache, shape, ids, decodes)
    if program.beams is not None:
        program.beams.follow(cache, memory)
    view = window(ids, mask, shape, past, memory, program.ends)
    visit_all(model, program, log, view, cache, first)
    if log is not None:
        log.passes += 1
        log.view = view
    return memory


def visit_all(
    model: Any, program: Program, log: Log | None, view: View, cache: Any, first: bool
) -> None:
    """Every site of one forward pass, in order; ``cache`` is what the model was given."""
    state = State(view, log, program.placed)
    for visit in program.visits:
        envoy = locate(model, visit.path)
        value = visit.arrive(envoy, cache, view.memory, first)
        x = value[0] if isinstance(value, tuple) else value
        new = visit.act(x, state)
        if new is not x:
            visit.leave(envoy, (new, *value[1:]) if isinstance(value, tuple) else new)


def locate(root: Any, path: str) -> Any:
    """The module (or envoy) at a dotted path such as ``model.layers.3``."""
    for name in path.split("."):
        root = root[int(name)] if name.isdigit() else getattr(root, name)
    return root


def by_token(x: Float[Tensor, "*batch d"], rows: int, tokens: int) -> Float[Tensor, "b t _"]:
    """The value with a row for each sequence: some modules are given all tokens in one row."""
    if x.ndim == 3 and tuple(x.shape[:2]) == (rows, tokens):
        return x
    if x.ndim == 2 and x.shape[0] == rows * tokens:
        return x.reshape(rows, tokens, -1)
    if x.ndim == 4 and tuple(x.shape[1:3]) == (rows, tokens):  # several streams (Gemma 3n)
        return x.movedim(0, -2).flatten(-2)
    raise SaefeatError(  # fewer tokens than the pass has would broadcast against their mask
        f"saefeat: a site's value is of shape {tuple(x.shape)}, and this pass has {rows} rows of"
        f" {tokens} tokens. Likely cause: a module that sees only part of them, as the unembedding"
        " does in generate, or that is given all invokes' tokens in one row. Try: the input or"
        " output of another module, or one invoke."
    )
