"""What a dictionary's files declare, held against the model and what was measured.

None of it is certain: a name differs between hubs, an L0 between texts. So a difference is
a note in ``verify``'s table and no error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

_CHAT = re.compile(r"-(it|instruct|chat|sft|dpo|base|pt)$")
_SAME = {"gpt2-small": "gpt2"}
"""TransformerLens's name → the hub's, where they are no part of each other."""


def notes(
    sae: Any,
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    bos: int | None,
    l0: float,
    fvu: float,
) -> tuple[str, ...]:
    """Everything in which a dictionary's declarations and what was measured disagree.

    Args:
        sae: the dictionary.
        module: the model.
        prompts: token ids of each prompt measured.
        bos: the id of BOS, if the tokenizer has one.
        l0: measured.
        fvu: measured.
    """
    declared = getattr(sae, "declared", None)
    if declared is None:
        return ()
    noted = [
        _model(declared.model, module),
        _width(declared.width, sae.d_sae),
        _l0(declared.l0, l0),
        _explained(declared.explained, 1 - fvu),
        _bos(declared.prepend_bos, prompts, bos),
    ]
    return tuple(note for note in noted if note)


def _model(declared: str | None, module: nn.Module) -> str | None:
    name = getattr(getattr(module, "config", None), "name_or_path", "") or ""
    if not declared or not name or Path(name).is_dir():  # a folder may be called anything
        return None
    trained, loaded = _short(declared), _short(name)
    if trained == loaded:
        return None
    if _CHAT.sub("", trained) == _CHAT.sub("", loaded):
        return f"trained on {declared}, and this is {name}: one of them is tuned further"
    return f"trained on {declared}, and this model is called {name}"


def _short(name: str) -> str:
    """A model's name without its owner."""
    short = name.rsplit("/", 1)[-1].lower()
    return _SAME.get(short, short)


def _width(declared: int | None, width: int) -> str | None:
    wrong = declared is not None and declared != width
    return f"declares {declared:,} latents and holds {width:,}" if wrong else None


def _l0(declared: float | None, l0: float) -> str | None:
    """Texts differ, so only a factor of two is worth a word."""
    if not declared or declared / 2 <= l0 <= declared * 2:
        return None
    return f"declares an L0 of {declared:g}, and {l0:.1f} latents are active here"


def _explained(declared: float | None, explained: float) -> str | None:
    if declared is None or explained >= declared - 0.2:
        return None
    return f"declares {declared:.0%} of the variance explained, and explains {explained:.0%} here"


def _bos(declared: bool | None, prompts: Sequence[Sequence[int]], bos: int | None) -> str | None:
    if bos is None:
        return None
    heads = [tuple(prompt[:2]) for prompt in prompts]
    twice = sum(head == (bos, bos) for head in heads)
    if twice:
        return f"{twice} of {len(heads)} prompts begin with two BOS tokens"
    without = sum(head[:1] != (bos,) for head in heads)
    if declared and without:
        return f"trained with BOS in front, and {without} of {len(heads)} prompts have none"
    if declared is False and without < len(heads):
        with_bos = len(heads) - without
        return f"trained without BOS, and {with_bos} of {len(heads)} prompts begin with it"
    return None
