"""Which tokens a dictionary was not trained on, so that edits and readings skip them."""

from __future__ import annotations

from ..errors import DictionaryError
from ..text.tokens import Tokens

Excluded = tuple[int, ...] | str | Tokens
"""Token ids, ``"special"`` for all special tokens, or any token rule; ``()`` for none."""


def untrained(excluded: Excluded) -> Tokens | None:
    """The tokens as a rule, or None where there are none.

    Raises:
        DictionaryError: for anything but token ids, ``"special"`` or a token rule.

    Examples:
        >>> from saefeat.dictionaries.exclusion import untrained
        >>> untrained((2, 5)), untrained("special"), untrained(())
        (Tokens.ids(2, 5), Tokens.special(), None)
    """
    if isinstance(excluded, Tokens):
        return excluded
    if excluded == "special":
        return Tokens.special()
    if isinstance(excluded, tuple) and all(type(token) is int for token in excluded):
        return Tokens.ids(*excluded) if excluded else None
    raise DictionaryError(
        f'dictionary: `excluded` is {excluded!r}, wanted a tuple of token ids, "special", or a'
        " token rule. Likely cause: a single id, or positions without their rule. Try:"
        " excluded=sf.Tokens.positions(0, 1), or excluded=(2,)"
    )


def not_on(start: int | None, stop: int | None) -> Tokens | None:
    """The positions that are left out where start..stop-1 were trained on."""
    rules = [Tokens.positions(0, start)] if start else []
    rules += [] if stop is None else [Tokens.positions(stop)]
    return either(*rules)


def either(*rules: Tokens | None) -> Tokens | None:
    """The union of rules, None where there is none."""
    found = None
    for rule in rules:
        if rule is not None:
            found = rule if found is None else found | rule
    return found
