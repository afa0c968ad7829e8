"""Where in the text an intervention acts.

Rules are small immutable values that compose with ``&``, ``|`` and ``~``. They are resolved
for each row through the attention mask, so that ``first(1)`` is the first real token whatever the
padding, and ``last(1)`` is the last token of the prompt at every step of a generation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..arguments import checked, fits
from ..errors import PromptError
from ..model.modules import text_config, torch_module
from .roles import role_markers

if TYPE_CHECKING:
    from nnsight import TransformersModel


MOST = 2**62
"""Ids and positions are below: a tensor's integers cannot be compared with more than 64 bits."""


@checked(error=PromptError, own=("n", "start", "stop"))
@dataclass(frozen=True)
class Tokens:
    """A rule that selects tokens. Padding is never selected.

    Build one with the class methods; combine with ``&``, ``|``, ``~``.

    Examples:
        >>> sf.Tokens.last(5) | sf.Tokens.generated()
        Tokens.last(5) | Tokens.generated()
        >>> ~sf.Tokens.first(1) & sf.Tokens.prompt()
        ~Tokens.first(1) & Tokens.prompt()
    """

    rule: tuple

    def __post_init__(self) -> None:
        if not _is_rule(self.rule):
            raise PromptError(
                f"Tokens: `rule` is {self.rule!r:.80}, wanted a rule made by one of its methods."
                " Likely cause: a tuple written by hand. Try: Tokens.last(1)"
            )

    @classmethod
    def all(cls) -> Tokens:
        """Every real token, of the prompt and generated."""
        return cls(("all",))

    @classmethod
    def prompt(cls) -> Tokens:
        """The prompt's tokens."""
        return cls(("prompt",))

    @classmethod
    def first(cls, n: int) -> Tokens:
        """The first n tokens of the prompt (BOS is usually the first)."""
        return cls(("first", _count("first", n)))

    @classmethod
    def last(cls, n: int) -> Tokens:
        """The last n tokens of the prompt, at every step of a generation."""
        return cls(("last", _count("last", n)))

    @classmethod
    def positions(cls, start: int, stop: int | None = None) -> Tokens:
        """Positions start..stop-1 of the text, prompt and generated alike; 0 is the first token.

        They are counted from each row's first real token. By this rule a dictionary skips
        positions that it was not trained on (``Dictionary.excluded``).

        Raises:
            PromptError: for a start below 0, or a stop that is not above it.

        Examples:
            >>> ~sf.Tokens.positions(0, 1)  # everything but the first token
            ~Tokens.positions(0, 1)
        """
        _require_span("positions", start, stop, 1)
        return cls(("positions", start, stop))

    @classmethod
    def generated(cls, start: int = 0, stop: int | None = None) -> Tokens:
        """Generated tokens start..stop-1 as they are fed back, 0 being the first new token.

        The first new token is itself produced by the prompt's last token; include
        ``Tokens.last(1)`` to act on what produces it.

        Raises:
            PromptError: as for ``positions``.
        """
        _require_span("generated", start, stop, 0)
        return cls(("generated", start, stop))

    @classmethod
    def ids(cls, *ids: int) -> Tokens:
        """Tokens with one of these ids.

        Raises:
            PromptError: for an id below 0, or too large for any vocabulary.
        """
        if ids and not 0 <= min(ids) <= max(ids) < MOST:
            raise PromptError(
                f"Tokens.ids: `ids` is {list(ids)!r:.80}, wanted ids from 0 and below 2**62. Likely"
                " cause: an id counted from the vocabulary's end, or a number that is no id. Try:"
                " Tokens.ids(tokenizer.eos_token_id)"
            )
        return cls(("ids", tuple(int(i) for i in ids)))

    @classmethod
    def special(cls) -> Tokens:
        """The tokenizer's special tokens: BOS, turn markers and the like."""
        return cls(("special",))

    @classmethod
    def role(cls, role: str) -> Tokens:
        """The contents of one role's turns in a chat, without the template's own tokens.

        Tokens generated after the prompt are the assistant's.
        """
        return cls(("role", role))

    @classmethod
    def where(cls, function: Callable[[Tensor, Tensor], Tensor]) -> Tokens:
        """Tokens for which ``function(ids [b, t], position [b, t])`` is true, a bool [b, t].

        Raises:
            PromptError: for a function that does not take the two.
        """
        require_pair("Tokens.where", function)
        return cls(("where", function))

    def __and__(self, other: Tokens) -> Tokens:
        return Tokens(("and", self.rule, other.rule))

    def __or__(self, other: Tokens) -> Tokens:
        return Tokens(("or", self.rule, other.rule))

    def __invert__(self) -> Tokens:
        return Tokens(("not", self.rule))

    def __repr__(self) -> str:
        return _spell(self.rule)


