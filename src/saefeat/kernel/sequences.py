"""Which sequence a forward pass belongs to, where the model's own cache can be seen.

A sequence is its key-value cache. Passes that are given one cache go on with one text, and passes
that are given another do not, however alike their shapes: a second prompt one token longer than
the first, two loops in turns, the two halves of classifier-free guidance, copies of a prefix. Only
where there is no cache are tokens compared, within one generation.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import SaefeatError
from .frozen import Frozen
from .state import Ends, Memory, past_length

if TYPE_CHECKING:
    from jaxtyping import Int


class Sequences:
    """The sequences of a run, or of a block, by their caches, which are held weakly."""

    known: list[tuple[Any, Memory]]  # what refers to the cache, None without one, and the memory

    def __init__(self, first: Memory | None = None) -> None:
        self.known, self.first = [], first

    def at(
        self,
        cache: Any,
        shape: tuple[int, int],
        ids: Int[Tensor, "b t"] | None,
        decodes: bool,
        one: bool = True,
    ) -> tuple[Memory, int]:
        """The memory of a pass's sequence, and how many columns its cache holds before the pass.

        Args:
            cache: what the model was given.
            shape: rows and columns of the pass.
            ids: its tokens, or None for embeddings.
            decodes: whether the pass is known to be one of a generation, so that a cache that was
                filled elsewhere is a part of its prompt.
            one: whether these sequences are all of one generation. Without a cache, another one
                whose prompt is a token longer looks just like the next pass.
        """
        memory = self._by_cache(cache)
        past = filled(cache, memory)
        if memory is not None and not past:
            memory = None  # a cache that was emptied begins another text
        elif memory is None and decodes and (past or cache is None or isinstance(cache, int)):
            memory = self._alike(past, shape, ids)
            if memory is not None and not one:
                memory.blocks = True
        if memory is not None and _rows(memory) in (None, shape[0]):
            return memory, past
        memory, self.first = self.first or Memory(), None
        memory.blocks = past > 0 and not decodes  # where its prompt ended, nobody can tell
        self.known.append((None, memory))
        self.keep(cache, memory)
        return memory, past

    def keep(self, cache: Any, memory: Memory) -> None:
        """Remember whose cache this is: a pass may be given none, and make one."""
        if cache is None or isinstance(cache, int):
            return
        others = [(held, m) for held, m in self.known if m is not memory]
        self.known = [*others, (weakref.ref(cache), memory)]

    def take(self, others: Sequences) -> None:
        """Know these as well: a cache that a generation has filled may be gone on with."""
        filled = [(held, memory) for held, memory in others.known if held is not None]
        caches = {id(held()) for held, _ in filled}
        mine = [(held, m) for held, m in self.known if held is None or id(held()) not in caches]
        self.known = [*mine, *filled]

    def _by_cache(self, cache: Any) -> Memory | None:
        same = (m for held, m in self.known if held is not None and held() is cache)
        return None if cache is None else next(same, None)

    def _alike(
        self, past: int, shape: tuple[int, int], ids: Int[Tensor, "b t"] | None
    ) -> Memory | None:
        """The sequence that a pass without a cache, or with a copy of one, goes on with."""
        # a block that runs apart from the model is given another copy at each pass
        free = [m for held, m in reversed(self.known) if held is None or held() is None]
        if past:
            return next((m for m in free if m.seen == past and _rows(m) == shape[0]), None)
        return next((m for m in free if _grown(m, ids)), None)


def _rows(memory: Memory) -> int | None:
    return None if memory.lengths is None else len(memory.lengths)


def _grown(memory: Memory, ids: Int[Tensor, "b t"] | None) -> bool:
    """Whether these are a sequence's tokens and one more."""
    before = memory.ids
    if ids is None or before is None or memory.seen is None or len(ids) != len(before):
        return False
    # beams change rows within a prompt's own, so what is compared is the prompt
    prompt = slice(0, memory.prompt)
    return ids.shape[1] == memory.seen + 1 and torch.equal(
        ids[:, prompt], before[:, prompt].to(ids.device)
    )


def filled(cache: Any, memory: Memory | None) -> int:
    """How many columns a cache holds; a state-space model's says only whether it is new."""
    try:
        return past_length(cache)
    except (ValueError, AttributeError):
        if memory is not None and memory.seen is not None:
            return memory.seen
        if not getattr(cache, "has_previous_state", lambda: True)():
            return 0
    raise SaefeatError(
        "saefeat: the cache of this forward pass does not say how many tokens it holds, so"
        " positions are not known. Likely cause: a state-space model whose prompt was run before"
        " the intervention was there. Try: the whole prompt in the block."
    )


class Beside(Frozen):
    """What only a block in the model's own process can tell; a program that is sent has none."""

    def sequences(self, first: Memory) -> Sequences:
        """The sequences of one run, of which the first has this memory."""
        return Sequences(first)

    def check(self, model: Any) -> None:
        """Refuse loops of decoding that are not transformers' own."""
        require_own_loop(arguments(model) or {})

    def ends(self, model: Any, ends: Ends) -> Ends:
        """How rows end, by the arguments of ``generate`` as well."""
        given = arguments(model)
        if given is None or ends.honored:
            return ends
        config, said = given.get("generation_config"), {}
        for name in ("eos_token_id", "pad_token_id", "stop_strings", "stopping_criteria"):
            said[name] = given.get(name, getattr(config, name, None))
        eos, stops, pad = said["eos_token_id"], ends.stops, ends.pad
        if eos is not None or "eos_token_id" in given:
            stops = () if eos is None else tuple(torch.as_tensor(eos).flatten().tolist())
        if said["pad_token_id"] is not None:
            pad = int(said["pad_token_id"])
        elif pad < 0 and stops:
            pad = stops[0]
        otherwise = bool(said["stop_strings"] or said["stopping_criteria"])
        return Ends(stops=stops, pad=pad, honored=True, otherwise=otherwise)

    def beams(self, model: Any) -> int:
        """How many sequences ``generate`` searches for each prompt."""
        given = arguments(model) or {}
        config = given.get("generation_config") or getattr(model._module, "generation_config", None)
        return given.get("num_beams") or getattr(config, "num_beams", None) or 1


def require_own_loop(given: dict[str, Any]) -> None:
    """Refuse arguments of ``generate`` that bring another loop: its passes may hold guesses.

    Contrastive search runs its candidates side by side and drops all but one; DoLa, constrained and
    group beam search come from the Hub as well (transformers 5.23).
    """
    named = next((n for n in ("custom_generate", "trust_remote_code") if given.get(n)), None)
    if named is not None:
        raise SaefeatError(
            f"saefeat: generate is given {named}, whose passes may hold candidates that are dropped"
            " later, which would be edited, read and counted. Likely cause: contrastive search,"
            " DoLa, or constrained or group beam search, which transformers takes from the Hub."
            " Try: greedy decoding, sampling or num_beams; or a loop of your own that feeds each"
            " token once"
        )


def arguments(model: Any) -> dict[str, Any] | None:
    """What a trace was called with: nnsight keeps it with what batches the invokes (0.8.1)."""
    batcher = getattr(getattr(model, "interleaver", None), "batcher", None)
    return getattr(batcher, "kwargs", None)
