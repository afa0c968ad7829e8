"""Token rules made plain for one model: special tokens and roles become token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..model.modules import torch_module
from .prompts import role_markers

if TYPE_CHECKING:
    from nnsight import TransformersModel


def plain(rule: tuple, model: TransformersModel) -> tuple:
    """A rule without what only the tokenizer knows: special tokens and roles become ids."""
    kind, *rest = rule
    if kind in ("not", "and", "or"):
        return (kind, *(plain(part, model) for part in rest))
    if kind == "special":
        return ("ids", special_ids(model))
    if kind == "role":
        return ("between", *role_markers(getattr(model, "tokenizer", None), rest[0]))
    return rule


def special_ids(model: TransformersModel) -> tuple[int, ...]:
    """Special token ids: the tokenizer's, or those the configuration names."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        return tuple(tokenizer.all_special_ids)
    config = torch_module(model).config.get_text_config()  # type: ignore[union-attr, operator]
    found = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    flat = [
        i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])
    ]
    return tuple(flat)
