"""Run: what one ``run`` gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .provenance import Provenance
from .readings import Readings
from .receipt import Receipt


@dataclass(frozen=True)
class Run:
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
