"""What a forward pass shows, what its actions have read, and what a run remembers and records.

``Memory`` lasts as long as a sequence, ``View`` and ``State`` as long as one pass, and a ``Log``
outlives the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import SaefeatError
from .frozen import Frozen, Placed

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

Held = tuple[Tensor, Tensor | None, Tensor, bool]
"""Latents f [b, t, k], their directions' scale, which tokens [b, t, 1], and whether all of them."""


class Memory:
    """What later passes must know of a sequence."""

    lengths: Tensor | None = None  # [b, 1], the prompts' in real tokens; None before the first pass
    generated: int = 0  # tokens of the first pass that are no longer the prompt's
    seen: int | None = None  # columns shown so far; None before the first pass
    prompt: int = 0  # columns of the first pass
    # Whether nobody can tell where the prompt ended: a pass has added several columns to a sequence
    # already begun, or the first one went on with a cache that was filled elsewhere.
    blocks: bool = False
    ids: Tensor | None = None  # [b, s], the tokens shown so far
    mask: Tensor | None = None  # [b, s], the attention mask so far, where ids are known
    stopped: Tensor | None = None  # [b, 1], rows that have come to their end
    copied: bool = False  # whether a module goes on with a copy of the key-value cache
    beams: int = 1  # sequences searched for each prompt, as far as can be told
    # Columns in the cache, a layer of it, and that layer's key [b, d] of the last column.
    keys: tuple[int, int, Tensor] | None = None
    kept: dict[Any, Any]  # what actions remember, by their keys: tensors by row, or tuples of them
    parts: dict[tuple[int, int], Memory]  # the memories of some rows alone

    def __init__(self, lengths: Tensor | None = None, generated: int = 0) -> None:
        self.lengths, self.generated, self.kept, self.parts = lengths, generated, {}, {}


def require_one_beam(memory: Memory, what: str) -> None:
    """Refuse what belongs to a prompt's only row, where beams change places between passes."""
    if memory.beams > 1:
        raise SaefeatError(
            f"saefeat: this generation searches {memory.beams} beams, with {what}, which has a row"
            " for each prompt; beams are dropped and copied between passes. Likely cause: num_beams"
            " of generate. Try: generate greedily; to read completions, run on them once more."
        )


class Ends(Frozen):
    """How a finished row is filled while other rows go on generating."""

    stops: tuple[int, ...]  # the ids that end a row
    pad: int  # the id it is filled with
    # Whether generation is known to stop there. Then the stop token itself, fed back only because
    # other rows go on, is filling too. Where it is not known, filling is padding behind a stop, so
    # that a caller who ignores stop tokens has every token edited.
    honored: bool
    # Whether rows may end for other reasons than these stops: a stop string, or stop tokens that
    # only the caller of generate knows. Then padding that was generated is filling by itself.
    otherwise: bool = False

    def finished(
        self, ids: Int[Tensor, "b t"], generated: Bool[Tensor, "b t"], memory: Memory, whole: bool
    ) -> Bool[Tensor, "b t"]:
        """The columns that are filling; ``whole``: the pass shows the sequence from its start."""
        stops = torch.tensor(self.stops, dtype=ids.dtype, device=ids.device)
        stop = torch.isin(ids, stops) & generated
        before = None if whole else memory.stopped  # a row's own stop is among what is shown again
        carry = torch.zeros_like(stop[:, :1]) if before is None else before
        carry = carry.to(ids.device)
        over = stop.int().cummax(1).values.bool() | carry
        memory.stopped = over[:, -1:]
        padding = ids == self.pad
        # a block that loops over passes sees one alone, and not whether its row has stopped before
        alone = bool(memory.generated) and not whole
        behind = torch.cat([carry, over[:, :-1]], 1) & padding
        filling = over if self.honored or alone else behind
        if (self.otherwise or alone) and self.pad not in self.stops:
            filling = filling | (padding & generated)
        return filling


