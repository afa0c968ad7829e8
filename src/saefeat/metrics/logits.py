"""Metrics of the last token's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import PromptError, SaefeatError
from .base import (
    BaselineTop,
    Metric,
    PerPrompt,
    Reader,
    Seen,
    TokenSpec,
    real,
    same_count,
)


def logit_diff(positive: TokenSpec, negative: TokenSpec) -> Metric:
    """logit(positive) − logit(negative) at each prompt's last token.

    A list stands for a group: its logits are joined by log-sum-exp, so that the difference is the
    log-odds of one group against the other, which is the plain difference for single tokens.

    Args:
        positive: a token id, a string that is one token, a list of these, ``PerPrompt`` of any
            of these, or ``BASELINE_TOP``.
        negative: likewise.

    Returns:
        A metric.

    Raises:
        PromptError: when bound, for a string that is not one token.

    Examples:
        >>> sf.logit_diff([0, 1], 2)
        logit_diff([0, 1], 2)
    """
    name = f"logit_diff({positive!r}, {negative!r})"

    def reader(tokenizer: Any) -> Reader:
        up, down = _group(tokenizer, positive), _group(tokenizer, negative)
        return lambda seen: _joined(seen, up) - _joined(seen, down)

    count = same_count("logit_diff", positive, negative)
    return Metric(name, reader, prompts=count, baseline_top=_has_top(positive, negative))


def logit(token: TokenSpec) -> Metric:
    """The logit of a token (or the log-sum-exp of several) at each prompt's last token.

    Args:
        token: as in ``logit_diff``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> logits = sf.run(tiny.model("chat"), ["hello"]).logits
        >>> value = sf.metrics.measure(tiny.model("chat"), ["hello"], sf.metrics.logit(5))
        >>> torch.allclose(value, logits[:, 5], atol=1e-4)
        True
    """

    def reader(tokenizer: Any) -> Reader:
        group = _group(tokenizer, token)
        return lambda seen: _joined(seen, group)

    count = same_count("logit", token)
    return Metric(f"logit({token!r})", reader, prompts=count, baseline_top=_has_top(token))


def custom(
    function: Callable[..., Tensor], name: str = "metric", *, tokens: str = "last"
) -> Metric:
    """Any differentiable function of the logits, one number a prompt.

    Args:
        function: [b, vocabulary] → [b]; with ``tokens="all"`` it is given logits
            [b, t, vocabulary] and the mask of real tokens [b, t], padding on the left. A sum over
            prompts would mix them.
        name: how it prints.
        tokens: ``"last"``, so that no other logits are computed, or ``"all"``.

    Raises:
        SaefeatError: for other ``tokens``.

    Examples:
        >>> sf.metrics.custom(lambda logits: logits.logsumexp(-1), "mass")
        mass
    """
    if tokens not in ("last", "all"):
        raise SaefeatError(
            f'metrics.custom: `tokens` is {tokens!r}, wanted "last" or "all". Try: metric(lambda'
            ' logits, mask: ..., tokens="all")'
        )
    if tokens == "all":
        return Metric(name, lambda _: lambda seen: function(seen.logits, real(seen)), "all")
    return Metric(name, lambda _: lambda seen: function(seen.logits[:, -1]))


def _has_top(*specs: Any) -> bool:
    """Whether ``BASELINE_TOP`` is among these, or among their values by prompt."""
    listed = [one for s in specs for one in (s.values if isinstance(s, PerPrompt) else (s,))]
    return any(isinstance(one, BaselineTop) for one in listed)


def _group(tokenizer: Any, spec: Any) -> Any:
    """Ids [n]; None for the baseline's own token; a list for values that differ by prompt."""
    if isinstance(spec, BaselineTop):
        return None
    if isinstance(spec, PerPrompt):
        return [_group(tokenizer, value) for value in spec.values]
    listed = [spec] if isinstance(spec, (str, int)) else list(spec)
    return torch.tensor([_token(tokenizer, one) for one in listed])


def _token(tokenizer: Any, token: str | int) -> int:
    if isinstance(token, int):
        return token
    ids = [] if tokenizer is None else tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None):
        return ids[0]
    raise PromptError(
        f"metric: `token` is {token!r}, which is {len(ids)} tokens, wanted one known token. Likely"
        " cause: a leading space is part of many tokens, and long words are several. Try:"
        f" logit_diff({' ' + token!r}, ...), or pass ids"
    )


def _joined(seen: Seen, group: Any) -> Tensor:
    """[b]: log-sum-exp over the group at the last token, in at least float32."""
    logits = seen.logits[:, -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if isinstance(group, list):  # values that differ by prompt: row by row
        chosen = [group[number] for number in seen.numbers.tolist()]
        rows = [
            _chosen(logits[n : n + 1], None if seen.top is None else seen.top[n : n + 1], one)
            for n, one in enumerate(chosen)
        ]
        return torch.cat(rows)
    return _chosen(logits, seen.top, group)


def _chosen(logits: Tensor, top: Any, group: Tensor | None) -> Tensor:
    if group is None and top is None:
        raise SaefeatError(
            "metric: `token` is BASELINE_TOP, wanted a token, where no baseline is run. Likely"
            " cause: a metric of the baseline's own token inside a trace. Try: attribute(model,"
            " prompts), outside the trace"
        )
    if group is None:
        return logits.gather(1, top[:, None].to(logits.device)).squeeze(1)
    outside = [int(token) for token in group if not 0 <= token < logits.shape[1]]
    if outside:
        raise PromptError(
            f"metric: `token` is {outside[0]}, wanted an id in 0..{logits.shape[1] - 1}. Likely"
            " cause: an id of another model's vocabulary, or one counted from the end. Try:"
            ' logit_diff("Here", "I") with strings'
        )
    chosen = logits[:, group.to(logits.device)]
    return chosen.squeeze(1) if chosen.shape[1] == 1 else chosen.logsumexp(1)
