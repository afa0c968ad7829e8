"""Schedule: a value that changes from one generated token to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, final

from torch import Tensor

from ..arguments import checked
from ..dictionaries.latents import Latents
from ..errors import LatentError
from ..kernel.values import Scheduled
from .base import Value, numbers
from .declared import argument


def _steps(given: Sequence[Any] | Tensor, function: str = "Schedule") -> Tensor:
    return numbers(function, "values", given, (1, 2))


def _prompt(
    given: float | Sequence[float] | Tensor | None, function: str = "Schedule"
) -> Tensor | None:
    return None if given is None else numbers(function, "prompt", given, (0, 1))


@checked(error=LatentError)
@final
@dataclass(frozen=True, repr=False, eq=False)
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

    values: Tensor = argument(converter=_steps)
    _: KW_ONLY
    prompt: Tensor | None = argument(converter=_prompt, default=None)

    def check(self, function: str, parameter: str, latents: Latents) -> None:
        for name, least, tensor in (("values", 2, self.values), ("prompt", 1, self.prompt)):
            if tensor is not None and tensor.ndim >= least and tensor.shape[-1] != len(latents):
                raise LatentError(
                    f"{function}: `{parameter}` is a Schedule whose {name} are for"
                    f" {tensor.shape[-1]} latents, wanted for {len(latents)}, in the order of the"
                    " selection. Likely cause: values made for another selection. Try:"
                    " Schedule([8.0, 4.0, 0.0]), the same for all latents"
                )

    def plain(self, latents: Latents, span: slice, rows: slice | Tensor) -> Scheduled:
        values, prompt = self.values, self.values[0] if self.prompt is None else self.prompt
        values = values[:, span] if values.ndim == 2 else values[:, None]
        prompt = prompt[span] if prompt.ndim == 1 else prompt[None]
        return Scheduled(values=values.clone(), prompt=prompt.clone())
