"""wrap: an in-memory Hugging Face model as an nnsight model."""

from __future__ import annotations

from typing import Any

from nnsight import TransformersModel
from torch import nn


def wrap(model: nn.Module, tokenizer: Any) -> TransformersModel:
    """An nnsight model around a Hugging Face causal language model already in memory.

    nnsight needs the tokenizer and the task spelled out for a module that has no repository, and
    sets the tokenizer to pad on the left, which a causal model's batches need.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> type(model).__name__
        'TransformersModel'
    """
    return TransformersModel(model, tokenizer=tokenizer, task="text-generation")
