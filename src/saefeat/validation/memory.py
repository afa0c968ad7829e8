"""How many rows a forward pass may have: long prompts and wide vocabularies take more."""

from __future__ import annotations

from typing import Any

import torch

from ..metrics.evaluator import Batch, Evaluator
from ..verbs.base import Intervention

CAPACITY = 1 << 28
"""Numbers that a pass may hold beside the weights: 1 GiB of float32. On a GPU half of what is free,
if that is more."""


def rows_that_fit(evaluator: Evaluator, batch: Batch, intervention: Intervention, most: int) -> int:
    """At most ``most`` rows as wide as this batch, and one at least.

    Counted are the logits that the metric reads (three times: as they are, in float32, and their
    logarithms), the latents that an intervention encodes, the block's own activations, and the
    attention weights of one layer. It is an estimate: it keeps 32 rows of 2,000 tokens, or logits
    of every token, from filling the memory.
    """
    tokens = batch.inputs["input_ids"].shape[1]
    config: Any = getattr(evaluator.module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("vocab_size", "hidden_size", "num_attention_heads")
    words, width, heads = (getattr(text, name, None) or 0 for name in names)
    latents = sum(len(step.latents) for step in intervention.parts())
    row = 3 * (evaluator.columns(batch) or tokens) * words
    row += tokens * (4 * latents + 16 * width + 2 * heads * tokens)
    return max(1, min(most, _capacity(evaluator) // max(1, row)))


def _capacity(evaluator: Evaluator) -> int:
    device = next((p.device for p in evaluator.module.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return CAPACITY
    return max(CAPACITY, torch.cuda.mem_get_info(device)[0] // 8)