class View(Frozen):
    """What a forward pass shows of the sequence: b rows, the newest t columns."""

    ids: Tensor | None  # [b, t], or None for embeddings
    position: Tensor  # [b, t], of real tokens from 0; a left pad has none
    shown: Tensor  # [b, t], what is no padding
    real: Tensor  # [b, t], what of it belongs to a row that is not finished
    lengths: Tensor  # [b, 1], the prompts' lengths in real tokens
    whole: bool  # whether the pass shows the sequence from its start
    begins: bool  # whether it is the sequence's first pass
    memory: Memory  # what later passes must know
    selected: dict[tuple, tuple[Tensor, bool]]  # what each rule selects here, once it is known


@runtime_checkable
class AnyActed(Protocol):
    """What an edit did in one pass; see ``Acted``."""

    @property
    def rows(self) -> int: ...

    @property
    def begins(self) -> bool: ...

    def counts(self) -> Tensor: ...

    def changes(self) -> dict[str, Tensor]: ...


class Budget:
    """How much of what edits did is kept, by all logs that share it."""

    pairs: int = 0  # (token, latent) pairs whose values have been kept so far


class Log:
    """The record of a run."""

    # Annotated here and not in the method: names in a method's annotations would travel with it.
    passes: int = 0  # forward passes seen
    view: View  # of the last of them; not there before the first
    read: Memory | None = None  # the sequence that the readings are of
    # By the number of a read dictionary: f [b, t, k] pass by pass, or one running value [b, 1, k].
    readings: dict[int, list[Tensor]]
    masks: dict[int, list[Tensor]]  # which tokens count [b, t], or how many [b, 1]
    # By the number of an edited dictionary: what each pass changed, or its counts [3].
    acted: dict[int, list[AnyActed | Tensor]]
    kept: dict[int, Tensor]  # by the number of a watched place: its value [b, t, d] after edits
    before: dict[int, Tensor]  # the same before edits
    nodes: dict[int, Tensor]  # the values that a gradient is taken at
    shown: dict[int | str, Tensor]  # values with their graph, for a metric or a later action
    parts: dict[tuple[int, int], Log]  # the logs of some rows alone
    budget: Budget

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget or Budget()
        self.readings, self.masks, self.acted = {}, {}, {}
        self.kept, self.before, self.nodes, self.shown = {}, {}, {}, {}
        self.parts = {}


class State:
    """What one forward pass has read so far, for its later actions."""

    view: View
    log: Log | None
    placed: Placed  # the program's tensors where they are used
    held: dict[int, Held]  # what each dictionary read, by its number
    stash: dict[int | str, Tensor]  # values of earlier places, by name
    met: dict[str, tuple[Tensor, int]]  # where each condition is met [b, t, 1], of how many tests
    parts: dict[tuple[int, int], State]  # the states of some rows alone

    def __init__(self, view: View, log: Log | None, placed: Placed) -> None:
        self.view, self.log, self.placed = view, log, placed
        self.held, self.stash, self.met, self.parts = {}, {}, {}, {}

    def whole(self, x: Tensor, plus: str | None) -> Tensor:
        """The site's value: x, and for resid_mid the block's input as well."""
        return x if plus is None else self.stash[plus].to(x.device) + x