_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "all": (), "prompt": (), "special": (), "first": (int,), "last": (int,), "role": (str,),
    "positions": (int, (int, NoneType)), "generated": (int, (int, NoneType)), "ids": (tuple,),
    "where": (Callable,), "not": (tuple,), "and": (tuple, tuple), "or": (tuple, tuple),
}  # fmt: skip
"""Kinds of rules → what stands behind the kind. Of ``between``, which a role becomes, any number
of tuples."""


def _is_rule(rule: object, inside: int = 1) -> bool:
    """Whether this is a rule, and what stands so far inside it.

    Deeper ones were looked at when they were made: a long chain is no long work.
    """
    if not isinstance(rule, tuple) or not rule or not isinstance(rule[0], str):
        return False
    kind, *rest = rule
    wanted = (tuple,) * len(rest) if kind == "between" else _ARGUMENTS.get(kind)
    if wanted is None or len(rest) != len(wanted):
        return False
    nested = rest if inside and kind in ("not", "and", "or") else ()
    return all(map(isinstance, rest, wanted)) and all(_is_rule(r, inside - 1) for r in nested)


def _spell(rule: tuple, inner: bool = False) -> str:
    kind, *rest = rule
    if kind == "not":
        return f"~{_spell(rest[0], True)}"
    if kind in ("and", "or"):
        text = f" {'&' if kind == 'and' else '|'} ".join(_spell(part, True) for part in rest)
        return f"({text})" if inner else text
    if kind == "generated":
        rest = [] if rest == [0, None] else rest
    if kind == "positions" and rest[1] is None:
        rest = rest[:1]
    if kind == "ids":
        rest = list(rest[0])
    if kind == "where":
        rest = [getattr(rest[0], "__name__", "function")]
    if kind == "role":
        rest = [repr(rest[0])]
    return f"Tokens.{kind}({', '.join(str(part) for part in rest)})"


def require_pair(method: str, function: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with ids and positions, where that can be told."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions of C have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise PromptError(
            f"{method}: `function` is one of {signature}, wanted one that is called with two"
            f" tensors, ids [b, t] and position [b, t] ({error}). Likely cause: a rule on ids"
            f" alone. Try: {method}(lambda ids, position: ids == 5)"
        ) from None


def _count(name: str, n: int, least: int = 1) -> int:
    if fits(n, int) and least <= n < MOST:
        return int(n)
    raise PromptError(
        f"Tokens.{name}: `n` is {n!r}, wanted an integer from {least} and below 2**62. Likely"
        " cause: positions are counted from the prompt's ends; negative counts have no"
        f" meaning. Try: Tokens.{name}({least})"
    )


def _require_span(name: str, start: int, stop: int | None, least: int) -> None:
    """Refuse what is no span of at least so many tokens, counted from the start."""
    begins = fits(start, int) and 0 <= start < MOST
    if begins and (stop is None or (fits(stop, int) and start + least <= stop < MOST)):
        return
    raise PromptError(
        f"Tokens.{name}: `start and stop` is {start!r} and {stop!r}, wanted an integer from 0,"
        " and an integer above it or None. Likely cause: a text grows while it is generated, so"
        f" negative counts have no meaning. Try: Tokens.{name}(0, 1), or Tokens.last(1)"
        " for the prompt's last token"
    )


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
    config = text_config(torch_module(model))
    found = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    flat = [
        i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])
    ]
    return tuple(flat)
