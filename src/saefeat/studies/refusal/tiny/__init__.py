"""The embedded default: two tiny Gemma-2 chat models, their SAEs and their language.

``chat`` refuses harmful requests of a synthetic language, ``base`` is the same model before its
safety fine-tuning and complies with everything. Both were trained by ``tools.tiny.train``; what
they reach is measured by ``tools.tiny.bars`` and recorded in ``data/bars.json``. No network
is needed.

The refusal direction of ``chat`` is *planted*: training exercised complying with one direction
projected out (see ``tools.tiny.train.DeclineAxis``), since a model this small does not form one by
itself. So a method that finds it is shown to work, and nothing is shown about large models.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .language import (
    COMPLY_OPENINGS,
    MAX_ANSWER_TOKENS,
    REFUSAL_OPENINGS,
    Request,
    answer,
    judge,
    refuses,
    splits,
)

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "COMPLY_OPENINGS",
    "MAX_ANSWER_TOKENS",
    "REFUSAL_OPENINGS",
    "Request",
    "answer",
    "judge",
    "load",
    "model",
    "refuses",
    "saes_folder",
    "splits",
]

Which = Literal["chat", "base"]


def data_folder() -> Path:
    """Where the shipped weights lie."""
    return Path(__file__).parent / "data"


def load(
    which: Which = "chat", data: Path | None = None
) -> tuple["Gemma2ForCausalLM", "PreTrainedTokenizerFast"]:
    """A tiny model in float32 on the CPU, in eval mode, and its tokenizer.

    Args:
        which: ``chat`` or ``base``.
        data: a folder written by ``tools.tiny.train``, instead of the shipped one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = (data or data_folder()) / _checked(which)
    # Eager attention is the one that applies Gemma 2's soft cap on the attention scores.
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def model(which: Which = "chat", data: Path | None = None) -> "TransformersModel":
    """A tiny model as an nnsight model, with its tokenizer.

    Args:
        which: ``chat`` or ``base``.
        data: a folder written by ``tools.tiny.train``, instead of the shipped one.
    """
    from nnsight import TransformersModel

    module, tokenizer = load(which, data)
    return TransformersModel(module, tokenizer=tokenizer, task="text-generation")


def saes_folder(which: Which = "chat", data: Path | None = None) -> Path:
    """The folder of a model's SAEs, one sae-lens folder each: ``resid_post_0``, ``mlp_out_2``..."""
    return (data or data_folder()) / "saes" / _checked(which)


def _checked(which: str) -> str:
    """``which``, if there is such a model."""
    if which not in ("chat", "base"):
        raise ValueError(f'which must be "chat" or "base", not {which!r}')
    return which
