"""How new tokens are chosen: greedily, by a seeded sample, or by beams."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..checks import whole
from ..errors import ModelError, PromptError, SaefeatError
from ..model.modules import torch_module
from ..values.resample import Resample
from ..verbs.base import Intervention

if TYPE_CHECKING:
    from nnsight import TransformersModel


@checked
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
        _keep_stops(self)


@checked
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
        _keep_stops(self)


@checked
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
        _keep_stops(self)


Decode = Greedy | Sample | Beams


def _keep_stops(decode: Decode) -> None:
    """Make ``stop`` a tuple of ids, whatever sequence was given."""
    for token in decode.stop:
        whole(type(decode).__name__, "stop", token, 0)
        if token >= 2**62:  # beyond the integers of a tensor of ids
            raise SaefeatError(
                f"{type(decode).__name__}: `stop` is {token}, wanted ids below 2**62. Likely cause:"
                f" a number that is no token id. Try: stop=(tokenizer.eos_token_id,)"
            )
    object.__setattr__(decode, "stop", tuple(decode.stop))


def _in_range(parameter: str, given: object, most: float, wanted: str) -> None:
    if isinstance(given, int | float) and 0 < given <= most:
        return
    raise SaefeatError(
        f"Sample: `{parameter}` is {given!r}, wanted {wanted}. Try: Sample(0.8, top_p=0.9, seed=0);"
        " decode=None is greedy"
    )


class Decoding(NamedTuple):
    """Settings of one generation, checked.

    Attributes:
        new: most new tokens; 0 makes one forward pass.
        temperature: None decodes greedily.
        top_p: the least probability mass sampled from.
        top_k: the most tokens sampled from, 0 for all.
        seed: of the sampling; None where nothing is sampled.
        beams: sequences searched for each prompt.
        stops: ids that end a completion, the model's own and the caller's.
    """

    new: int
    temperature: float | None
    top_p: float
    top_k: int
    seed: int | None
    beams: int
    stops: tuple[int, ...]

    def at(self, row: int) -> Decoding:
        """The same for the batch that begins at this row of the job, with a seed of its own.

        So a batch gives the same again whether or not those before it were run.
        """
        if self.seed is None:
            return self
        mixed = hashlib.sha256(f"{self.seed} {row}".encode()).digest()
        return self._replace(seed=int.from_bytes(mixed[:8], "little") >> 1)

    def arguments(self) -> dict[str, Any]:
        """For transformers' ``generate``. What is left out there is the model's own habit."""
        given: dict[str, Any] = {"max_new_tokens": self.new, "num_beams": self.beams}
        given |= {"num_return_sequences": 1, "do_sample": self.temperature is not None}
        if self.temperature is not None:
            given |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return given | ({"eos_token_id": list(self.stops)} if self.stops else {})

    def to_dict(self, model: TransformersModel) -> dict[str, Any]:
        """Plain data for provenance, with the model's own settings that ``generate`` applies."""
        config: Any = getattr(torch_module(model), "generation_config", None)
        habits = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
        habits.pop("transformers_version", None)
        said = {**self._asdict(), "stops": list(self.stops), "model": habits}
        return {"max_new_tokens": said.pop("new"), "num_beams": said.pop("beams"), **said}


def decoding(
    model: TransformersModel, max_new_tokens: int = 0, decode: Decode | None = None
) -> Decoding:
    """``max_new_tokens`` and ``decode``, checked for this model."""
    whole("run", "max_new_tokens", max_new_tokens, 0, error=PromptError)
    chosen = Greedy() if decode is None else decode
    if not isinstance(chosen, Greedy | Sample | Beams):
        raise SaefeatError(
            f"run: `decode` is {decode!r}, wanted a Greedy, Sample or Beams, or None, which is"
            " greedy. Try: run(model, prompts, max_new_tokens=20, decode=Sample(0.8, seed=0))"
        )
    own = getattr(getattr(torch_module(model), "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list | tuple) else () if own is None else (own,)
    stops = tuple(dict.fromkeys((*own, *chosen.stop)))
    plain = Decoding(max_new_tokens, None, 1.0, 0, None, 1, stops)
    if isinstance(chosen, Greedy):
        return plain
    if not max_new_tokens:
        raise SaefeatError(
            f"run: `decode` is {chosen}, without max_new_tokens, wanted max_new_tokens above 0."
            f" Likely cause: nothing is generated. Try: run(..., max_new_tokens=20,"
            f" decode={chosen})"
        )
    plain = plain._replace(beams=chosen.num_beams)
    if isinstance(chosen, Beams):
        return plain
    top_p, top_k = chosen.top_p or 1.0, chosen.top_k or 0
    heat = float(chosen.temperature)
    return plain._replace(temperature=heat, top_p=top_p, top_k=top_k, seed=chosen.seed)


def require_beamable(function: str, intervention: Intervention, beams: int) -> None:
    """Refuse what has no meaning while beams are searched: probes, and draws by prompt."""
    if beams == 1:
        return
    for step in intervention.parts():
        if step.change is None:
            wanted, call = "Probe", "run(model, [p + c for p, c in zip(out.prompts,"
            call += " out.completions)], ...) once more, to read the completions"
            cause = "beams are dropped and copied between passes, so that readings would be of"
            cause += " tokens that are not in the completion"
        elif any(isinstance(value, Resample) for value in step.change):
            wanted, call = "Resample", "decode=None, or activations of your own, [prompts, k]"
            cause = "it draws for each prompt, and beams change places between passes"
        else:
            continue
        raise SaefeatError(
            f"{function}: `decode` searches {beams} beams, with {step!r}, wanted no {wanted} where"
            f" beams are searched. Likely cause: {cause}. Try: {call}"
        )


@contextmanager
def seeded(seed: int | None, module: nn.Module) -> Iterator[None]:
    """Draw from this seed inside, and leave every generator as it was found."""
    if seed is None:
        yield
        return
    devices = {parameter.device for parameter in module.parameters()}
    other = sorted(str(device) for device in devices if device.type not in ("cpu", "cuda"))
    if other:
        raise ModelError(
            f"run: `decode` is a sample, for a model on {other[0]}, wanted a model on cpu or cuda."
            " Likely cause: this device's random numbers cannot be seeded without leaving a trace."
            " Try: greedy decoding, or the model on another device"
        )
    numbers = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    with torch.random.fork_rng(devices=numbers):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed other devices too
        for number in numbers:
            with torch.cuda.device(number):
                torch.cuda.manual_seed(seed)
        yield


def until_stop(tokens: Tensor, stops: Sequence[int]) -> list[list[int]]:
    """Each row up to and with its first stop token; what follows is padding."""
    rows = []
    for row in tokens.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        rows.append(row[:end])
    return rows
