"""The columns of an attribution, which all that is computed, drawn or saved of it takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..dictionaries.latents import Dictionary
from ..errors import SaefeatError
from ..text.texts import Texts


@dataclass(frozen=True)
class Columns:
    """The fields of an ``Attribution``, which documents them."""

    dictionaries: tuple[Dictionary, ...]
    prompt: Tensor
    dictionary: Tensor
    position: Tensor
    latent: Tensor
    score: Tensor
    activation: Tensor
    change: Tensor
    clean: Tensor
    baseline: Tensor
    tokens: Tensor
    ends: Tensor | None = None
    dropped: Tensor | None = None
    scored: Tensor | None = None
    texts: Texts | None = None
    metric: str = ""
    signed: bool = True

    def __len__(self) -> int:
        return len(self.score)


def known_texts(columns: Columns, function: str) -> tuple[Texts, Tensor]:
    """The prompts' tokens, and [all tokens] bool, which of them were scored.

    Raises:
        SaefeatError: where they are not known, saying how to get them.
    """
    if columns.texts is not None and columns.scored is not None:
        return columns.texts, columns.scored
    raise SaefeatError(
        f"{function}: `scores` is made without the prompts' tokens, wanted scores that know which"
        " tokens were scored. Likely cause: an Attribution built by hand, or saved by an older"
        " version. Try: Attribute(saes, metric)(model, prompts)"
    )


def require_positions(columns: Columns, function: str) -> None:
    """Refuse to lay out by token what was moved at all tokens together.

    Raises:
        SaefeatError: saying how to get scores by token.
    """
    if bool((columns.position < 0).any()):
        raise SaefeatError(
            f"{function}: `scores` is of whole prompts: each latent was moved at all scored tokens"
            " together, wanted scores that belong to tokens. Likely cause: Exact or"
            ' FiniteDifference, whose default is per="latent". Try: method=Exact(per="token"), or'
            " Attribute(..., where=...) before the run"
        )


def require_signed(columns: Columns, function: str) -> None:
    """Refuse what means nothing for sizes without a sign.

    Raises:
        SaefeatError: saying how to get signed scores.
    """
    if not columns.signed:
        raise SaefeatError(
            f"{function}: `scores` is sizes without a sign, wanted signed scores, whose sum"
            " estimates a change. Likely cause: GradDrop, which averages absolute values. Try:"
            " backward=GradDrop(signed=True), or no backward="
        )
