"""How new tokens are chosen: greedily, sampled with a seed, or by beams."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import whole
from ..errors import ModelError, PromptError, SaefeatError
from ..model.modules import torch_module
from ..values.resample import Resample
from ..verbs.base import Intervention
from .decode import Beams, Decode, Greedy, Sample

if TYPE_CHECKING:
    from nnsight import TransformersModel


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
    """``max_new_tokens`` and ``decode``, checked for this model.

    Raises:
        PromptError: for a count of tokens that is not one.
        SaefeatError: for a way of decoding that is not one, or would have no effect.
    """
    whole("run", "max_new_tokens", max_new_tokens, 0, error=PromptError)
    chosen = Greedy() if decode is None else decode
    if not isinstance(chosen, Greedy | Sample | Beams):
        raise SaefeatError(
            f"run: `decode` is {decode!r}, wanted a Greedy, Sample or Beams, or None, which is"
            " greedy. Try: run(model, prompts, max_new_tokens=20, decode=Sample(0.8, seed=0))"
        )
    stops = tuple(dict.fromkeys((*_own_stops(model), *chosen.stop)))
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


def _own_stops(model: TransformersModel) -> tuple[int, ...]:
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
            raise SaefeatError(
                f"run: `num_beams` is {settings.beams}, with {step!r}, wanted no Resample where"
                " beams are searched. Likely cause: it draws for each prompt, and beams change"
                " places between passes. Try: no num_beams, or activations of your own, [prompts,"
                " k]"
            )
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
