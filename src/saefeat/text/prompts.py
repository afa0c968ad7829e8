"""Prompts: strings, chats or tokens, made into one left-padded batch.

Two traps are closed here. A chat template already holds BOS, and tokenizing its text again adds a
second one; and a batch padded on the right puts the last real token in another column each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..errors import PromptError

Prompts = str | Tensor | Mapping[str, Tensor] | Sequence[Any]
"""A string, chat messages, a list of either, a list of id lists, or tensors already batched."""


def encode_prompts(tokenizer: Any, prompts: Prompts) -> dict[str, Tensor]:
    """Tokenize prompts into ``input_ids`` and ``attention_mask`` [batch, tokens], left-padded.

    Args:
        tokenizer: a Hugging Face tokenizer; may be None if prompts are tensors.
        prompts: a string; a chat (a list of ``{"role", "content"}``); a list of strings, chats or
            id lists; a LongTensor [batch, tokens]; or a mapping with ``input_ids``.

    Raises:
        PromptError: for no prompts, an empty one, no known kind, or a missing tokenizer.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model, tokenizer = tiny.load("chat")
        >>> chat = [{"role": "user", "content": "hello"}]
        >>> batch = sf.text.prompts.encode_prompts(tokenizer, [chat, chat])
        >>> batch["input_ids"].shape == batch["attention_mask"].shape
        True
    """
    if isinstance(prompts, Mapping):
        ids, mask = prompts.get("input_ids"), prompts.get("attention_mask")
        if isinstance(ids, Tensor) and (mask is None or isinstance(mask, Tensor)):
            return _tensors(ids, mask)
        raise _unknown(prompts)
    if isinstance(prompts, Tensor):
        _require_unpadded(tokenizer, prompts)
        return _tensors(prompts, None)
    rows = [_row(tokenizer, prompt) for prompt in _listed(prompts)]
    width = max(len(row) for row in rows)
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = pad if pad is not None else getattr(tokenizer, "eos_token_id", None) or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


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


def split(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Cut a batch into smaller ones of at most ``size`` rows, dropping columns that are all pad."""
    pieces = []
    for start in range(0, len(batch["input_ids"]), size):
        ids = batch["input_ids"][start : start + size]
        mask = batch["attention_mask"][start : start + size]
        first = int((mask.sum(0) == 0).long().argmin()) if len(mask) else 0
        pieces.append({"input_ids": ids[:, first:], "attention_mask": mask[:, first:]})
    return pieces


def _listed(prompts: object) -> list[Any]:
    """A list of single prompts, whatever came."""
    if isinstance(prompts, str) or _is_chat(prompts):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise _unknown(prompts)
    listed = list(prompts)
    if listed and all(isinstance(token, int) for token in listed):
        return [listed]
    if not listed:
        raise PromptError(
            "prompts: `prompts` is an empty list, wanted at least one prompt. Likely cause: a"
            ' filter that kept nothing. Try: run(model, ["Hello"], ...)'
        )
    return listed


def _row(tokenizer: Any, prompt: Any) -> list[int]:
    """One prompt's ids, with exactly the special tokens it should have."""
    if not isinstance(prompt, str) and not _is_chat(prompt):
        listed = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if not isinstance(listed, Sequence) or not all(type(token) is int for token in listed):
            raise _unknown(prompt)
        ids = list(listed)
    elif tokenizer is None:
        raise PromptError(
            "prompts: `prompts` is text, but the model has no tokenizer, wanted token ids, or a"
            " model with its tokenizer. Likely cause: an in-memory module wrapped without"
            " tokenizer=. Try: TransformersModel(module, tokenizer=tokenizer,"
            " task='text-generation')"
        )
    elif _is_chat(prompt):
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        bos = getattr(tokenizer, "bos_token", None)
        doubled = bool(bos) and prompt.startswith(bos)  # a rendered chat template
        ids = tokenizer(prompt, add_special_tokens=not doubled)["input_ids"]
    if ids:
        return ids
    raise PromptError(
        f"prompts: `prompts` is {prompt!r}, which has no tokens, wanted at least one token. Likely"
        " cause: an empty string and a tokenizer that adds no BOS. Try: drop empty prompts first"
    )


def _require_unpadded(tokenizer: Any, ids: Tensor) -> None:
    """Padding that no mask marks would be read as text."""
    pad, bos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos"))
    if (
        pad is not None
        and pad != bos
        and ids.ndim == 2
        and ids.numel()
        and bool((ids[:, 0] == pad).any())
    ):
        raise PromptError(
            "prompts: `input_ids` is padded, without an attention mask, wanted ids with their mask."
            " Likely cause: tokenizer(...)['input_ids'] taken alone. Try: tokenizer(texts,"
            ' return_tensors="pt", padding=True), passed whole'
        )


def _unknown(prompt: object) -> PromptError:
    return PromptError(
        f"prompts: `prompts` is {prompt!r:.80}, wanted a string, a chat, a list of either, ids, or"
        " tensors with input_ids. Likely cause: kinds mixed in one list, or lists where tensors"
        ' belong. Try: tokenizer(texts, return_tensors="pt", padding=True)'
    )


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(turn, Mapping) and "role" in turn for turn in prompt)
    )


def _tensors(ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    mask = torch.ones_like(ids) if mask is None else mask
    if ids.ndim == 2 and ids.numel() and mask.shape == ids.shape:
        if bool((mask[:, -1] == 0).any()):
            raise PromptError(
                "prompts: `attention_mask` is padded on the right, wanted padding on the left."
                " Likely cause: a tokenizer with padding_side='right'. Try: tokenizer.padding_side"
                " = 'left', then tokenize again"
            )
        return {"input_ids": ids, "attention_mask": mask}
    raise PromptError(
        f"prompts: `input_ids` is of shape {tuple(ids.shape)} with a mask of {tuple(mask.shape)},"
        " wanted [batch, tokens], not empty, with a mask of the same shape. Likely cause: one row"
        " without its batch dimension. Try: ids.unsqueeze(0)"
    )
