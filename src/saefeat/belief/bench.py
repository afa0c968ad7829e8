"""One model, its prompts and a metric, measured under many edits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor
from tqdm import tqdm

from ..attribution.attribute import Attribute
from ..attribution.metrics import Metric, Scorer
from ..attribution.one_batch import baseline_top
from ..errors import GradientError, LatentError, PromptError, SaefeatError, explain
from ..kernel.program import new_log
from ..kernel.trace import whole_run
from ..latents import Latents, as_latents, stack
from ..prompts import Prompts, encode_prompts, split
from ..sites import torch_module
from ..tokens import Tokens
from ..verbs.base import Chain, Intervention, require_fired
from ..verbs.edits import Clamp
from ..verbs.lower import lower


@dataclass(frozen=True, eq=False)
class Bench:
    """Encoded prompts and a bound metric.

    Attributes:
        model: an nnsight ``TransformersModel``.
        batch: ``input_ids`` and ``attention_mask``, [prompts, tokens].
        scorer: the metric, bound to the model's tokenizer.
        top: [prompts] long, what ``BASELINE_TOP`` stands for.
        where: the name of the public function, for errors.
        batch_size: rows a forward pass.
    """

    model: Any
    batch: dict[str, Tensor]
    scorer: Scorer
    top: Tensor
    where: str
    batch_size: int

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def rows(self, prompts: Tensor) -> dict[str, Tensor]:
        """The batch with these prompts, [n] long, as its rows."""
        return {name: tensor[prompts] for name, tensor in self.batch.items()}

    def under(self, intervention: Intervention | None, prompts: Tensor | None = None) -> Tensor:
        """[n]: the metric of these prompts (default: each once) under an intervention.

        Raises:
            FiringError: if an edit selects no token in any of them.
        """
        rows = torch.arange(len(self)) if prompts is None else prompts
        chosen = Chain(()) if intervention is None else intervention
        found, receipts, start = [], [], 0
        for batch in split(self.rows(rows), self.batch_size):
            here = slice(start, start + len(batch["input_ids"]))
            start = here.stop
            logits, log = last_logits(self.model, lower(chosen, self.model, here), batch)
            found.append(self.measure(logits, rows[here]))
            receipts.append(chosen.receipt(log))
        require_fired(sum(receipts[1:], receipts[0]), self.where)
        return torch.cat(found)

    def measure(self, logits: Tensor, prompts: Tensor) -> Tensor:
        """[n] float32: the metric, from last logits [n, vocabulary] of these prompts."""
        with torch.no_grad():
            found = self.scorer(logits, self.top[prompts].to(logits.device))
        if found.shape == logits.shape[:1] and bool(torch.isfinite(found).all()):
            return found.float().cpu()
        raise SaefeatError(
            explain(
                self.where,
                "metric",
                got=f"of shape {tuple(found.shape)}, or not finite",
                wanted="one finite number a prompt, [batch]",
                cause="a mean over prompts inside the metric, or a logarithm of zero",
                call="metric(lambda logits: logits[:, 5])",
            )
        )

    def without(
        self, sets: Sequence[Latents], where: Tokens | None, *, progress: bool = False
    ) -> Tensor:
        """[sets, prompts]: the metric with each set ablated; every pair is a row of a batch."""
        some = max(1, self.batch_size // len(self))
        starts = range(0, len(sets), some)
        bar = tqdm(starts, disable=not progress, desc=self.where, unit="batch")
        return torch.cat([self._without(sets[start : start + some], where) for start in bar])

    def _without(self, sets: Sequence[Latents], where: Tokens | None) -> Tensor:
        union, member = stack(sets)
        prompts = torch.arange(len(self)).repeat(len(sets))
        scale = (~member).float().repeat_interleave(len(self), 0)  # [sets · prompts, k]
        edit = Clamp(union, scale=scale, where=where) if len(union) else None
        return self.under(edit, prompts).reshape(len(sets), len(self))


def last_logits(
    model: Any, program: dict[str, Any], batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """One forward pass: logits [b, vocabulary] float32 for the token after each row, and the log.

    ``run`` would do, but it makes logits for every token, and a provenance for every batch.
    """
    accepted = inspect.signature(torch_module(model).forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    with torch.no_grad(), model.trace(**options) as tracer:
        with tracer.invoke(batch):
            log = nnsight.save(new_log())
            whole_run(model, program, log)
        with tracer.invoke():
            logits = nnsight.save(model.output.logits[:, -1].float().clone())
    return logits, log


def bench(model: Any, prompts: Prompts, metric: Metric, *, where: str, batch_size: int) -> Bench:
    """A bench for a metric that needs no baseline run.

    Raises:
        SaefeatError: for ``BASELINE_TOP``, which has no meaning without one.
    """
    require(where, batch_size=(batch_size, 1))
    tokenizer = getattr(model, "tokenizer", None)
    batch = encode_prompts(tokenizer, prompts)
    if "BASELINE_TOP" in repr(metric):
        raise SaefeatError(
            explain(
                where,
                "metric",
                got=repr(metric),
                wanted="a metric of fixed tokens",
                cause="BASELINE_TOP is what an attribution's baseline run says; there is none here",
                call="logit_diff(token, other)",
            )
        )
    top = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    return Bench(model, batch, metric.bind(tokenizer), top, where, batch_size)


def bench_of(
    attribute: Attribute, model: Any, prompts: Prompts, *, where: str, batch_size: int
) -> Bench:
    """A bench on which an attribution's metric is what it was there."""
    require(where, batch_size=(batch_size, 1))
    tokenizer = getattr(model, "tokenizer", None)
    batch = encode_prompts(tokenizer, prompts)
    top = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    if "BASELINE_TOP" in repr(attribute.metric):
        top = baseline_top(attribute, model, batch, batch_size)
    return Bench(model, batch, attribute.metric.bind(tokenizer), top, where, batch_size)


