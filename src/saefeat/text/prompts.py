"""Prompts: strings, chats or tokens, made into one left-padded batch.

One gate for every form, so that what is refused in one form is refused in all. Its traps: a chat
template already holds BOS, and tokenizing its text again adds a second one; some tokenizers end
every text with EOS, and what is read or generated then comes behind the end; pads without a mask
are read as text; a batch padded on the right has its last real token in another column each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PromptError
from .chats import chat_ids, is_chat
from .limits import Limits, limits_of, require_fits
from .padding import left_padded, masked, pad_of, require_unpadded

Prompts = str | Tensor | Mapping[str, Tensor] | Sequence[Any]
"""A string, chat messages, a list of either, a list of id lists, or tensors already batched."""

Batch = dict[str, Tensor]

_HARMLESS = {
    "length", "num_truncated_tokens", "offset_mapping", "overflow_to_sample_mapping",
    "overflowing_tokens", "special_tokens_mask",
}  # fmt: skip
"""What a tokenizer reports about ids, and no model reads."""


def encode_for(model: Any, prompts: Prompts, new: int = 0) -> Batch:
    """``encode_prompts`` with a model's tokenizer, held against what the model can read.

    Args:
        model: an nnsight ``TransformersModel``, loaded or not.
        prompts: as in ``encode_prompts``.
        new: how many tokens are to be generated behind each.
    """
    return encode_prompts(getattr(model, "tokenizer", None), prompts, limits_of(model, new))


def encode_prompts(tokenizer: Any, prompts: Prompts, limits: Limits | None = None) -> Batch:
    """Tokenize prompts into ``input_ids`` and ``attention_mask`` [batch, tokens], left-padded.

    Text is a prompt, to be gone on from: an EOS that the tokenizer puts behind it by itself is left
    out, and a chat that ends with the assistant's turn is continued within that turn. Ids are taken
    as they are, or refused.

    Args:
        tokenizer: a Hugging Face tokenizer; may be None if prompts are tensors.
        prompts: a string; a chat (a list of ``{"role", "content"}``); a list of strings, chats or
            id lists; a LongTensor [batch, tokens]; or a mapping with ``input_ids``, and an
            ``attention_mask`` if it is padded.
        limits: of the model; None where there is none to compare with.

    Returns:
        int64 tensors; the mask is 1 for real tokens.

    Raises:
        PromptError: for no prompts, an empty one, no known kind, a missing tokenizer, a chat its
            template cannot render, padding without a mask, BOS twice, ids outside the vocabulary,
            or more tokens than the model has positions.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model, tokenizer = tiny.load("chat")
        >>> chat = [{"role": "user", "content": "hello"}]
        >>> batch = sf.text.prompts.encode_prompts(tokenizer, [chat, chat])
        >>> batch["input_ids"].shape == batch["attention_mask"].shape
        True
    """
    limits = limits or Limits()
    if isinstance(prompts, Tensor):
        batch = _tensors(tokenizer, prompts, None, limits)
    elif isinstance(prompts, Mapping):
        batch = _mapping(tokenizer, prompts, limits)
    else:
        batch = _listed(tokenizer, prompts, limits)
    require_fits(batch["input_ids"], batch["attention_mask"], limits)
    _require_one_bos(tokenizer, batch)
    return batch


def split(batch: Mapping[str, Tensor], size: int) -> list[Batch]:
    """Cut a batch into smaller ones of at most ``size`` rows, dropping columns that are all pad."""
    pieces = []
    for start in range(0, len(batch["input_ids"]), size):
        ids = batch["input_ids"][start : start + size]
        mask = batch["attention_mask"][start : start + size]
        first = int((mask.sum(0) == 0).long().argmin()) if len(mask) else 0
        pieces.append({"input_ids": ids[:, first:], "attention_mask": mask[:, first:]})
    return pieces


# ---------------------------------------------------------------- tensors


def _mapping(tokenizer: Any, prompts: Mapping[str, Any], limits: Limits) -> Batch:
    """What a tokenizer returned, if nothing in it would be left out in silence."""
    ids, mask = prompts.get("input_ids"), prompts.get("attention_mask")
    if not isinstance(ids, Tensor) or not (mask is None or isinstance(mask, Tensor)):
        raise _unknown(prompts)
    others = set(prompts) - {"input_ids", "attention_mask"} - _HARMLESS
    unread = sorted(str(k) for k in others if not _says_nothing(str(k), prompts[k]))
    if unread:
        raise PromptError(
            f"prompts: `prompts` is a mapping with {', '.join(unread)}, wanted input_ids and"
            " attention_mask alone. Likely cause: a processor's output, or a batch for training;"
            " the rest would be left out of the run. Try: {name: batch[name] for name in"
            ' ("input_ids", "attention_mask")}, if the run is to go without it'
        )
    return _tensors(tokenizer, ids, mask, limits)


def _says_nothing(key: str, value: Any) -> bool:
    """None, and segment ids of a single segment, which some tokenizers return for every text."""
    zeros = isinstance(value, Tensor) and not bool(value.any())
    return value is None or (zeros and key.endswith("token_type_ids"))


def _tensors(tokenizer: Any, ids: Tensor, mask: Tensor | None, limits: Limits) -> Batch:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise PromptError(
            f"prompts: `input_ids` is of {ids.dtype}, wanted integer token ids. Likely cause:"
            " embeddings, logits or a mask in place of ids. Try: ids.long(), if they are ids"
        )
    if ids.ndim != 2 or not ids.numel():
        raise PromptError(
            f"prompts: `input_ids` is of shape {tuple(ids.shape)}, wanted [batch, tokens], not"
            " empty. Likely cause: one row without its batch dimension. Try: ids.unsqueeze(0)"
        )
    ids = ids.long()
    if mask is None:
        require_unpadded(tokenizer, ids.tolist(), limits)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        batch = masked(ids, mask, pad_of(tokenizer, limits))
    _require_open(tokenizer, _rows(batch))
    return batch


def _rows(batch: Batch) -> list[list[int]]:
    """The real tokens of each row."""
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [ids[real].tolist() for ids, real in rows]


# ---------------------------------------------------------------- lists


def _listed(tokenizer: Any, prompts: object, limits: Limits) -> Batch:
    """Text, chats and rows of ids; rows of ids have no mask, as a tensor without one."""
    each = _singles(prompts)
    rows = [_row(tokenizer, prompt) for prompt in each]
    given = [row for row, prompt in zip(rows, each, strict=True) if not _is_text(prompt)]
    if given:
        require_unpadded(tokenizer, given, limits)
        _require_open(tokenizer, given)
    return left_padded(rows, pad_of(tokenizer, limits))


def _singles(prompts: object) -> list[Any]:
    """A list of single prompts, whatever came."""
    if isinstance(prompts, str) or is_chat(prompts):
        return [prompts]
    # Bytes are numbers to a loop, and a set has no order that results could be in.
    if not isinstance(prompts, Iterable) or isinstance(
        prompts, bytes | bytearray | set | frozenset
    ):
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


def _is_id(token: object) -> bool:
    """An integer that a tensor can hold; True is none."""
    return type(token) is int and -(2**63) <= token < 2**63


def _is_text(prompt: object) -> bool:
    return isinstance(prompt, str) or is_chat(prompt)


def _row(tokenizer: Any, prompt: Any) -> list[int]:
    """One prompt's ids, with exactly the special tokens it should have."""
    if not _is_text(prompt):
        listed = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if not isinstance(listed, Sequence) or not all(map(_is_id, listed)):
            raise _unknown(prompt)
        ids = list(listed)
    elif tokenizer is None:
        raise PromptError(
            "prompts: `prompts` is text, but the model has no tokenizer, wanted token ids, or a"
            " model with its tokenizer. Likely cause: an in-memory module wrapped without"
            " tokenizer=. Try: TransformersModel(module, tokenizer=tokenizer,"
            " task='text-generation')"
        )
    elif is_chat(prompt):
        ids = chat_ids(tokenizer, prompt)
    else:
        ids = _text_ids(tokenizer, prompt)
    if ids:
        return ids
    raise PromptError(
        f"prompts: `prompts` is {prompt!r}, which has no tokens, wanted at least one token. Likely"
        " cause: an empty string and a tokenizer that adds no BOS. Try: drop empty prompts first"
    )


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    """A text with the tokens its tokenizer puts before it, and without those it puts behind.

    A text that begins with BOS, blanks aside, is a rendered template, which holds all its special
    tokens: it is tokenized as it is, as ``apply_chat_template`` does.
    """
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.lstrip().startswith(bos):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids, ending = tokenizer(text)["input_ids"], _ending(tokenizer)
    return ids[: -len(ending)] if ending and ids[-len(ending) :] == ending else ids


