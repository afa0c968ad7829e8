"""wrap: an in-memory Hugging Face model as an nnsight model."""

from __future__ import annotations

from typing import Any

from nnsight import TransformersModel
from torch import nn
from transformers import __version__ as TRANSFORMERS

from ..errors import ModelError, explain
from .sharded import sharded


def wrap(model: nn.Module, tokenizer: Any) -> TransformersModel:
    """An nnsight model around a Hugging Face causal language model already in memory.

    nnsight needs the tokenizer and the task spelled out for a module that has no repository, and
    sets the tokenizer to pad on the left, which a causal model's batches need.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.

    Raises:
        ModelError: for a tensor-parallel model whose plan this nnsight does not find.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> type(model).__name__
        'TransformersModel'
    """
    try:
        return TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    except ImportError as error:
        if not sharded(model):
            raise
        raise ModelError(
            explain(
                "wrap",
                "model",
                got=f"tensor-parallel, under transformers {TRANSFORMERS}",
                wanted="a transformers whose plans nnsight can read",
                cause=f"a helper that moved between them ({error.name}: {error.msg[:100]})",
                call="the transformers that nnsight's page on tensor parallelism names; or"
                " sf.hooked(model, intervention), which needs no nnsight",
            )
        ) from error
