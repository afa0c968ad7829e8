"""Actions that read latents: for an edit, for a probe, for a condition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .encode import AnyEncoder
from .errors import SaefeatError
from .frozen import Frozen
from .prefix import encode_prefix
from .state import Log, State, View, require_one_beam
from .tokens import Everywhere, Where

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class Norm(Frozen):
    """A norm without its weight, where a site is such a value: TransformerLens's ln2."""

    kind: str | None = None  # rms, layer, or None for the value as it is
    eps: float = 0.0


def lift(x: Float[Tensor, "*batch d"], norm: Norm) -> Float[Tensor, "*batch d"]:
    """x in the compute dtype, through the site's own norm."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm.kind is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)


class Source(Frozen):
    """Latents and where they are read."""

    encoder: AnyEncoder
    norm: Norm  # the site's
    plus: str | None  # the block whose input is added to the value

    def latents(
        self, x: Float[Tensor, "b t d"], state: State
    ) -> tuple[Float[Tensor, "b t k"], Float[Tensor, "b t _"] | None]:
        """Their activations, and the scale of their directions."""
        value = lift(state.whole(x, self.plus), self.norm)
        return state.placed.at(self.encoder, x).encode(value)


class LookingBack(Source):
    """Latents that depend on every token before theirs."""

    key: int  # by which they find what they remember across passes

    def latents(
        self, x: Float[Tensor, "b t d"], state: State
    ) -> tuple[Float[Tensor, "b t k"], Float[Tensor, "b t _"] | None]:
        """Their activations, and the scale of their directions."""
        value = lift(state.whole(x, self.plus), self.norm)
        return encode_prefix(state.placed.at(self.encoder, x), value, state.view, self.key)


class Read(Frozen):
    """Encode latents and hold them."""

    number: int  # of the dictionary in the program, by which a write or a log finds them
    source: Source  # which latents, and where
    tokens: Everywhere | Where  # which of them count

    def apply(self, x: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        f, scale = self.source.latents(x, state)
        state.held[self.number] = (f, scale, *self.tokens.at(state.view, x.device))
        return x


class Test(Frozen):
    """Hold where a condition is met: any or all of its latents within bounds, at a real token.

    A condition may read several dictionaries, one test each.
    """

    name: str  # of the condition
    source: Source
    above: float | None
    below: float | None
    every: bool  # whether all latents must be within the bounds
    hold: bool  # whether it stays met for the rest of the sequence, later passes included
    of: int  # how many tests the condition has

    def apply(self, x: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        f = self.source.latents(x, state)[0].detach()
        within = torch.ones_like(f, dtype=torch.bool)
        if self.above is not None:
            within = within & (f > self.above)
        if self.below is not None:
            within = within & (f < self.below)
        hit = within.all(-1, keepdim=True) if self.every else within.any(-1, keepdim=True)
        hit = hit & state.view.real.unsqueeze(-1).to(f.device)
        before, made = state.met.get(self.name, (None, 0))
        if before is not None:
            before = before.to(f.device)
            hit = hit & before if self.every else hit | before
        if self.hold and made + 1 == self.of:
            kept = state.view.memory.kept
            hit = hit.int().cummax(1).values.bool()
            if self.name in kept and not state.view.whole:  # what is shown again is tested again
                hit = hit | kept[self.name].to(f.device)
            kept[self.name] = hit[:, -1:]
        state.met[self.name] = (hit, made + 1)
        return x


class Collect(Frozen):
    """Put what was read into the log: every token of this pass, or one running value a prompt.

    A reduced reading is one tensor [b, 1, k] (for ``mean`` also a count) however long the run, so
    that reading all latents of a dictionary does not need [b, t, d_sae] of memory.
    """

    number: int  # of the dictionary
    reduce: str | None  # max, mean or last over the selected tokens; None keeps every token

    def apply(self, x: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        log, view = state.log, state.view
        if log is not None:
            require_one_beam(view.memory, "a Probe")
            one_sequence(log, view)
            if view.whole or view.begins:  # a run begins, or shows its whole sequence once more
                log.readings[self.number], log.masks[self.number] = [], []
            f, _, mask, _ = state.held[self.number]
            record(log, self.number, self.reduce, f.detach(), mask)
        return x


def one_sequence(log: Log, view: View) -> None:
    """Refuse readings of two sequences that are run in turns: a log holds those of one."""
    if view.begins:
        log.read = view.memory
    elif log.read is not view.memory:
        raise SaefeatError(
            "saefeat: two sequences are run in turns, and a probe's readings are of one. Likely"
            " cause: guidance_scale, or loops over two caches. Try: generate without it, a"
            " block for each sequence, or both as rows of one batch."
        )


def record(
    log: Log,
    number: int,
    reduce: str | None,
    f: Float[Tensor, "b t k"],
    mask: Bool[Tensor, "b t 1"],
) -> None:
    """Append a pass to a reading, or take it into the running value."""
    values, masks = log.readings.setdefault(number, []), log.masks.setdefault(number, [])
    if reduce is None:
        values.append(f.clone())
        masks.append(mask.squeeze(-1).clone())
        return
    seen = mask.sum(1, keepdim=True)  # [b, 1, 1]
    if reduce == "max":
        now = torch.where(mask, f, -torch.inf).amax(1, keepdim=True)
        now = torch.maximum(values[0], now) if values else now
    elif reduce == "mean":  # a sum until the run is over
        now = torch.where(mask, f, 0.0).sum(1, keepdim=True)
        now = values[0] + now if values else now
    else:
        column = torch.arange(f.shape[1], device=f.device)[None, :, None]
        last = torch.where(mask, column, 0).amax(1, keepdim=True).expand(-1, 1, f.shape[2])
        now = f.gather(1, last)
        now = torch.where(seen > 0, now, values[0]) if values else now
    seen = masks[0] + seen.squeeze(-1) if masks else seen.squeeze(-1)
    values[:], masks[:] = [now], [seen]
