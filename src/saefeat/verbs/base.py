"""What an intervention is: one edit or reading, or several in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..errors import LatentError, explain
from ..kernel.program import new_log
from ..kernel.trace import inline
from ..latents import Latents
from ..records import Fired, Readings, Receipt, join_time
from ..tokens import Tokens


class Change(NamedTuple):
    """f' = clip(scale · f + shift, low, high); each number or tensor [k], k in latent order."""

    scale: Any = 1.0
    shift: Any = 0.0
    low: Any = None
    high: Any = None
    active_only: bool = False

    def take(self, start: int, stop: int) -> dict[str, Any]:
        """The kernel's plain form for latents start..stop-1."""
        return {
            name: value[start:stop].clone() if isinstance(value, Tensor) else value
            for name, value in self._asdict().items()
        }


class Intervention(ABC):
    """An edit, a reading, or several of them in order: what every way of running takes.

    Interventions are immutable and hold no results, so one object can be used in a trace, in
    a generation, as an edited model, on a plain Hugging Face model, and again.

    Example:
        >>> v = sf.Direction(torch.ones(8), site="resid_post.1")
        >>> sf.Ablate(v) | sf.Probe(v)
        Ablate(Latents(1: resid_post.1 [0])) | Probe(Latents(1: resid_post.1 [0]))
    """

    @abstractmethod
    def parts(self) -> tuple[Step, ...]:
        """The single steps, in order."""

    def __or__(self, other: Intervention) -> Chain:
        return Chain((*self.parts(), *other.parts()))

    def __call__(self, model: Any, *, step: int | None = None) -> dict[str, Any]:
        """Apply inside an nnsight block, to the forward pass of a trace or to all of a generation.

        Call it before reading any layer. In a loop over ``tracer.iter`` pass the loop's number as
        ``step``, so that only that pass is edited. The block's later reads see the edit; in a
        generation, put them in a block of their own (``tracer.invoke()``).

        Args:
            model: the nnsight model being traced.
            step: which forward pass of a generation this is, if the block loops over them.

        Returns:
            A plain log, to be kept with ``nnsight.save`` and read with ``readings`` and ``receipt``.

        Raises:
            SiteError, ModelError: if the model lacks a site, or is in train mode with dropout.
        """
        from .lower import lower

        log = new_log()
        inline(model, lower(self, model), log, step)
        return log

    def readings(self, log: dict[str, Any]) -> tuple[Readings, ...]:
        """What each ``Probe`` of this intervention read, in order."""
        found = []
        for step, numbers in numbered(self):
            if step.change is None:
                values = [join_time(log["readings"][n]) for n in numbers]
                masks = [
                    join_time(log["masks"][n]).unsqueeze(-1).expand_as(v)
                    for n, v in zip(numbers, values, strict=True)
                ]
                found.append(Readings(step.latents, torch.cat(values, -1), torch.cat(masks, -1)))
        return tuple(found)

    def receipt(self, log: dict[str, Any]) -> Receipt:
        """How often each edit acted."""
        rows = []
        for step, numbers in numbered(self):
            if step.change is not None:
                counts = [torch.stack(log["fired"].get(n) or [torch.zeros(3)]) for n in numbers]
                total = torch.stack([c.to("cpu", torch.float64).sum(0) for c in counts])
                largest = max(float(c[:, 2].max()) for c in counts)
                rows.append(
                    Fired(repr(step), int(total[:, 0].max()), int(total[:, 1].sum()), largest)
                )
        return Receipt(tuple(rows), passes=log["passes"])


@dataclass(frozen=True)
class Step(Intervention):
    """One verb on one selection. Subclasses are ``Ablate``, ``Clamp`` and ``Probe``."""

    latents: Latents

    @property
    @abstractmethod
    def change(self) -> Change | None:
        """How f becomes f', or None for a reading."""

    @property
    @abstractmethod
    def rule(self) -> Tokens | None:
        """Where it acts; None means every real token the dictionary was trained on."""

    def parts(self) -> tuple[Step, ...]:
        return (self,)


@final
@dataclass(frozen=True)
class Chain(Intervention):
    """Several steps in order; at one site the second reads what the first left.

    Example:
        >>> len(sf.Chain(()).parts())
        0
    """

    steps: tuple[Step, ...]

    def parts(self) -> tuple[Step, ...]:
        return self.steps

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.steps)) or "Chain(())"


def numbered(intervention: Intervention) -> Iterator[tuple[Step, list[int]]]:
    """Each step with the numbers its dictionaries have in a lowered program."""
    number = 0
    for step in intervention.parts():
        count = len(step.latents.parts)
        yield step, list(range(number, number + count))
        number += count


def per_latent(where: str, parameter: str, value: Any, latents: Latents) -> float | Tensor | None:
    """A finite number, or a tensor [k] with one value a latent.

    Raises:
        LatentError: for another length, or a value that is not finite.
    """
    if value is None or isinstance(value, (int, float)):
        number = torch.tensor(0.0 if value is None else float(value))
    else:
        value = number = torch.as_tensor(value)
    if bool(torch.isfinite(number).all()) and number.shape in ((), (len(latents),)):
        return float(number) if isinstance(value, Tensor) and value.ndim == 0 else value
    raise LatentError(
        explain(
            where,
            parameter,
            got=f"of shape {tuple(number.shape)} with finite={bool(torch.isfinite(number).all())}",
            wanted=f"a finite number, or one for each of the {len(latents)} latents",
            cause="values made for another selection",
            call=f"{where}(latents, torch.tensor([...]))",
        )
    )
