"""Padding: what a mask may say, and pads that no mask marks.

Everything after this file counts on rows of real tokens behind padding. A mask says which tokens
are real; where there is none, padding would be read as text, and only the ids can tell of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PromptError
from .limits import Limits

Rows = Sequence[Sequence[int]]


def left_padded(rows: Rows, pad: int) -> dict[str, Tensor]:
    """Rows as ``input_ids`` and ``attention_mask`` [rows, longest], int64, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def pad_of(tokenizer: Any, limits: Limits) -> int:
    """An id to pad with that the model can embed. It is masked, so no result depends on it."""
    named = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
    top = limits.vocabulary
    return next((i for i in named if i is not None and (top is None or i < top)), 0)


def masked(ids: Tensor, mask: Tensor, pad: int) -> dict[str, Tensor]:
    """A batch with its mask, padded on the left whatever side it came padded on.

    Moving padding changes nothing that is asked of a row: positions are counted through the mask,
    and results are by position. A hole in the mask is refused: tokens behind it have one position
    in ``generate``, which counts through the mask, and another in a plain forward pass.

    Raises:
        PromptError: for a mask of another shape, of other values than 0 and 1, with a row of
            zeros, or with a hole.
    """
    if mask.shape != ids.shape or mask.is_floating_point() or mask.is_complex():
        raise _unfit(f"of shape {tuple(mask.shape)} and {mask.dtype}")
    mask = mask.long()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise _unfit("of other values than 0 and 1")
    before = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], 1)
    runs = ((mask == 1) & (before == 0)).sum(1)
    if bool((runs == 0).any()):
        raise _unfit(f"0 for all of prompt {int((runs == 0).nonzero()[0])}")
    if bool((runs > 1).any()):
        raise _unfit(f"0 between tokens of prompt {int((runs > 1).nonzero()[0])}")
    if bool(mask[:, -1].all()):
        return {"input_ids": ids, "attention_mask": mask}
    rows = [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]
    return {name: tensor.to(ids.device) for name, tensor in left_padded(rows, pad).items()}


def require_unpadded(tokenizer: Any, rows: Rows, limits: Limits) -> None:
    """Refuse pads that no mask marks: they would be read as text.

    A pad that texts never hold is padding wherever it stands. One that is also EOS, BOS or a
    template's own token may be text. Then a run of two or more at an end is taken for padding, and
    so is one pad where other rows, as long, have none there: that is what padding to the longest
    row leaves. One pad at an end of a row alone, or of every row, is text. What cannot be told
    apart is refused, since a mask settles it.

    Raises:
        PromptError: naming the row and the id.
    """
    pad = _pad(tokenizer, limits)
    if pad is None:
        return
    found = _unshared(rows, pad) if _only_pads(tokenizer, pad, limits) else _suspect(rows, pad)
    if found is None:
        return
    name = tokenizer.decode([pad]) if tokenizer is not None else "the configuration's pad"
    raise PromptError(
        f"prompts: `prompts` is ids with the pad {pad} ({name!r}) in prompt {found}, without an"
        " attention mask, wanted ids with a mask, so that padding is not read as text. Likely"
        " cause: tokenizer(...)['input_ids'] taken alone. Try: tokenizer(texts,"
        ' return_tensors="pt", padding=True), passed whole; if it is text, {"input_ids": ids,'
        ' "attention_mask": torch.ones_like(ids)}'
    )


def _pad(tokenizer: Any, limits: Limits) -> int | None:
    """The id that rows would be padded with: where no pad is set, people take EOS."""
    if tokenizer is None:
        return limits.pad
    named = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
    return next((i for i in named if i is not None), None)


def _only_pads(tokenizer: Any, pad: int, limits: Limits) -> bool:
    """Whether the pad has no other use: no special token, no stop, not in the chat template."""
    names = ("bos", "eos", "unk", "sep", "cls")
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in names} | {*limits.marks}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return pad not in used and (tokenizer is None or tokenizer.decode([pad]) not in template)


def _unshared(rows: Rows, pad: int) -> int | None:
    return next((n for n, row in enumerate(rows) if pad in row), None)


def _suspect(rows: Rows, pad: int) -> int | None:
    """A row whose pads cannot be told from padding, by the rule of ``require_unpadded``."""
    padded_together = len(rows) > 1 and len({len(row) for row in rows}) == 1 and len(rows[0]) > 1
    for forward in (True, False):
        runs = [_run(row if forward else row[::-1], pad) for row in rows]
        differ = padded_together and len(set(runs)) > 1
        most = max(runs)
        if most > 1 or differ:
            return runs.index(most)
    return None


def _run(row: Sequence[int], pad: int) -> int:
    """How many pads a row begins with."""
    return next((n for n, token in enumerate(row) if token != pad), len(row))


def _unfit(got: str) -> PromptError:
    return PromptError(
        f"prompts: `attention_mask` is {got}, wanted a row of 0 and 1 a prompt, integers or bools,"
        " like input_ids: 1 for its tokens, which stand together, and 0 for padding. Likely cause:"
        " a mask of other prompts, an additive mask, or a mask that hides tokens. Try: the"
        " tokenizer's own mask, or prompts without the hidden tokens"
    )
