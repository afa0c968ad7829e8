"""Receipt: how often each edit of a run acted, and where: an event a (token, latent) pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import checked
from ..dictionaries.latents import Latents
from ..kernel.state import Log
from ..model.sites import Site
from .formats import frame
from .outliers import few_hold_much
from .result import Result

if TYPE_CHECKING:
    import pandas


LIMIT = 1 << 22
"""The most events that are kept for one edit: about 300 MB. Beyond it counts are all there is."""
COLUMNS = dict.fromkeys(
    ("prompt", "position", "step", "token", "dictionary", "latent"), torch.int64
) | dict.fromkeys(("before", "after", "norm"), torch.float32)


@dataclass(frozen=True, repr=False, eq=False)
class Events:
    """Where one edit acted: a row for each (token, latent) pair that it changed.

    Rows are in the order of the edit's dictionaries, then of forward passes, prompts, tokens and
    latents. Without a key-value cache every pass shows the whole sequence again, and is edited
    and recorded again.

    Attributes:
        sites: the sites its dictionaries read, in order; ``dictionary`` indexes them.
        prompts: how many prompts were run, changed or not.
        prompt: [n] long.
        position: [n] long, absolute position among the prompt's and generated real tokens.
        step: [n] long, which generated token it was, from 0; −1 for a token of the prompt.
        token: [n] long, its id; −1 where the model was called with embeddings.
        dictionary: [n] long.
        latent: [n] long.
        before: [n] float32 (or wider), the latent as it was read.
        after: [n], what it was changed to: before + the change, to rounding.
        norm: [n], ‖Δ‖ of all that this edit added for this dictionary at this token, before it is
            rounded to the model's dtype; rows of one token share it.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> louder = sf.Clamp(saes.latents({2: [7]}), 3.0, where=sf.Tokens.last(1))
        >>> events = sf.run(model, ["hello", "how do i bake bread"], louder).receipt.rows[0].events
        >>> events.prompt, events.position, events.latent
        (tensor([0, 1]), tensor([1, 5]), tensor([7, 7]))
    """

    sites: tuple[Site, ...]
    prompts: int
    prompt: Tensor
    position: Tensor
    step: Tensor
    token: Tensor
    dictionary: Tensor
    latent: Tensor
    before: Tensor
    after: Tensor
    norm: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    def columns(self) -> dict[str, Tensor]:
        """The columns by name, each [n]."""
        return {name: getattr(self, name) for name in COLUMNS}

    def norms(self) -> tuple[Tensor, Tensor]:
        """‖Δ‖ once for each changed token: keys [m, 4] (prompt, position, step, dictionary), [m].

        A token edited through two dictionaries has two rows.
        """
        keys = torch.stack([self.prompt, self.position, self.step, self.dictionary], 1)
        new = torch.ones(len(keys), dtype=torch.bool)
        new[1:] = (keys[1:] != keys[:-1]).any(1)
        return keys[new], self.norm[new]

    def to_pandas(self) -> pandas.DataFrame:
        """One row an event, with the site by name.

        Raises:
            SaefeatError: without pandas.
        """
        columns: dict[str, Any] = {name: col.numpy() for name, col in self.columns().items()}
        sites = [str(self.sites[number]) for number in columns.pop("dictionary")]
        return frame({"site": sites, **columns}, "Events.to_pandas")

    def __repr__(self) -> str:
        if not len(self):
            return f"Events(0 changes in {self.prompts} prompts)"
        keys, norm = self.norms()
        late = int((self.step >= 0).sum())
        lines = [
            f"Events({len(self)} changes at {len(keys)} tokens of {self.prompts} prompts:"
            f" {len(self) - late} in prompts, {late} in generated tokens;"
            f" mean ‖Δ‖ a token {float(norm.mean()):.4g})",
            "  prompt  position   step   token   latent     before      after        ‖Δ‖  site",
        ]
        columns = list(self.columns().values())
        for row in range(min(len(self), 10)):
            p, at, step, token, number, latent, was, now, size = (c[row].item() for c in columns)
            lines.append(
                f"{p:8}{at:10}{step:7}{token:8}{latent:9}{was:11.4g}{now:11.4g}{size:11.4g}"
                f"  {self.sites[int(number)]}"
            )
        more = [f"  ... {len(self) - 10} more"] if len(self) > 10 else []
        return "\n".join(lines + more)


def record_events(latents: Latents, numbers: Sequence[int], log: Log) -> Events | None:
    """The events of one edit, from what the kernel noted under its dictionaries' numbers.

    None where the kernel only counted: too many latents, or too much to keep.
    """
    rows, prompts = [], 0
    for place, number in enumerate(numbers):
        index = torch.tensor(latents.parts[place][1])
        offset = size = 0
        for entry in log.acted.get(number, []):
            if isinstance(entry, Tensor):
                return None
            if entry.begins:
                offset, size = offset + size, entry.rows
            changes = entry.changes()
            row = changes.pop("row")
            changes |= {"prompt": row + offset, "dictionary": torch.full_like(row, place)}
            rows.append(changes | {"latent": index[changes["latent"]]})
        prompts = max(prompts, offset + size)
    columns = {name: torch.zeros(0, dtype=dtype) for name, dtype in COLUMNS.items()}
    if rows:
        columns = {name: torch.cat([row[name] for row in rows]) for name in COLUMNS}
    return Events(tuple(basis.site for basis, _ in latents.parts), prompts, **columns)


def join_events(pieces: Sequence[Events | None]) -> Events | None:
    """Events of several batches, prompts numbered on; None if one has none or they are too many."""
    kept = [piece for piece in pieces if piece is not None]
    if len(kept) < len(pieces) or sum(map(len, kept)) > LIMIT:
        return None
    columns: dict[str, list[Tensor]] = {name: [] for name in kept[0].columns()}
    start = 0
    for piece in kept:
        for name, column in piece.columns().items():
            columns[name].append(column + start if name == "prompt" else column)
        start += piece.prompts
    joined = {name: torch.cat(column) for name, column in columns.items()}
    order = joined["dictionary"].argsort(stable=True)  # dictionaries first, as in one batch
    return Events(kept[0].sites, start, **{name: col[order] for name, col in joined.items()})


@dataclass(frozen=True, repr=False)
class Fired:
    """How often one edit acted.

    Attributes:
        edit: the edit, as it prints.
        tokens: tokens it selected, over all prompts and forward passes; of an edit of several
            dictionaries that skip different tokens, the most that one of them did.
        changed: (token, latent) pairs it really changed.
        largest: the largest change of a latent's activation.
        events: each change with its prompt, token and values; None where only counts were kept:
            for edits of more than 64 latents of one dictionary, and for long runs (4 million
            (token, latent) pairs). ``stream`` keeps them batch by batch.
        selected: tokens by dictionary, of which ``tokens`` is the largest.

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
    selected: tuple[int, ...] = field(default=(), compare=False, repr=False)

    def counts(self) -> list[Any]:
        """All but the events, as plain data for a checkpoint."""
        return [self.edit, self.changed, self.largest, list(self.selected)]

    @classmethod
    def counted(cls, counts: Sequence[Any], events: Events | None = None) -> Fired:
        """What ``counts`` gave, with its events."""
        edit, changed, largest, selected = counts
        return cls(edit, max(selected), changed, largest, events, tuple(selected))

    @property
    def first_share(self) -> float:
        """The share of Σ|change| that lies at prompts' first tokens; NaN without events.

        In many models that token is an outlier, on which latents are as large as nowhere else.
        """
        if self.events is None:
            return math.nan
        size = (self.events.after - self.events.before).abs().double()
        total = float(size.sum())
        return float(size[self.events.position == 0].sum()) / total if total else 0.0

    @property
    def first_weighs(self) -> bool:
        """Whether first tokens hold a large share, being one in eight changed tokens or fewer."""
        if self.events is None or not len(self.events):
            return False
        columns = (self.events.prompt, self.events.position)
        tokens = torch.stack(columns, 1).unique(dim=0)
        firsts = int((tokens[:, 1] == 0).sum())
        return few_hold_much(firsts, len(tokens), self.first_share)

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={getattr(self, name)!r}" for name in _COUNTS)
        return f"Fired({told}{_first(self)})"


