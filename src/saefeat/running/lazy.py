"""Prompts that are encoded a batch at a time, when it is their turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from ..errors import PromptError
from ..text.prompts import encode_prompts, split


def encoded_batches(tokenizer: Any, prompts: Any, size: int) -> Iterator[dict[str, Tensor]]:
    """``input_ids`` and ``attention_mask`` [at most size, tokens], batch after batch.

    Raises:
        PromptError: when a bad prompt's turn comes, with the numbers of its batch.
    """
    single = isinstance(prompts, str | Mapping | Tensor)
    listed = isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], int | Mapping)
    if single or listed:  # one prompt, or tensors: nothing to be lazy about
        yield from split(encode_prompts(tokenizer, prompts), size)
        return
    if not isinstance(prompts, Iterable):
        encode_prompts(tokenizer, prompts)  # says what it is
    rest, count = iter(prompts), 0
    while chunk := list(islice(rest, size)):
        try:
            yield encode_prompts(tokenizer, [_single(prompt) for prompt in chunk])
        except PromptError as error:
            raise PromptError(f"prompts {count}..{count + len(chunk) - 1}: {error}") from error
        count += len(chunk)
    if not count:
        encode_prompts(tokenizer, [])


def _single(prompt: Any) -> Any:
    """One prompt of many: a number would be taken for a token of one prompt."""
    if not isinstance(prompt, int):
        return prompt
    raise PromptError(
        "run: `prompts` is an iterable of numbers, wanted strings, chats or lists of token ids."
        " Likely cause: one prompt's ids without a list around them. Try: run(model, [ids], ...,"
        " stream=True)"
    )
