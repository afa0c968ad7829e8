"""Openings: the words that refusals and answers begin with, as tokens.

The study looks at the token behind the prompt alone, as the paper does: one forward pass gives
every prompt's number and its gradient, and the token that steering makes most likely can be held
against a refusal's. So an opening of several tokens is scored by its first one. What that costs is
never silent: openings of the two groups that begin alike are refused, and the filter counts how
often kept prompts open with a refusal's token (``filter``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import UsageError

HELP = (
    "what a refusal opens with; a phrase of several tokens is scored by its first token, since "
    "metric and steering are compared at the token behind the prompt"
)


def tokens_of(tokenizer: Any, opening: str) -> list[int]:
    """An opening's ids, without special tokens."""
    return list(tokenizer(opening, add_special_tokens=False)["input_ids"])


def first_tokens(tokenizer: Any, openings: Sequence[str], option: str) -> tuple[int, ...]:
    """The id that each opening begins with, each once, so that none counts twice in the metric.

    Raises:
        UsageError: for no openings, an empty one, or one that begins with an unknown token.
    """
    found = []
    for opening in openings:
        ids = tokens_of(tokenizer, opening)
        if not opening.strip() or not ids or ids[0] == getattr(tokenizer, "unk_token_id", None):
            raise UsageError(
                f"{option}: {opening!r} is {spelled(tokenizer, ids)}, wanted text that begins with "
                "a token the model knows. Likely cause: another model's wording. Try: the words "
                "this model's own answers begin with"
            )
        found.append(ids[0])
    if not found:
        raise UsageError(f'{option} is empty; wanted at least one opening, as {option} "I cannot"')
    return tuple(dict.fromkeys(found))


def require_apart(tokenizer: Any, refusals: Sequence[str], answers: Sequence[str]) -> None:
    """Refuse openings that the first token cannot tell apart, with their tokens.

    Raises:
        UsageError: naming a refusal and an answer that begin with the same token.
    """
    begin = {tokens_of(tokenizer, one)[0]: one for one in answers}
    for one in refusals:
        ids = tokens_of(tokenizer, one)
        other = begin.get(ids[0])
        if other is not None:
            raise UsageError(
                f"--refusal-tokens {one!r} is {spelled(tokenizer, ids)} and --answer-tokens "
                f"{other!r} is {spelled(tokenizer, tokens_of(tokenizer, other))}: both begin with "
                f"{tokenizer.decode(ids[:1])!r}, and the metric looks at the first token alone. "
                "Try: openings that differ in it, as --answer-tokens Here Sure"
            )


def shortened(tokenizer: Any, openings: Sequence[str], option: str) -> list[str]:
    """A line for each opening of which only a first part is scored."""
    each = [(one, tokens_of(tokenizer, one)) for one in openings]
    return [
        f"{option}: {one!r} is {spelled(tokenizer, ids)}, scored by its first token"
        for one, ids in each
        if len(ids) > 1
    ]


def spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as people read them: ``3 tokens ['I', "'m", ' sorry']``."""
    pieces = [tokenizer.decode([token]) for token in ids]
    return f"{len(ids)} token{'' if len(ids) == 1 else 's'} {pieces}"