_COUNTS = ("edit", "tokens", "changed", "largest")


def _first(row: Fired) -> str:
    """A warning, if there is reason for one."""
    if not row.first_weighs:
        return ""
    return f", {row.first_share:.0%} of Σ|change| at prompts' first tokens"


@checked
@dataclass(frozen=True, repr=False)
class Receipt(Result):
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

    def __repr__(self) -> str:
        many = "" if len(self.rows) == 1 else "s"
        lines = [f"Receipt({len(self.rows)} edit{many}, forward passes {self.passes})"]
        return "\n  ".join([*lines, *map(_line, self.rows[:EDITS]), *self._more()])

    def _more(self) -> list[str]:
        return [f"... {len(self.rows) - EDITS} more"] if len(self.rows) > EDITS else []

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


EDITS = 10
"""Edits that a receipt prints."""


def _line(row: Fired) -> str:
    return (
        f"{row.edit:.160}: {row.tokens} tokens selected, {row.changed} latents of theirs changed,"
        f" by {row.largest:.4g} at most{_first(row)}"
    )


def without_events(receipt: Receipt) -> Receipt:
    """The counts alone."""
    return Receipt(tuple(replace(row, events=None) for row in receipt.rows), receipt.passes)


def join_receipts(receipts: Sequence[Receipt]) -> Receipt:
    """The receipts of several batches as one; events' prompts are numbered on."""
    rows = tuple(
        Fired.counted(
            [
                batches[0].edit,
                sum(row.changed for row in batches),
                max(row.largest for row in batches),
                [sum(each) for each in zip(*(row.selected for row in batches), strict=True)],
            ],
            join_events([row.events for row in batches]),
        )
        for batches in zip(*(receipt.rows for receipt in receipts), strict=True)
    )
    return Receipt(rows, sum(receipt.passes for receipt in receipts))