def window(
    ids: Int[Tensor, "b t"] | None,
    mask: Any,
    shape: tuple[int, int],
    past: int,
    memory: Memory,
    ends: Ends | None,
) -> View:
    """The view of a pass of ``shape`` (b, t), ``past`` columns of which a cache already holds.

    Args:
        ids: the tokens fed in this pass, or None for embeddings.
        mask: the attention mask [b, s] over past and new columns. None is a mask of ones, which
            generate drops; then ``past`` is all that tells a new token from the first.
        shape: (b, t).
        past: see above.
        memory: of the passes before; a new one for a new sequence.
        ends: what a finished row looks like.
    """
    rows, columns = shape
    if mask is None:
        device = None if ids is None else ids.device
        mask = torch.ones(rows, past + columns, dtype=torch.long, device=device)
    if getattr(mask, "ndim", 0) != 2:
        raise SaefeatError(
            "saefeat: the attention mask of this forward pass is not [batch, sequence], so padding"
            " cannot be told from tokens. Likely cause: a compiled or static cache, or a 4-D mask"
            " of your own. Try: the default dynamic cache, and the tokenizer's own mask."
        )
    if past and memory.seen not in (None, past):
        raise SaefeatError(
            f"saefeat: the key-value cache holds {past} columns where {memory.seen} have been"
            " seen, so tokens that were edited and read have been taken back. Likely cause:"
            " assisted generation, or a cache cropped between passes. Try: generate without an"
            " assistant, or begin anew for each sequence."
        )
    begins = memory.seen is None
    memory.blocks = memory.blocks or (bool(past) and not begins and columns > 1)
    memory.seen = past + columns
    memory.prompt = memory.prompt or memory.seen
    shown = real = mask[:, -columns:] != 0
    position = (mask != 0).long().cumsum(1)[:, -columns:] - 1
    lengths = memory.lengths
    if lengths is None:
        lengths = memory.lengths = (mask != 0).sum(1, keepdim=True) - memory.generated
    lengths = lengths.to(position.device)
    memory.mask = None if ids is None else mask
    if ids is not None:  # with a cache a pass shows only new tokens; rules may look further back
        text, new = memory.ids, ids.shape[1] == mask.shape[1]
        memory.ids = ids if new or text is None else torch.cat([text.to(ids.device), ids], 1)
        if ends is not None:
            real = real & ~ends.finished(ids, position >= lengths, memory, not past)
    return View(
        ids=ids, position=position, shown=shown, real=real, lengths=lengths, whole=past == 0,
        begins=begins, memory=memory, selected={},
    )  # fmt: skip


def cache_of(given: Any) -> Any:
    """What a pass is given of earlier tokens, or gives: a cache, its columns, or None."""
    names = ("past_key_values", "cache_params")  # the second is Mamba's
    if isinstance(given, dict):  # arguments, and the outputs of transformers
        return next((given[name] for name in names if given.get(name) is not None), None)
    parts = given if isinstance(given, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def past_length(cache: Any) -> int:
    """How many columns a key-value cache holds, or how many this number says."""
    if isinstance(cache, int):
        return cache
    return 0 if cache is None else int(cache.get_seq_length())


def last_position(view: View) -> Int[Tensor, "b 1"]:
    """The position of the last column, or the one it would have if the row's text went on to it.

    Padding on the right repeats the last token's.
    """
    first = view.shown.int().argmax(1, keepdim=True)  # the first column that is no padding
    return view.position.gather(1, first) + view.shown.shape[1] - 1 - first


def require_sequential(kwargs: dict[str, Any]) -> None:
    """Refuse a forward pass whose columns are not simply the next tokens of one text a row."""
    # transformers' generate passes return_dict on every path but assisted generation and prompt
    # lookup, which feed guesses and take them back (5.23, tried).
    cached = kwargs.get("past_key_values") is not None and "use_cache" in kwargs
    if cached and "logits_to_keep" in kwargs and "return_dict" not in kwargs:
        raise SaefeatError(
            "saefeat: this forward pass may hold guessed tokens that are taken back later, which"
            " would be edited, read and counted. Likely cause: assisted generation or prompt"
            " lookup. Try: generate without assistant_model and prompt_lookup_num_tokens; in a"
            " loop of your own, call the model with return_dict=True."
        )
    # RWKV's, XLNet's and Reformer's names: nothing in them says how many tokens came before.
    if any(kwargs.get(name) is not None for name in ("state", "mems", "past_buckets_states")):
        raise SaefeatError(
            "saefeat: this forward pass goes on with a state that does not say how many tokens it"
            " holds, so positions are not known. Likely cause: a recurrent model other than Mamba."
            " Try: use_cache=False, or one forward pass over the whole text."
        )
    places = kwargs.get("position_ids")
    packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
    if isinstance(places, Tensor) and places.ndim == 2 and places.shape[1] > 1 and not packed:
        falls = places[:, 1:] < places[:, :-1]  # a left pad's place is 0 or 1, whichever it is
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            falls = falls & (mask[:, -places.shape[1] :][:, :-1] != 0).to(falls.device)
        packed = bool(falls.any())
    if packed:
        raise SaefeatError(
            "saefeat: several texts lie in one row of this forward pass, and positions are counted"
            " along the row. Likely cause: packed sequences (position_ids that start again). Try:"
            " one text a row, padded, with an attention mask."
        )