def _ending(tokenizer: Any) -> list[int]:
    """What the tokenizer puts behind every text by itself: EOS, or nothing."""
    if tokenizer is None:
        return []
    bare, full = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for start in range(len(full) - len(bare) + 1 if bare else 0):
        if full[start : start + len(bare)] == bare:
            return full[start + len(bare) :]
    return []


def _require_open(tokenizer: Any, rows: Sequence[Sequence[int]]) -> None:
    """Refuse ids whose tokenizer has ended them: what is read or generated comes after the end."""
    ending = _ending(tokenizer)
    ended = [n for n, row in enumerate(rows) if ending and list(row[-len(ending) :]) == ending]
    if ended:
        raise PromptError(
            f"prompts: `prompts` is ids that end with {tokenizer.decode(ending)!r} in prompt"
            f" {ended[0]}, wanted prompts that can be gone on from. Likely cause: this tokenizer"
            " ends every text. Try: the texts themselves, behind which it is left out (write it at"
            " a text's end to have it read), or ids without it"
        )


def _require_one_bos(tokenizer: Any, batch: Batch) -> None:
    """Refuse a row that begins with BOS twice, blanks between them or not."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return
    first = batch["attention_mask"].argmax(1, keepdim=True)
    last = batch["input_ids"].shape[1] - 1
    heads = [batch["input_ids"].gather(1, (first + n).clamp(max=last))[:, 0] for n in range(4)]
    for row in torch.nonzero(heads[0] == bos).flatten().tolist():
        head = [int(column[row]) for column in heads][: last + 1 - int(first[row])]
        again = head.index(bos, 1) if bos in head[1:] else 0
        if again and not tokenizer.decode(head[1:again]).strip():
            raise PromptError(
                f"prompts: `prompts` is ids with BOS ({bos}) twice at the start of prompt {row},"
                " wanted it once. Likely cause: a rendered chat template, which holds BOS, was"
                " tokenized with add_special_tokens=True. Try: the chats or the rendered texts"
                " themselves, or tokenizer(texts, add_special_tokens=False, ...)"
            )


def _unknown(prompt: object) -> PromptError:
    cause = "kinds mixed in one list, or lists or arrays where tensors belong"
    call = 'tokenizer(texts, return_tensors="pt", padding=True)'
    if isinstance(prompt, Mapping) and "input_ids" not in prompt:
        cause, call = (
            "one message of a chat, or a row of a data set",
            "[message], or row['messages']",
        )
    return PromptError(
        f"prompts: `prompts` is {prompt!r:.80}, wanted a string, a chat, a list of either, ids, or"
        f" tensors with input_ids. Likely cause: {cause}. Try: {call}"
    )
