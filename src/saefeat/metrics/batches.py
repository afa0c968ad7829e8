"""Encoded prompts, continued where a metric asks for it, some at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import one_a_prompt
from ..text.prompts import Prompts, encode_prompts
from .base import Metric

if TYPE_CHECKING:
    from nnsight import TransformersModel


class Batch(NamedTuple):
    """Some prompts, left-padded, with what follows them.

    ``numbers`` [b] says which prompts of the data set they are, ``lengths`` [b, 1] how many real
    tokens of each row are the prompt's, None for all.
    """

    inputs: dict[str, Tensor]
    numbers: Tensor
    lengths: Tensor | None

    @property
    def tokens(self) -> int:
        """Columns of the batch times its rows: what a pass costs."""
        return self.inputs["input_ids"].numel()

    def rows(self) -> slice:
        """The prompts as a slice of the data set, for values that differ by prompt."""
        return slice(int(self.numbers[0]), int(self.numbers[-1]) + 1)

    def take(self, rows: Tensor) -> Batch:
        """Rows by number, repeated as wanted."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        lengths = None if self.lengths is None else self.lengths[rows]
        return Batch(inputs, self.numbers[rows], lengths)


class Data(NamedTuple):
    """All prompts of a call, left-padded, and how long each prompt itself is, [n, 1]."""

    inputs: dict[str, Tensor]
    lengths: Tensor | None = None

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(self.inputs["input_ids"])

    def batches(self, size: int) -> list[Batch]:
        """Rows in order, at most ``size`` each, without columns that are all padding."""
        batches = []
        for start in range(0, self.prompts, size):
            rows = slice(start, start + size)
            mask = self.inputs["attention_mask"][rows]
            first = int((mask.sum(0) == 0).long().argmin())
            inputs = {name: tensor[rows, first:] for name, tensor in self.inputs.items()}
            lengths = None if self.lengths is None else self.lengths[rows]
            batches.append(Batch(inputs, torch.arange(start, start + len(mask)), lengths))
        return batches

    def take(self, rows: Tensor) -> Data:
        """Rows by number, repeated as wanted."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return Data(inputs, None if self.lengths is None else self.lengths[rows])


def metric_data(function: str, model: TransformersModel, prompts: Prompts, metric: Metric) -> Data:
    """Prompts encoded, and continued where the metric wants it.

    Raises:
        PromptError: for prompts that cannot be encoded, or values made for another number of them.
    """
    tokenizer = getattr(model, "tokenizer", None)
    inputs = encode_prompts(tokenizer, prompts)
    one_a_prompt(function, "metric", metric.prompts, len(inputs["input_ids"]))
    return continued(tokenizer, inputs, metric)


def continued(tokenizer: Any, inputs: dict[str, Tensor], metric: Metric) -> Data:
    """Prompts with what follows them, less its last token, which predicts nothing wanted."""
    if metric.continuation is None:
        return Data(inputs)
    ids, mask = metric.continuation(tokenizer), inputs["attention_mask"].bool()
    rows = [row[real].tolist() for row, real in zip(inputs["input_ids"], mask, strict=True)]
    behind = ids if len(ids) > 1 else ids * len(rows)
    joined = [[*row, *more[:-1]] for row, more in zip(rows, behind, strict=True)]
    return Data(encode_prompts(tokenizer, joined), mask.sum(1, keepdim=True))
