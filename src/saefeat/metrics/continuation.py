"""log_prob: the log-probability of what follows each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PromptError
from .base import Metric, PerPrompt, Reader, Seen


def log_prob(continuation: str | Sequence[int] | PerPrompt) -> Metric:
    """The log-probability that the prompt goes on with these tokens, summed over them.

    The model is given the prompt and the continuation behind it (but for its last token, which
    predicts nothing that is wanted). Token rules see it as generated text: ``Tokens.prompt()`` and
    ``last(n)`` mean the prompt. Unless ``where=`` says otherwise only prompt tokens are scored,
    since latents at the continuation's own tokens answer what was already given.

    Args:
        continuation: text, tokenized without special tokens; token ids; or ``PerPrompt`` of
            either, of any lengths. Where a tokenizer treats the start of a text specially, pass
            ids.

    Returns:
        A metric, in nats.

    Raises:
        PromptError: when bound, for a continuation without tokens.

    Examples:
        >>> sf.metrics.log_prob([5, 9, 4])
        log_prob([5, 9, 4])
    """
    each = continuation.values if isinstance(continuation, PerPrompt) else (continuation,)

    def ids(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
        return tuple(_ids(tokenizer, one) for one in each)

    def reader(tokenizer: Any) -> Reader:
        table = ids(tokenizer)
        return lambda seen: _summed(seen, table)

    return Metric(
        f"log_prob({continuation!r})",
        reader,
        columns="continuation",
        continuation=ids,
        prompts=len(each) if isinstance(continuation, PerPrompt) else None,
    )


def _ids(tokenizer: Any, text: Any) -> tuple[int, ...]:
    """A continuation's ids."""
    if isinstance(text, str) and tokenizer is not None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = [] if isinstance(text, (str, int)) else list(text)
    if ids and all(type(token) is int for token in ids):
        return tuple(ids)
    raise PromptError(
        f"log_prob: `continuation` is {text!r:.80}, which is not a sequence of tokens, wanted text,"
        " or token ids. Likely cause: an empty text, a single id, or text for a model without its"
        ' tokenizer. Try: log_prob(" I cannot"), or PerPrompt([...]) for one a prompt'
    )


def _summed(seen: Seen, table: tuple[tuple[int, ...], ...]) -> Tensor:
    """[b]: a row ends with its continuation, less the last token, so targets count from the end."""
    logits = seen.logits.to(torch.promote_types(seen.logits.dtype, torch.float32))
    rows = []
    for row, number in enumerate(seen.numbers.tolist()):
        ids = torch.tensor(table[number if len(table) > 1 else 0], device=logits.device)
        if not 0 <= int(ids.min()) <= int(ids.max()) < logits.shape[-1]:
            raise PromptError(
                f"log_prob: `continuation` is {ids.tolist()}, wanted ids in"
                f" 0..{logits.shape[-1] - 1}. Likely cause: ids of another model's vocabulary. Try:"
                " log_prob(tokenizer(text, add_special_tokens=False)['input_ids'])"
            )
        log_probs = logits[row, -len(ids) :].log_softmax(-1)  # [c, vocabulary]
        rows.append(log_probs.gather(1, ids[:, None]).sum())
    return torch.stack(rows)
