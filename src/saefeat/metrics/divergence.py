"""How far a run has gone from another: KL of the next token's distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from ..errors import SaefeatError
from .base import Metric, Seen


@checked
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
        SaefeatError: for another ``to``, probabilities, NaN, or a row without a finite number;
            when it is read, for logits of another vocabulary.

    Examples:
        >>> sf.metrics.kl()
        kl('clean')
    """
    given = _reference(to) if isinstance(to, Tensor) else None
    if given is None and to not in ("clean", "baseline"):
        raise SaefeatError(
            f'kl: `to` is {to!r}, wanted "clean", "baseline", or logits [vocabulary] or [prompts,'
            ' vocabulary]. Try: kl("clean")'
        )
    each = given is not None and given.ndim == 2

    def read(seen: Seen) -> Tensor:
        reference = seen.clean if isinstance(to, str) and to == "clean" else seen.base
        if given is not None:
            reference = given[seen.numbers] if each else given
        assert reference is not None
        return _divergence(reference, seen.logits[:, -1])

    return Metric(
        f"kl({to!r})" if given is None else f"kl({list(given.shape)})",
        lambda _: read,
        prompts=len(given) if given is not None and each else None,
        reference=to if isinstance(to, str) else None,
        apart=True,
    )


def _reference(to: Tensor) -> Tensor:
    """Logits to compare with, of which every row says a distribution."""
    shaped = to.is_floating_point() and to.ndim in (1, 2) and to.numel() > 0
    if not shaped:
        raise SaefeatError(
            f'kl: `to` is of shape {tuple(to.shape)} and {to.dtype}, wanted "clean", "baseline", or'
            " logits [vocabulary] or [prompts, vocabulary]. Likely cause: a token id, or logits of"
            ' every position. Try: kl("clean")'
        )
    given = to.detach()
    known = ~(given.isnan() | given.isposinf()) & given.isfinite().any(-1, keepdim=True)
    if not bool(known.all()):  # -inf is a token that cannot come
        row = int((~known).any(-1).nonzero()[0]) if given.ndim == 2 else 0
        raise SaefeatError(
            f"kl: `to` is no distribution in row {row}, wanted logits without NaN and +inf, of"
            " which one at least is finite. Likely cause: the log of zero, or a model that"
            ' overflows. Try: kl("clean")'
        )
    wide = given.double()
    if bool(((wide >= 0).all(-1) & ((wide.sum(-1) - 1).abs() < 1e-3)).all()):
        raise SaefeatError(
            "kl: `to` is probabilities, by their sum of 1, wanted logits or log-probabilities."
            " Likely cause: a softmax. Try: kl(probabilities.log())"
        )
    return given


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """[b]: KL of these logits [b, vocabulary] from a reference [vocabulary] or [b, vocabulary]."""
    if reference.shape[-1] != logits.shape[-1]:
        raise SaefeatError(
            f"kl: `to` is of {reference.shape[-1]} tokens, wanted the model's {logits.shape[-1]}."
            ' Likely cause: logits of another model. Try: kl("clean"), or logits of this model'
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wanted = reference.detach().to(logits.device, dtype).log_softmax(-1)
    part = wanted.exp() * (wanted - logits.to(dtype).log_softmax(-1))
    # What cannot come counts nothing, though its logarithm is infinite.
    return torch.where(wanted.isneginf(), 0.0, part).sum(-1)
