"""Schedule: a value that changes from one generated token to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from ..dictionaries.latents import Latents
from ..errors import LatentError
from ..kernel.values import Scheduled
from .base import Value, numbers


@final
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Schedule(Value):
    """A value that changes from one generated token to the next, for steering that decays.

    Generated token 0 is the first new token, when it is fed back; it takes the first value. Steps
    are counted in each row from the end of its own prompt. The last value is held on.

    Args:
        values: [steps], or [steps, k] with one value a latent.
        prompt: what the prompt's tokens take, a number or [k]; the first value by default, since
            the prompt's last token is what produces the first new one. To leave the prompt alone
            say so with ``where=Tokens.generated()``.

    Raises:
        LatentError: for no steps, or values that are not finite.

    Examples:
        >>> fade = sf.values.Schedule([8.0, 4.0, 2.0, 0.0])
        >>> sf.Clamp(sf.Direction(torch.ones(8), site="resid_post.1"), add=fade)
        Clamp(Latents(1: resid_post.1 [0]), add=Schedule([8.0, 4.0, 2.0, 0.0]))
    """

    values: Tensor
    prompt: Tensor | None

    def __init__(
        self,
        values: Sequence[Any] | Tensor,
        *,
        prompt: float | Sequence[float] | Tensor | None = None,
    ) -> None:
        steps = numbers("Schedule", "values", values, (1, 2))
        told = None if prompt is None else numbers("Schedule", "prompt", prompt, (0, 1))
        object.__setattr__(self, "values", steps)
        object.__setattr__(self, "prompt", told)

    def check(self, where: str, parameter: str, latents: Latents) -> None:
        for name, least, tensor in (("values", 2, self.values), ("prompt", 1, self.prompt)):
            if tensor is not None and tensor.ndim >= least and tensor.shape[-1] != len(latents):
                raise LatentError(
                    f"{where}: `{parameter}` is a Schedule whose {name} are for {tensor.shape[-1]}"
                    f" latents, wanted for {len(latents)}, in the order of the selection. Likely"
                    " cause: values made for another selection. Try: Schedule([8.0, 4.0, 0.0]), the"
                    " same for all latents"
                )

    def plain(self, latents: Latents, span: slice, rows: slice | Tensor) -> Scheduled:
        values, told = self.values, self.values[0] if self.prompt is None else self.prompt
        values = values[:, span] if values.ndim == 2 else values[:, None]
        told = told[span] if told.ndim == 1 else told[None]
        return Scheduled(values=values.clone(), prompt=told.clone())

    def __repr__(self) -> str:
        told = "" if self.prompt is None else f", prompt={self.prompt.tolist()!r}"
        return f"Schedule({self.values.tolist()!r}{told})"
