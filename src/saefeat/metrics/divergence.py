"""kl: how far a run's next-token distribution is from another's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SaefeatError
from .base import Metric, Seen


def kl(to: str | Tensor = "clean") -> Metric:
    """KL(reference ‖ this run) of the next token's distribution: how far a run has gone from it.

    Against the clean run it is zero there and so is its gradient: use IG, or exact ablations. AtP,
    which looks at that one point, is refused.

    Args:
        to: ``"clean"``, ``"baseline"``, or logits or log-probabilities [vocabulary] or
            [prompts, vocabulary].

    Returns:
        A metric, in nats.

    Raises:
        SaefeatError: for another ``to``.

    Examples:
        >>> sf.metrics.kl()
        kl('clean')
    """
    if isinstance(to, Tensor):
        given: Tensor = to.detach()
        shaped = given.is_floating_point() and given.ndim in (1, 2)
        name = f"kl({list(given.shape)})"
    else:
        given, shaped, name = torch.zeros(0), to in ("clean", "baseline"), f"kl({to!r})"
    if not shaped:
        got = f"of shape {tuple(to.shape)}" if isinstance(to, Tensor) else repr(to)
        raise SaefeatError(
            f'kl: `to` is {got}, wanted "clean", "baseline", or logits [vocabulary] or [prompts,'
            ' vocabulary]. Likely cause: a token id, or logits of every position. Try: kl("clean")'
        )

    def read(seen: Seen) -> Tensor:
        reference = seen.clean if isinstance(to, str) and to == "clean" else seen.base
        if isinstance(to, Tensor):
            reference = given if given.ndim == 1 else given[seen.numbers]
        assert reference is not None
        return _divergence(reference, seen.logits[:, -1])

    count = len(to) if isinstance(to, Tensor) and to.ndim == 2 else None
    return Metric(
        name, lambda _: read, prompts=count, reference=to if isinstance(to, str) else None
    )


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """[b]: KL of the first distribution from the second, in at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wanted = reference.detach().to(logits.device, dtype).log_softmax(-1)
    log_probs = logits.to(dtype).log_softmax(-1)
    return (wanted.exp() * (wanted - log_probs)).sum(-1)
