"""The baseline of one batch: what every watched place and every latent is moved to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ..errors import PromptError
from ..kernel.read import lift
from ..metrics.batches import Batch
from ..verbs.base import Intervention
from .baselines import Baseline, Fixed, Paired, counterparts
from .pairs import Target, at_tokens, moved_by
from .part import Part
from .passes import SitePass, SitePasses


@dataclass(frozen=True)
class Endpoint:
    """Where the path of a batch ends.

    ``values`` [b, t, d] a written place, ``targets`` a part, ``scored`` [b, t] a part; ``batch`` is
    what the baseline run is made with, which is another for paired prompts.
    """

    values: dict[int, Tensor]
    targets: tuple[Target, ...]
    scored: tuple[Tensor, ...]
    batch: Batch
    make: Callable[[], SitePass]

    @cached_property
    def run(self) -> SitePass:
        """The baseline run; made when asked for, so that it need not lie beside another's graph."""
        return self.make()


def run_baseline(
    passes: SitePasses, baseline: Baseline, batch: Batch, other: Batch | None, published: bool
) -> SitePass | None:
    """The baseline's own run, where it has one; before the clean run, whose graph takes memory."""
    if isinstance(baseline, Intervention):
        return passes.run(batch, baseline, before=published)
    return None if other is None else passes.run(other)


def endpoint(
    passes: SitePasses,
    baseline: Baseline,
    batch: Batch,
    other: Batch | None,
    clean: SitePass,
    scored: tuple[Tensor, ...],
    run: SitePass | None,
) -> Endpoint:
    """The end of the path, from the clean run and the baseline's."""
    with torch.no_grad():
        if run is None:
            return _moved_endpoint(passes, baseline, batch, clean, scored)
        values = run.values
        if isinstance(baseline, Paired) and other is not None:
            values, scored = _aligned(baseline, batch, other, clean, run, scored)
        targets = tuple(
            Target(lift(at_tokens(values[part.read], mask), part.norm))
            for part, mask in zip(passes.parts, scored, strict=True)
        )
        written = {n: (run.before or values)[n] for n in passes.written}
        return Endpoint(written, targets, scored, other or batch, lambda: run)


def _moved_endpoint(
    passes: SitePasses,
    baseline: Baseline,
    batch: Batch,
    clean: SitePass,
    scored: tuple[Tensor, ...],
) -> Endpoint:
    """Latents at zero or at fixed values, each site moved from its own clean value."""
    targets: list[Target] = []
    values: dict[int, Tensor] = {}
    for part, mask in zip(passes.parts, scored, strict=True):
        prompt = batch.numbers[mask.nonzero()[:, 0].cpu()]
        out = values.get(part.write, clean.values[part.write]).clone()
        before = lift(at_tokens(clean.values[part.read], mask), part.norm)
        on_site = mask.to(out.device)
        out[on_site], target = moved_by(
            part, before, Target(fixed=fixed_values(baseline, part, prompt)), out[on_site]
        )
        targets.append(target)
        values[part.write] = out
    make = partial(passes.run, batch, targets=values, copy=False)
    return Endpoint(values, tuple(targets), scored, batch, make)


def fixed_values(baseline: Baseline, part: Part, prompt: Tensor) -> Tensor | None:
    """[1 or n, k]: what a ``Fixed`` baseline gives for n tokens of these prompts; None for zero."""
    if not isinstance(baseline, Fixed):
        return None
    return baseline.of(part.dictionary, part.indices, prompt)


def _aligned(
    baseline: Paired,
    batch: Batch,
    other: Batch,
    clean: SitePass,
    run: SitePass,
    scored: tuple[Tensor, ...],
) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
    """The paired run's values at this batch's columns, and what can be scored of it."""
    columns, free = _columns(baseline, batch, other)
    missing = columns < 0
    for mask in scored:
        _require_counterparts(mask & (missing & ~free).to(mask.device), batch)
    rows = torch.arange(len(columns))[:, None]
    values = {}
    for n, value in clean.values.items():
        across = run.values[n][rows, columns.clamp(min=0)]
        values[n] = torch.where(missing.to(value.device).unsqueeze(-1), value, across)
    return values, tuple(mask & ~free.to(mask.device) for mask in scored)


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
        met = [position + their_pad if position >= 0 else -1 for position in rows[n]]
        columns[n, pad : pad + length] = torch.tensor(met)
        asked[n, pad : pad + length] = torch.tensor(free[n])
        columns[n, pad + length :] = torch.arange(more) + their_pad + theirs
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
