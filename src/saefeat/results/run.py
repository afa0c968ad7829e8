"""Run: what one ``run`` gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..arguments import checked
from .provenance import Provenance
from .readings import Readings
from .receipt import Receipt
from .result import Result

SHOWN = 3
"""Prompts whose text a run prints."""


@checked
@dataclass(frozen=True, repr=False)
class Run(Result):
    """What one ``run`` gave.

    Attributes:
        prompts: token ids of each prompt, without padding.
        completions: generated ids of each prompt, up to and with the stop token.
        texts: completions as text, without special tokens.
        logits: [prompts, vocabulary] float32, for the token after each prompt.
        readings: one ``Readings`` a ``Probe``, in order.
        receipt: how often each edit acted, and where.
        provenance: where the result comes from.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> out = sf.run(model, ["how do i bake bread"], max_new_tokens=3)
        >>> len(out.texts), out.receipt.rows
        (1, ())
    """

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    logits: Tensor
    readings: tuple[Readings, ...]
    receipt: Receipt
    provenance: Provenance

    def __repr__(self) -> str:
        count, new = len(self.prompts), sum(map(len, self.completions))
        told = f"{new} generated tokens" if new else "nothing generated"
        lines = [f"Run({count} prompts of {_range(self.prompts)} tokens, {told})"]
        spoken = [(n, text) for n, text in enumerate(self.texts) if text]
        lines += [f"  {n}: {_first(text)}" for n, text in spoken[:SHOWN]]
        lines += [f"  ... {len(spoken) - SHOWN} more"] if len(spoken) > SHOWN else []
        parts = [*self.readings, self.receipt] if self.receipt.rows else self.readings
        lines += ["  " + repr(part).replace("\n", "\n  ") for part in parts]
        return "\n".join([*lines, f"  from {self.provenance.line}"])


def _range(rows: tuple[tuple[int, ...], ...]) -> str:
    sizes = sorted(map(len, rows)) or [0]
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"


def _first(text: str, words: int = 12) -> str:
    """The first few words of a text, on one line."""
    said = text.split()
    return repr(f"{' '.join(said[:words]):.100}" + (" ..." if len(said) > words else ""))
