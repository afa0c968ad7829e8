"""Roles."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from ..errors import PromptError


def role_markers(tokenizer: Any, role: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that open a role's turn in the tokenizer's chat template, and those that end it.

    Raises:
        PromptError: without a chat template, or for a role it does not know.
    """
    if tokenizer is None:
        raise PromptError(
            f"Tokens.role: `role` is {role!r} on a model without its tokenizer, wanted a model that"
            " knows its chat template. Likely cause: a plain Hugging Face module, which has none."
            " Try: nnsight.TransformersModel(model, tokenizer=tokenizer)"
        )
    mark, asked = "MARK", {"role": "user", "content": "ASKED"}
    turns = {"user": [], "assistant": [asked], "system": []}.get(role, [asked])
    tail = [asked] if role == "system" else []
    try:
        text = tokenizer.apply_chat_template(
            [*turns, {"role": role, "content": mark}, *tail], tokenize=False
        )
        bare = tokenizer.apply_chat_template([asked], tokenize=False)
        opened = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
    except (AttributeError, TypeError, ValueError, TemplateError) as error:
        raise PromptError(
            f"Tokens.role: `role` is {role!r}, which cannot be rendered ({error}), wanted a role of"
            " the tokenizer's chat template. Likely cause: a base model without a template, or a"
            " template without this role. Try: Tokens.ids(...) or Tokens.where(...) for texts that"
            " are not chats"
        ) from error
    before, after = text.split(mark)
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (before, after, opened)]
    header = ids[2][len(tokenizer(bare, add_special_tokens=False)["input_ids"])]
    start = len(ids[0]) - 1 - ids[0][::-1].index(header)  # skips BOS and a default system block
    return tuple(ids[0][start:]), tuple(ids[1][:1])
