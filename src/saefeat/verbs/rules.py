"""Where a verb acts: the rule asked for, less the tokens its dictionary was not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dictionaries.latents import Dictionary
from ..text.rules import special_ids
from ..text.tokens import Tokens

if TYPE_CHECKING:
    from nnsight import TransformersModel


def acts_at(where: Tokens | None, dictionary: Dictionary, model: TransformersModel) -> Tokens:
    """The tokens asked for, less those the dictionary was not trained on.

    A rule that says all tokens, or names tokens by their ids, means them.
    """
    if where is None:
        return default_rule(dictionary, model)
    if not dictionary.excluded or where.rule == ("all",) or _names_tokens(where.rule):
        return where
    return where & default_rule(dictionary, model)


def _names_tokens(rule: tuple) -> bool:
    """Whether a rule asks for tokens by their ids, and not only for others than those."""
    kind, *rest = rule
    if kind in ("and", "or"):
        return any(_names_tokens(part) for part in rest)
    return kind in ("ids", "special")


def default_rule(dictionary: Dictionary, model: TransformersModel) -> Tokens:
    """Every real token, less those the dictionary was not trained on."""
    excluded = dictionary.excluded
    if excluded == "special":
        excluded = special_ids(model)
    return ~Tokens.ids(*excluded) if excluded else Tokens.all()  # type: ignore[misc]
