"""Receipt: how often each edit of a run acted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .events import Events, join_events
from .table import frame

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Fired:
    """How often one edit acted.

    Attributes:
        edit: the edit, as it prints.
        tokens: tokens it selected, over all prompts and forward passes.
        changed: (token, latent) pairs it really changed.
        largest: the largest change of a latent's activation.
        events: each change with its prompt, token and values; None where only counts were kept:
            for edits of more than 64 latents of one dictionary, and for long runs (4 million
            (token, latent) pairs). ``stream`` keeps them batch by batch.

    Examples:
        >>> from saefeat.results.receipt import Fired
        >>> Fired("Ablate(...)", tokens=6, changed=2, largest=1.5).changed
        2
    """

    edit: str
    tokens: int
    changed: int
    largest: float
    events: Events | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Receipt:
    """What a run's edits did: one row an edit.

    Attributes:
        rows: one ``Fired`` an edit, in the intervention's order.
        passes: forward passes seen, summed over batches.

    Examples:
        >>> sf.results.Receipt((), passes=3).unfired
        ()
    """

    rows: tuple[Fired, ...]
    passes: int

    @property
    def unfired(self) -> tuple[str, ...]:
        """Edits that selected no token at all."""
        return tuple(row.edit for row in self.rows if row.tokens == 0)

    def __add__(self, other: Receipt) -> Receipt:
        return join_receipts([self, other])

    def to_pandas(self) -> pandas.DataFrame:
        """Every event of every edit, with the edit as it prints; edits without events are absent.

        Raises:
            SaefeatError: without pandas.
        """
        columns: dict[str, list[Any]] = {"edit": []}
        for row in self.rows:
            table = {} if row.events is None else row.events.to_pandas().to_dict("list")
            columns["edit"] += [row.edit] * len(table.get("site", ()))
            for name, column in table.items():
                columns.setdefault(name, []).extend(column)
        return frame(columns, "Receipt.to_pandas")


def join_receipts(receipts: Sequence[Receipt]) -> Receipt:
    """The receipts of several batches as one; events' prompts are numbered on."""
    rows = tuple(
        Fired(
            batches[0].edit,
            sum(row.tokens for row in batches),
            sum(row.changed for row in batches),
            max(row.largest for row in batches),
            join_events([row.events for row in batches]),
        )
        for batches in zip(*(receipt.rows for receipt in receipts), strict=True)
    )
    return Receipt(rows, sum(receipt.passes for receipt in receipts))