def require(where: str, **given: tuple[Any, int]) -> None:
    """Whole numbers from a least value on."""
    for name, (number, least) in given.items():
        if type(number) is not int or number < least:
            raise SaefeatError(
                explain(
                    where,
                    name,
                    got=repr(number),
                    wanted=f"an integer from {least}",
                    cause="a typing error",
                    call=f"{where}(..., {name}={max(least, 8)})",
                )
            )


def require_several(latents: object, where: str, least: int) -> Latents:
    """Latents, at least so many."""
    found = as_latents(latents, where)
    if len(found) >= least:
        return found
    raise LatentError(
        explain(
            where,
            "latents",
            got=repr(found),
            wanted=f"at least {least}",
            cause="a search that found too few",
            call="scores.top(20)",
        )
    )


def require_same(where: str, clean: Tensor, remembered: Tensor) -> None:
    """Refuse scores of other prompts, another metric or another model.

    Raises:
        PromptError: naming what differs.
    """
    same = clean.shape == remembered.shape
    # bfloat16 models move by a percent when rows are batched otherwise
    slack = 0.02 * (1 + float(remembered.abs().max())) if same else 0.0
    if same and bool(((clean - remembered).abs() <= slack).all()):
        return
    raise PromptError(
        explain(
            where,
            "scores",
            got=f"of {len(remembered)} prompts with a mean metric of {remembered.mean():.3f}",
            wanted=f"scores of these {len(clean)} prompts, whose metric is {clean.mean():.3f}",
            cause="other prompts, another order, another metric or another model",
            call="scores = attribute(model, prompts), and the same three here",
        )
    )


def require_gradients(where: str) -> None:
    """Refuse a context in which nothing has a gradient.

    Raises:
        GradientError: under ``torch.no_grad`` or ``torch.inference_mode``.
    """
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return
    raise GradientError(
        explain(
            where,
            "context",
            got="gradients switched off",
            wanted="torch.is_grad_enabled()",
            cause="a surrounding torch.no_grad() or torch.inference_mode()",
            call=f"with torch.enable_grad(): {where}(...)",
        )
    )
