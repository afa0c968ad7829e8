"""Tokens of the prompts that a Patch selects and has no value for: they are named in a warning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernel.state import Memory, window
from ..kernel.tokens import select
from ..text.tokens import Tokens, plain
from ..values.patch import Patch
from .base import Intervention, Step
from .lower import acts_at

if TYPE_CHECKING:
    from nnsight import TransformersModel


def warn_of_gaps(
    function: str,
    intervention: Intervention,
    model: TransformersModel,
    inputs: Mapping[str, Tensor],
) -> None:
    """Warn of prompts that go on behind the text of a Patch's clean run.

    Positions of two texts of different lengths are seldom the same place in both, and the tokens
    behind the shorter one stay as they are. What the clean run's probe did not select is left
    alone on purpose, and generated tokens are none of the prompt's.

    Args:
        function: the public function, for the warning.
        intervention: with values for as many prompts.
        model: whose tokenizer tells rules their ids.
        inputs: ``input_ids`` and ``attention_mask`` of all prompts.
    """
    for step in intervention.parts():
        for value in () if step.change is None else step.change:
            if isinstance(value, Patch):
                gaps = _gaps(step, value, model, inputs)
                first = next((n for n, count in enumerate(gaps) if count), None)
                if first is not None:
                    warnings.warn(
                        f"saefeat: {function}: {sum(gaps)} tokens of {sum(map(bool, gaps))} prompts"
                        f" (prompt {first} the first) have no value in {value!r:.120} and stay as"
                        " they are: these prompts are longer than those of its readings. Pair"
                        " prompts token by token, or say where= for the tokens they share",
                        stacklevel=4,
                    )


def _gaps(
    step: Step, value: Patch, model: TransformersModel, inputs: Mapping[str, Tensor]
) -> list[int]:
    """[prompts]: how many tokens the step selects behind the text of the readings."""
    starts, columns = value.readings.starts, value.readings.values.shape[1]
    assert starts is not None
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), starts.tolist(), strict=True)
    gaps = []
    for row, real, start in rows:
        ids, held = row[real][None], columns - start
        selected = torch.zeros(1, ids.shape[1], dtype=torch.bool)
        if ids.shape[1] > held:
            view = window(ids, None, (1, ids.shape[1]), 0, _all(ids), None)
            for basis, _ in step.latents.parts:
                rule: Tokens = acts_at(step.rule, basis, model)
                selected |= select(plain(rule.rule, model), view)
        gaps.append(int(selected[:, held:].sum()))
    return gaps


def _all(ids: Tensor) -> Memory:
    return Memory(torch.tensor([[ids.shape[1]]]))
