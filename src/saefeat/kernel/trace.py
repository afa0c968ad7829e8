"""The same program inside an nnsight block, for one forward pass or for every one of a run.

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

from typing import Any

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from torch import Tensor

from .log import Log, State
from .program import Program, visit
from .view import Memory, View, follow_rows, past_length, require_sequential, window

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def whole_run(model: Any, program: Program, log: Log | None, lengths: Tensor | None = None) -> None:
    """Apply the program to every forward pass of the run that the block belongs to.

    ``lengths`` [b, 1] says how many real tokens of the first pass are the prompt's; all by default.
    """
    memory, mask = Memory(lengths), None
    for number in Iterations()[:]:
        try:
            inputs = model.inputs if mask is None else new_tokens(model, program, mask)
        except OutOfOrderError:
            if number == 0:
                raise
            return
        mask = known_mask(program, inputs)  # before the pass fills the cache
        one_pass(model, program, log, inputs, memory, number == 0)


def inline(model: Any, program: Program, log: Log, step: int | None) -> None:
    """Apply the program from inside a user's block.

    In a trace there is one pass, and the block must go on while the model is still running, so
    that it can read later layers. In a generation every pass is edited, unless ``step`` says
    that the block loops over the passes itself.
    """
    try:
        inputs = model.inputs
    except OutOfOrderError as error:
        if step:  # a user's open loop has outrun the generation: how such loops end
            raise
        raise RuntimeError(
            "saefeat: an intervention was applied after the block had already read a layer, so the"
            " attention mask is gone. Call it before anything else in the block."
        ) from error
    memory = Memory(prompt_lengths(inputs, step) if step else None)
    mask, loops = known_mask(program, inputs), step is None and generating(inputs[1])
    one_pass(model, program, log, inputs, memory, not step)
    for _ in Iterations()[1:] if loops else ():
        try:
            inputs = model.inputs if mask is None else new_tokens(model, program, mask)
        except OutOfOrderError:
            return
        mask = known_mask(program, inputs)
        one_pass(model, program, log, inputs, memory, False)


def known_mask(program: Program, inputs: Inputs) -> Tensor | None:
    """The attention mask of a pass, if ``new_tokens`` is to work out the next one's inputs."""
    if program.embedding is None:
        return None
    args, kwargs = inputs
    ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    if ids is None:
        return None
    past = past_length(kwargs.get("past_key_values"))
    return torch.ones_like(ids[:, :1]).expand(-1, past + ids.shape[1]) if mask is None else mask


def new_tokens(model: Any, program: Program, mask: Tensor) -> Inputs:
    """A later pass's inputs, from its new tokens alone.

    A model's inputs hold its key-value cache, and on a server every value that a block reads is
    sent to it: for a 70B model 320 kB a token, at each step of a generation. The tokens are read
    where they are embedded; the mask only grows by ones.
    """
    ids = locate(model, program.embedding).input
    past = mask.shape[1] if ids.shape[1] <= mask.shape[1] else 0  # without a cache: all again
    if past and ids.shape[1] > 1:
        raise ValueError(
            f"saefeat: this forward pass feeds {ids.shape[1]} tokens behind the first pass at once,"
            " which a block on a server cannot tell from guesses that are taken back. Likely cause:"
            " assisted generation, prompt lookup, or prefill_chunk_size. Try: generate without it."
        )
    more = past + ids.shape[1] - mask.shape[1]
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], more)], 1)
    return (), {"input_ids": ids, "attention_mask": mask, "past_key_values": past}


def prompt_lengths(inputs: Inputs, step: int) -> Tensor:
    """The prompts' lengths at a later pass [b, 1]: all tokens so far, less those generated."""
    args, kwargs = inputs
    mask = kwargs.get("attention_mask")
    if mask is not None:
        return (mask != 0).sum(1, keepdim=True) - step
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    total = past_length(kwargs.get("past_key_values")) + ids.shape[1]
    return torch.full_like(ids[:, :1], total - step)


def generating(kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass was made by transformers' generate, which passes both of these."""
    return "return_dict" in kwargs and "use_cache" in kwargs


def one_pass(
    model: Any, program: Program, log: Log | None, inputs: Inputs, memory: Memory, first: bool
) -> None:
    """Visit every site of one forward pass in order."""
    args, kwargs = inputs
    ids = kwargs.get("input_ids", args[0] if args else None)
    shown = ids if ids is not None else kwargs["inputs_embeds"]
    require_sequential(kwargs)
    cache = kwargs.get("past_key_values")
    mask, shape = kwargs.get("attention_mask"), tuple(shown.shape[:2])
    view = window(ids, mask, shape, past_length(cache), memory, program.ends)
    if program.remembers:
        follow_rows(cache, memory)
    visits(model, program, log, view, cache, first)
    if log is not None:
        log.passes += 1
        log.view = view


def visits(
    model: Any, program: Program, log: Log | None, view: View, cache: Any, first: bool
) -> None:
    """Every site of one forward pass, in order; ``cache`` is what the model was given."""
    state = State(view, log, program.placed)
    for stop in program.visits:
        envoy = locate(model, stop.path)
        entry = stop.end == "input"
        value = entering(envoy, cache, view.memory, first) if entry else envoy.output
        x = value[0] if isinstance(value, tuple) else value
        new = visit(stop.actions, x, state)
        if new is not x:
            new = (new, *value[1:]) if isinstance(value, tuple) else new
            if entry:
                envoy.input = new
            else:
                envoy.output = new


def entering(envoy: Any, cache: Any, memory: Memory, first: bool) -> Any:
    """The first thing a module is given.

    Beside it may stand the key-value cache. It is another object than the model's own where the
    block runs in a process of its own; then this module has filled a copy of it from the first
    pass on.
    """
    args, kwargs = envoy.inputs
    own = kwargs.get("past_key_values")
    copied = own is not None and type(own) is type(cache) and own is not cache
    if memory.copied or (copied and not first):
        raise RuntimeError(
            f"saefeat: the input of {envoy.path} is read in a generation, on a server that runs"
            " blocks apart from the model and gives them copies. The module goes on with a copy of"
            " the key-value cache, so later tokens would not see this one. Likely cause: an"
            " ordinary key, and a site such as resid_pre.0 or a path that ends in .input. Try: one"
            " forward pass, without new tokens; another site; or a trusted key."
        )
    memory.copied = memory.copied or copied  # harmless if no pass follows
    return args[0] if args else next(iter(kwargs.values()))


def locate(root: Any, path: str | None) -> Any:
    """The module (or envoy) at a dotted path such as ``model.layers.3``."""
    for name in (path or "").split("."):
        root = root[int(name)] if name.isdigit() else getattr(root, name)
    return root
