"""The baseline of one batch: what every watched place and every latent is moved to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ..errors import PromptError
from ..kernel.read import lift
from ..verbs.base import Intervention
from .baselines import Baseline, Fixed, Paired, counterparts
from .pairs import Goal, at_tokens, moved_by
from .passes import Batch, Pass, Watch


@dataclass(frozen=True)
class End:
    """Where the path of a batch ends.

    ``targets`` [b, t, d] a written place, ``goals`` a part, ``scored`` [b, t] a part; ``batch`` is
    what the baseline run is made with, which is another for paired prompts.
    """

    targets: dict[int, Tensor]
    goals: tuple[Goal, ...]
    scored: tuple[Tensor, ...]
    batch: Batch
    made: Callable[[], Pass]

    @cached_property
    def here(self) -> Pass:
        """The baseline run; made when asked for, so that it need not lie beside another's graph."""
        return self.made()


def run_baseline(
    watch: Watch, baseline: Baseline, batch: Batch, other: Batch | None, published: bool
) -> Pass | None:
    """The baseline's own run, where it has one; before the clean run, whose graph takes memory."""
    if isinstance(baseline, Intervention):
        return watch.run(batch, baseline, before=published)
    return None if other is None else watch.run(other)


def end(
    watch: Watch,
    baseline: Baseline,
    batch: Batch,
    other: Batch | None,
    clean: Pass,
    scored: Sequence[Tensor],
    here: Pass | None,
) -> End:
    """The end of the path, from the clean run and the baseline's."""
    with torch.no_grad():
        if here is None:
            return _still(watch, baseline, batch, clean, tuple(scored))
        values, before, masks = here.values, here.before, tuple(scored)
        if isinstance(baseline, Paired) and other is not None:
            values, masks = _aligned(baseline, batch, other, clean, here, masks)
        parts = zip(watch.parts, masks, strict=True)
        goals = tuple(Goal(lift(at_tokens(values[p.read], mask), p.transform)) for p, mask in parts)
        targets = {n: (before or values)[n] for n in watch.written}
        return End(targets, goals, masks, other or batch, lambda: here)


def _still(
    watch: Watch, baseline: Baseline, batch: Batch, clean: Pass, scored: tuple[Tensor, ...]
) -> End:
    """Latents at zero or at fixed values, each site moved from its own clean value."""
    goals = []
    for part, mask in zip(watch.parts, scored, strict=True):
        prompt = batch.numbers[mask.nonzero()[:, 0].cpu()]
        fixed = None
        if isinstance(baseline, Fixed):
            fixed = baseline.of(part.dictionary, part.indices, prompt)
        goals.append(Goal(fixed=fixed))
    targets: dict[int, Tensor] = {}
    for n, (part, mask) in enumerate(zip(watch.parts, scored, strict=True)):
        out = targets.get(part.write, clean.values[part.write]).clone()
        before = lift(at_tokens(clean.values[part.read], mask), part.transform)
        own = mask.to(out.device)
        out[own], goals[n] = moved_by(part, before, goals[n], out[own])
        targets[part.write] = out
    run = partial(watch.run, batch, targets=targets, copy=False)
    return End(targets, tuple(goals), scored, batch, run)


def _aligned(
    baseline: Paired, batch: Batch, other: Batch, clean: Pass, here: Pass, scored: tuple
) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
    """The paired run's values at this batch's columns, and what can be scored of it."""
    columns, free = _columns(baseline, batch, other)
    missing = columns < 0
    for mask in scored:
        _require_counterparts(mask & (missing & ~free).to(mask.device), batch)
    rows = torch.arange(len(columns))[:, None]
    found = {}
    for n, value in clean.values.items():
        across = here.values[n][rows, columns.clamp(min=0)]
        found[n] = torch.where(missing.to(value.device).unsqueeze(-1), value, across)
    return found, tuple(mask & ~free.to(mask.device) for mask in scored)


def _columns(baseline: Paired, batch: Batch, other: Batch) -> tuple[Tensor, Tensor]:
    """[b, t]: the other batch's column that meets each column, or −1; and where that was asked for.

    Positions are the prompt's; what continues it meets what continues the other.
    """
    sizes = [_sizes(one) for one in (batch, other)]
    lengths, others = ([size for size, _, _ in both] for both in sizes)
    rows, free = counterparts(baseline.align, lengths, others, int(batch.numbers[0]))
    shape = batch.inputs["input_ids"].shape
    columns = torch.full(shape, -1)
    asked = torch.zeros(shape, dtype=torch.bool)
    for n, ((length, more, pad), (theirs, _, their_pad)) in enumerate(zip(*sizes, strict=True)):
        found = torch.tensor([p + their_pad if p >= 0 else -1 for p in rows[n]])
        columns[n, pad : pad + length] = found
        asked[n, pad : pad + length] = torch.tensor(free[n])
        behind = torch.arange(more) + their_pad + theirs
        columns[n, pad + length :] = behind
    return columns, asked


def _sizes(batch: Batch) -> list[tuple[int, int, int]]:
    """For each row: the prompt's tokens, the continuation's, and pads."""
    mask = batch.inputs["attention_mask"]
    real = mask.sum(1)
    lengths = real if batch.lengths is None else batch.lengths.squeeze(1)
    return [
        (int(n), int(r - n), int(mask.shape[1] - r)) for n, r in zip(lengths, real, strict=True)
    ]


def _require_counterparts(lacking: Tensor, batch: Batch) -> None:
    if not bool(lacking.any()):
        return
    row = int(lacking.any(1).nonzero()[0])
    raise PromptError(
        f"Attribute: `baseline` is without a counterpart for {int(lacking[row].sum())} scored"
        f" tokens of prompt {int(batch.numbers[row])}, wanted a baseline token for every scored"
        " token. Likely cause: the paired prompt is shorter. Try: where=Tokens.last(n) for the"
        " tokens they share, or a map with None in align="
    )
