"""How new tokens are chosen: greedily, sampled with a seed, or by beams."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ModelError, PromptError, SaefeatError
from ..model.modules import torch_module
from ..values.resample import Resample
from ..verbs.base import Intervention


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
        found: dict[str, Any] = {"max_new_tokens": self.new, "num_beams": self.beams}
        found |= {"num_return_sequences": 1, "do_sample": self.temperature is not None}
        if self.temperature is not None:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return found | ({"eos_token_id": list(self.stops)} if self.stops else {})

    def to_dict(self, model: Any) -> dict[str, Any]:
        """Plain data for provenance, with the model's own settings that ``generate`` applies."""
        config: Any = getattr(torch_module(model), "generation_config", None)
        own = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
        own.pop("transformers_version", None)
        found = {**self._asdict(), "stops": list(self.stops), "model": own}
        return {"max_new_tokens": found.pop("new"), "num_beams": found.pop("beams"), **found}


def decoding(
    model: Any,
    *,
    max_new_tokens: int = 0,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    num_beams: int = 1,
    stop: Sequence[int] = (),
) -> Decoding:
    """``run``'s arguments, checked.

    Raises:
        PromptError: for a count that is none.
        SaefeatError: for sampling without a seed, or settings that would have no effect.
    """
    whole_number("max_new_tokens", max_new_tokens, 0)
    whole_number("num_beams", num_beams, 1)
    if top_k is not None:
        whole_number("top_k", top_k, 1)
    if seed is not None:
        whole_number("seed", seed, 0)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    _require_sampling(given)
    options = [name for name, value in given.items() if value is not None]
    options += ["num_beams"] if num_beams > 1 else []
    if options and not max_new_tokens:
        raise _refused(options[0], "given", "max_new_tokens above 0", "nothing is generated",
                       "max_new_tokens=20")  # fmt: skip
    for token in stop:
        whole_number("stop", token, 0)
    stops = tuple(dict.fromkeys((*_own_stops(model), *stop)))
    heat = None if temperature is None else float(temperature)
    return Decoding(max_new_tokens, heat, top_p or 1.0, top_k or 0, seed, num_beams, stops)


def _require_sampling(given: dict[str, Any]) -> None:
    """A temperature and a seed, or neither."""
    heat, mass = given["temperature"], given["top_p"]
    if heat is not None and not (isinstance(heat, int | float) and 0 < heat < math.inf):
        raise _refused("temperature", repr(heat), "a number above 0",
                       "0 for greedy decoding", "no temperature, which is greedy")  # fmt: skip
    if mass is not None and not (isinstance(mass, int | float) and 0 < mass <= 1):
        raise _refused("top_p", repr(mass), "a probability above 0, up to 1",
                       "a percentage", "top_p=0.9")  # fmt: skip
    if heat is None:
        others = [name for name, value in given.items() if value is not None]
        if others:
            raise _refused(others[0], "given, without temperature", "both, or neither",
                           "decoding is greedy without a temperature",
                           "temperature=1.0, seed=0")  # fmt: skip
    elif given["seed"] is None:
        raise _refused("seed", "not given", "a seed, since a temperature is",
                       "a sample nobody can draw again is no result",
                       f"temperature={heat}, seed=0")  # fmt: skip


def whole_number(name: str, number: Any, least: int) -> None:
    """A whole number from a least value on.

    Raises:
        PromptError: naming the parameter.
    """
    if type(number) is int and number >= least:
        return
    raise PromptError(
        f"run: `{name}` is {number!r}, wanted an integer from {least}. Try: run(model, prompts,"
        f" {name}={max(least, 8)})"
    )


def _refused(name: str, got: str, wanted: str, cause: str, call: str) -> SaefeatError:
    call = call if call.startswith("no ") else f"run(model, prompts, {call}, ...)"
    return SaefeatError(
        f"run: `{name}` is {got}, wanted {wanted}. Likely cause: {cause}. Try: {call}"
    )


def _own_stops(model: Any) -> tuple[int, ...]:
    config = getattr(torch_module(model), "generation_config", None)
    stop = getattr(config, "eos_token_id", None)
    return tuple(stop) if isinstance(stop, list | tuple) else () if stop is None else (stop,)


def require_beamable(intervention: Intervention, settings: Decoding) -> None:
    """Refuse what has no meaning while beams are searched: probes, and draws by prompt.

    Raises:
        SaefeatError: naming the step.
    """
    if settings.beams == 1:
        return
    for step in intervention.parts():
        if step.change is not None and any(isinstance(v, Resample) for v in step.change):
            raise _refused("num_beams", f"{settings.beams}, with {step!r}",
                           "no Resample where beams are searched",
                           "it draws for each prompt, and beams change places between passes",
                           "no num_beams, or activations of your own, [prompts, k]")  # fmt: skip
        if step.change is None:
            raise SaefeatError(
                f"run: `num_beams` is {settings.beams}, with {step!r}, wanted no Probe where beams"
                " are searched. Likely cause: beams are dropped and copied between passes, so that"
                " readings would be of tokens that are not in the completion. Try: run(model, [p +"
                " c for p, c in zip(out.prompts, out.completions)], ...) once more, to read the"
                " completions"
            )


@contextmanager
def seeded(seed: int | None, module: nn.Module) -> Iterator[None]:
    """Draw from this seed inside, and leave every generator as it was found.

    Raises:
        ModelError: on devices whose generator cannot be put back.
    """
    if seed is None:
        yield
        return
    devices = {parameter.device for parameter in module.parameters()}
    other = sorted(str(device) for device in devices if device.type not in ("cpu", "cuda"))
    if other:
        raise ModelError(
            f"run: `seed` is given, for a model on {other[0]}, wanted a model on cpu or cuda."
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
