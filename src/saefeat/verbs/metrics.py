"""What to attribute: one number a prompt, from the logits after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..errors import PromptError, explain


@final
class BaselineTop:
    """Each prompt's most likely next token under the baseline run, in place of a token.

    The refusal paper's metric: the logit of what the steered run would say, minus that of the
    refusal it replaces. Where both are one token the metric is zero for that prompt, which
    ``Attribution.degenerate`` reports.

    Examples:
        >>> sf.logit_diff(sf.BASELINE_TOP, 7)
        logit_diff(BASELINE_TOP, 7)
    """

    def __repr__(self) -> str:
        return "BASELINE_TOP"


BASELINE_TOP = BaselineTop()

TokenSpec = str | int | BaselineTop | Sequence[str | int]
Scorer = Callable[[Tensor, Tensor], Tensor]
"""``scorer(logits [b, vocabulary], top [b]) -> [b]``; ``top`` is the baseline run's argmax."""


@final
@dataclass(frozen=True)
class Metric:
    """A named scalar per prompt; ``bind`` resolves its tokens for one tokenizer.

    Build one with ``logit_diff``, ``logit`` or ``metric``.

    Examples:
        >>> sf.logit_diff(5, 7)
        logit_diff(5, 7)
    """

    name: str
    bind: Callable[[Any], Scorer]

    def __repr__(self) -> str:
        return self.name


def logit_diff(positive: TokenSpec, negative: TokenSpec) -> Metric:
    """logit(positive) − logit(negative) at each prompt's last token.

    A list stands for a group: its logits are joined by log-sum-exp, so that the difference is the
    log-odds of one group against the other, which is the plain difference for single tokens.

    Args:
        positive: a token id, a string that is one token, a list of these, or ``BASELINE_TOP``.
        negative: likewise.

    Returns:
        A metric.

    Raises:
        PromptError: when bound, for a string that is not one token.

    Examples:
        >>> scorer = sf.logit_diff([0, 1], 2).bind(None)
        >>> scorer(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
        tensor([0.6931, 0.6931])
    """

    def bind(tokenizer: Any) -> Scorer:
        up, down = _group(tokenizer, positive), _group(tokenizer, negative)
        return lambda logits, top: _joined(logits, top, up) - _joined(logits, top, down)

    return Metric(f"logit_diff({positive!r}, {negative!r})", bind)


def logit(token: TokenSpec) -> Metric:
    """The logit of a token (or the log-sum-exp of several) at each prompt's last token.

    Args:
        token: as in ``logit_diff``.

    Examples:
        >>> sf.logit(2).bind(None)(torch.arange(4.0)[None], torch.zeros(1, dtype=torch.long))
        tensor([2.])
    """

    def bind(tokenizer: Any) -> Scorer:
        group = _group(tokenizer, token)
        return lambda logits, top: _joined(logits, top, group)

    return Metric(f"logit({token!r})", bind)


def metric(function: Callable[[Tensor], Tensor], name: str = "metric") -> Metric:
    """Any differentiable function of the last logits, [b, vocabulary] → [b].

    Args:
        function: one number a prompt; a sum over prompts would mix them.
        name: how it prints.

    Examples:
        >>> sf.metric(lambda logits: logits.logsumexp(-1), "mass")
        mass
    """
    return Metric(name, lambda tokenizer: lambda logits, top: function(logits))


def _group(tokenizer: Any, spec: TokenSpec) -> Tensor | None:
    """Ids [n], or None for the baseline's own token."""
    if isinstance(spec, BaselineTop):
        return None
    listed = [spec] if isinstance(spec, (str, int)) else list(spec)
    return torch.tensor([_token(tokenizer, one) for one in listed])


def _token(tokenizer: Any, token: str | int) -> int:
    if isinstance(token, int):
        return token
    ids = [] if tokenizer is None else tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None):
        return ids[0]
    raise PromptError(
        explain(
            "metric",
            "token",
            got=f"{token!r}, which is {len(ids)} tokens",
            wanted="one known token",
            cause="a leading space is part of many tokens, and long words are several",
            call=f"logit_diff({' ' + token!r}, ...), or pass ids",
        )
    )


def _joined(logits: Tensor, top: Tensor, group: Tensor | None) -> Tensor:
    """[b]: log-sum-exp over the group, in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if group is None:
        return logits.gather(1, top[:, None]).squeeze(1)
    outside = [int(token) for token in group if not 0 <= token < logits.shape[1]]
    if outside:
        raise PromptError(
            explain(
                "metric",
                "token",
                got=outside[0],
                wanted=f"an id in 0..{logits.shape[1] - 1}",
                cause="an id of another model's vocabulary, or one counted from the end",
                call='logit_diff("Here", "I") with strings',
            )
        )
    chosen = logits[:, group.to(logits.device)]
    return chosen.squeeze(1) if chosen.shape[1] == 1 else chosen.logsumexp(1)
