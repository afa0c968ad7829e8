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
from .view import Memory, View, past_length, require_sequential, window

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


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
        raise RuntimeError(
            "saefeat: an intervention was applied after the block had already read a layer, so the"
            " attention mask is gone. Call it before anything else in the block."
        ) from error
    memory = Memory(lengths, step or 0)
    one_pass(model, program, log, inputs, memory, not step)
    # In a trace there is one pass, and the block goes on while the model is still running, so that
    # it can read later layers.
    loops = step is None and generating(inputs[1])
    for _ in Iterations()[1:] if loops else ():
        try:
            inputs = later_inputs(model, program, memory)
        except OutOfOrderError:
            return
        one_pass(model, program, log, inputs, memory, False)


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
        raise ValueError(
            f"saefeat: this forward pass feeds {ids.shape[1]} tokens behind the first pass at once,"
            " which a block on a server cannot tell from guesses that are taken back. Likely cause:"
            " assisted generation, prompt lookup, or prefill_chunk_size. Try: generate without it."
        )
    more = past + ids.shape[1] - mask.shape[1]
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], more)], 1)
    return (), {"input_ids": ids, "attention_mask": mask, "past_key_values": past}


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
    # the cache is looked at here, before the pass fills it
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    view = window(ids, mask, tuple(shown.shape[:2]), past_length(cache), memory, program.ends)
    if program.beams is not None:
        program.beams.follow(cache, memory)
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
        value = stop.arrive(envoy, cache, view.memory, first)
        x = value[0] if isinstance(value, tuple) else value
        new = visit(stop.actions, x, state)
        if new is not x:
            stop.leave(envoy, (new, *value[1:]) if isinstance(value, tuple) else new)


def locate(root: Any, path: str) -> Any:
    """The module (or envoy) at a dotted path such as ``model.layers.3``."""
    for name in path.split("."):
        root = root[int(name)] if name.isdigit() else getattr(root, name)
    return root
