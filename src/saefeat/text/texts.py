"""The prompts' tokens behind a result, so that scores can be shown on them and masked by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from ..errors import PromptError
from ..kernel.state import Memory, window
from ..kernel.tokens import select
from .roles import Marks, role_markers
from .tokens import Tokens, special_ids

if TYPE_CHECKING:
    from nnsight import TransformersModel

ROLES = ("system", "user", "assistant")


@final
@dataclass(frozen=True)
class Texts:
    """The tokens of a result's prompts, without padding.

    Attributes:
        ids: token ids of each prompt.
        words: token id → its text, for the ids that occur.
        special: the tokenizer's special tokens: BOS, turn markers and the like.
        roles: chat role → the runs of ids that open its turns, and those that close them; empty
            without a chat template.
        lengths: how many of each row's tokens are the prompt's, where a continuation follows it
            (``log_prob``); None for all of them.
        between: what stands between two tokens in a text: a space for tokenizers of whole words,
            nothing where tokens hold their spaces themselves.

    Examples:
        >>> texts = sf.attribution.Texts(((2, 7, 8), (2, 9)), {2: "<bos>", 7: "hi"}, special=(2,))
        >>> texts.select(~sf.Tokens.special())
        (tensor([False,  True,  True]), tensor([False,  True]))
        >>> texts.tokens(0)
        ('<bos>', 'hi', '#8')
    """

    ids: tuple[tuple[int, ...], ...]
    words: Mapping[int, str]
    special: tuple[int, ...] = ()
    roles: Mapping[str, Marks] | None = None
    lengths: tuple[int, ...] | None = None
    between: str = ""

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        batch: Mapping[str, Tensor],
        *,
        lengths: Tensor | None = None,
        special: tuple[int, ...] = (),
    ) -> Texts:
        """From a left-padded batch, as ``encode_prompts`` makes it.

        Args:
            tokenizer: a Hugging Face tokenizer, or None.
            batch: ``input_ids`` and ``attention_mask`` [prompts, tokens].
            lengths: [prompts, 1], real tokens of each prompt, where more follow it.
            special: special ids for a model without a tokenizer.
        """
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        ids = tuple(tuple(row[real].tolist()) for row, real in rows)
        many = None if lengths is None else tuple(lengths.flatten().tolist())
        if tokenizer is None:
            return cls(ids, {}, special, lengths=many)
        seen = sorted({i for row in ids for i in row})
        words = {i: _word(tokenizer, i) for i in seen}
        known, between = tuple(tokenizer.all_special_ids), _between(tokenizer, words)
        return cls(ids, words, known, _roles(tokenizer), many, between)

    def tokens(self, prompt: int) -> tuple[str, ...]:
        """A prompt's tokens as text; ``#id`` for one without."""
        return tuple(self.words.get(i, f"#{i}") for i in self.ids[prompt])

    def select(self, where: Tokens) -> tuple[Tensor, ...]:
        """[tokens] bool for each prompt: where a rule holds.

        Raises:
            PromptError: for a role that no chat template is known for.
        """
        rule = self._plain(where.rule)
        masks = []
        for row, length in zip(self.ids, self.prompts, strict=True):
            ids = torch.tensor([row], dtype=torch.long)
            view = window(ids, None, (1, len(row)), 0, Memory(torch.tensor([[length]])), None)
            masks.append(select(rule, view)[0])
        return tuple(masks)

    @property
    def prompts(self) -> tuple[int, ...]:
        """How many tokens of each row are the prompt's."""
        return tuple(map(len, self.ids)) if self.lengths is None else self.lengths

    def _plain(self, rule: tuple) -> tuple:
        """The rule in token ids, as ``verbs.lower.plain`` makes it with a tokenizer at hand."""
        kind, *rest = rule
        if kind in ("not", "and", "or"):
            return (kind, *(self._plain(part) for part in rest))
        if kind == "special":
            return ("ids", self.special)
        if kind != "role":
            return rule
        if rest[0] in (self.roles or {}):
            return ("between", *(self.roles or {})[rest[0]])
        wanted = "one of " + (
            ", ".join(self.roles or {}) or "none: there is no template, or it sets none apart"
        )
        raise PromptError(
            f"Texts.select: `where` is role {rest[0]!r}, wanted {wanted}. Likely cause: prompts"
            " that are no chats, or a role the template has not. Try: Tokens.special(),"
            " Tokens.ids(...), Tokens.first(n)"
        )


def texts_of(
    model: TransformersModel, batch: Mapping[str, Tensor], lengths: Tensor | None = None
) -> Texts:
    """The texts of a model's batch; special tokens are known without a tokenizer as well."""
    tokenizer = getattr(model, "tokenizer", None)
    special = special_ids(model) if tokenizer is None else ()
    return Texts.of(tokenizer, batch, lengths=lengths, special=special)


def _word(tokenizer: Any, token: int) -> str:
    """A token's text. SentencePiece's decoding drops the space that a first token begins with."""
    word = tokenizer.decode([token])
    marked = str(tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")
    return f" {word}" if marked and not word.startswith(" ") else word


def _between(tokenizer: Any, words: Mapping[int, str]) -> str:
    """What decoding puts between two tokens, seen on one that occurs, twice."""
    ordinary = (i for i, w in words.items() if w.strip() and i not in tokenizer.all_special_ids)
    token = next(ordinary, None)
    if token is None:
        return ""
    twice = f"{words[token]} {words[token]}"
    return " " if tokenizer.decode([token, token]) == twice else ""


def _roles(tokenizer: Any) -> dict[str, Marks]:
    """The roles that the tokenizer's template can render."""
    markers = {}
    for role in ROLES if getattr(tokenizer, "chat_template", None) else ():
        try:
            markers[role] = role_markers(tokenizer, role)
        except PromptError:
            continue
    return markers


def flat(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor, and their lengths."""
    every = torch.tensor([i for row in rows for i in row], dtype=torch.long)
    return every, torch.tensor([len(row) for row in rows], dtype=torch.long)
