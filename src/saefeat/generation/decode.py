"""How new tokens are chosen, as the user says it: greedily, by a seeded sample, or by beams."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from ..checks import whole
from ..errors import SaefeatError


@dataclass(frozen=True)
class Greedy:
    """The most probable token at each step: what ``decode=None`` does, with stop tokens.

    Args:
        stop: token ids that end a completion, besides the model's own.

    Raises:
        SaefeatError: for a stop token that is not an id.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> stops = sf.generation.Greedy(stop=(6,))
        >>> out = sf.run(tiny.model("chat"), "hello", max_new_tokens=4, decode=stops)
        >>> out.provenance.generation["stops"]
        [5, 1, 6]
    """

    stop: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", token_ids("Greedy", self.stop))


@dataclass(frozen=True)
class Sample:
    """A draw from softmax(logits / temperature), the same again for the same seed.

    Nothing is cut off unless you ask: transformers' habit of sampling from 50 tokens is off.

    Args:
        temperature: above 0; 1 samples from the model's own probabilities.
        seed: of the draws; needed, since a sample that nobody can draw again is no result.
        top_p: sample from the fewest tokens that hold this probability; all by default.
        top_k: sample from this many tokens; all by default.
        num_beams: sequences searched for each prompt, each continued by draws.
        stop: token ids that end a completion, besides the model's own.

    Raises:
        SaefeatError: for a number out of range, or without a seed.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model, sample = tiny.model("chat"), sf.generation.Sample(0.8, seed=0)
        >>> first = sf.run(model, "hello", max_new_tokens=4, decode=sample)
        >>> first.texts == sf.run(model, "hello", max_new_tokens=4, decode=sample).texts
        True
    """

    temperature: float = 1.0
    _: KW_ONLY
    seed: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    stop: Sequence[int] = ()

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, sys.float_info.max, "a finite number above 0")
        if self.seed is None:
            raise SaefeatError(
                "Sample: `seed` is not given, wanted an integer from 0. Likely cause: a sample"
                " that nobody can draw again is no result. Try:"
                f" Sample({self.temperature!r}, seed=0)"
            )
        whole("Sample", "seed", self.seed, 0)
        if self.top_p is not None:
            _in_range("top_p", self.top_p, 1.0, "a probability above 0, up to 1")
        if self.top_k is not None:
            whole("Sample", "top_k", self.top_k, 1)
        whole("Sample", "num_beams", self.num_beams, 1)
        object.__setattr__(self, "stop", token_ids("Sample", self.stop))


@dataclass(frozen=True)
class Beams:
    """Beam search: the most probable of the sequences that were searched.

    An edit acts on every beam. Receipts count them all, without events; probes are refused, since
    beams are dropped on the way.

    Args:
        num_beams: sequences searched for each prompt.
        stop: token ids that end a completion, besides the model's own.

    Raises:
        SaefeatError: for a count below 1, or a stop token that is not an id.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> beams = sf.generation.Beams(3)
        >>> out = sf.run(tiny.model("chat"), "hello", max_new_tokens=4, decode=beams)
        >>> len(out.texts)
        1
    """

    num_beams: int
    _: KW_ONLY
    stop: Sequence[int] = ()

    def __post_init__(self) -> None:
        whole("Beams", "num_beams", self.num_beams, 1)
        object.__setattr__(self, "stop", token_ids("Beams", self.stop))


Decode = Greedy | Sample | Beams


def token_ids(function: str, stop: Sequence[int]) -> tuple[int, ...]:
    """Stop tokens, each an id.

    Raises:
        SaefeatError: naming the function.
    """
    for token in stop:
        whole(function, "stop", token, 0)
    return tuple(stop)


def _in_range(parameter: str, given: object, most: float, wanted: str) -> None:
    if isinstance(given, int | float) and 0 < given <= most:
        return
    raise SaefeatError(
        f"Sample: `{parameter}` is {given!r}, wanted {wanted}. Try: Sample(0.8, top_p=0.9, seed=0);"
        " decode=None is greedy"
    )
