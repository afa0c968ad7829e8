"""Evaluate: what an intervention costs on text the model should still predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor
from tqdm import tqdm

from .errors import PromptError, explain
from .kernel.trace import whole_run
from .prompts import Prompts, encode_prompts, split
from .verbs.base import Chain, Intervention, by_prompt, require_rows
from .verbs.lower import lower


def continuation_loss(
    model: Any,
    prompts: Prompts,
    continuations: Sequence[Sequence[int]],
    intervention: Intervention | None = None,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """Mean cross-entropy per token of given continuations, prompt by prompt.

    Args:
        model: an nnsight ``TransformersModel``.
        prompts: strings, chats or token ids, n of them.
        continuations: token ids that follow each prompt, as ``Run.completions`` has them; the
            model's own unedited completions measure what an intervention costs.
        intervention: what to apply, to prompt and continuation alike.
        batch_size: prompts a batch.
        progress: show a progress bar.

    Returns:
        [n] float32, nats per continuation token. Padding never counts.

    Raises:
        PromptError: for another number of continuations, or an empty one.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> out = sf.run(model, ["hello", "how do i bake bread"], max_new_tokens=4)
        >>> sf.continuation_loss(model, out.prompts, out.completions).shape
        torch.Size([2])
    """
    chosen = intervention if intervention is not None else Chain(())
    encoded = encode_prompts(getattr(model, "tokenizer", None), prompts)
    masks = encoded["attention_mask"].bool()
    asked = [ids[m].tolist() for ids, m in zip(encoded["input_ids"], masks, strict=True)]
    _require_pairs(asked, continuations)
    require_rows(chosen, len(asked))
    whole = [[*a, *c] for a, c in zip(asked, continuations, strict=True)]
    batches = split(encode_prompts(getattr(model, "tokenizer", None), whole), batch_size)
    losses: list[Tensor] = []
    program, start = lower(chosen, model), 0
    for batch in tqdm(batches, disable=not progress, desc="loss", unit="batch"):
        rows = slice(start, start + len(batch["input_ids"]))
        start = rows.stop
        if by_prompt(chosen):
            program = lower(chosen, model, rows)
        sizes = [len(c) for c in continuations[rows]]
        losses.append(_losses(model, program, batch, torch.tensor(sizes)))
    return torch.cat(losses)


def _losses(model: Any, program: dict[str, Any], batch: dict[str, Tensor], sizes: Tensor) -> Tensor:
    """[b]: one batch. Rows end together, so the last ``size`` tokens of a row are what follows."""
    width = int(sizes.max())
    prompts = batch["attention_mask"].sum(1, keepdim=True) - sizes[:, None]  # [b, 1]
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(batch):
            whole_run(model, program, None, prompts)
        with tracer.invoke():
            logits = nnsight.save(model.output.logits[:, -width - 1 : -1].float().cpu())
    wanted = batch["input_ids"][:, -width:].cpu()  # [b, width]
    loss = -logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    counted = torch.arange(width) >= width - sizes[:, None]
    return torch.where(counted, loss, 0.0).sum(1) / sizes


def _require_pairs(asked: list[list[int]], continuations: Sequence[Sequence[int]]) -> None:
    empty = [n for n, tokens in enumerate(continuations) if len(tokens) == 0]
    if len(asked) == len(continuations) and not empty:
        return
    raise PromptError(
        explain(
            "continuation_loss",
            "continuations",
            got=f"{len(continuations)} for {len(asked)} prompts"
            + (f", the one at {empty[0]} empty" if empty else ""),
            wanted="one non-empty continuation a prompt",
            cause="a filtered list, or a model that stopped at once",
            call="continuation_loss(model, out.prompts, out.completions)",
        )
    )
