"""Events: every change an edit made, one row a (token, latent) pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dictionaries.latents import Latents
from ..kernel.log import Log
from ..model.sites import Site
from .table import frame

if TYPE_CHECKING:
    import pandas

LIMIT = 1 << 22
"""The most events that are kept for one edit: about 300 MB. Beyond it counts are all there is."""


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
        return {field.name: getattr(self, field.name) for field in fields(self)[2:]}

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
        entries = log.acted.get(number, [])
        index = torch.tensor(latents.parts[place][1])
        offset, size = 0, 0
        for entry in entries:
            if isinstance(entry, Tensor):
                return None
            if entry.begins:
                offset, size = offset + size, entry.rows
            rows.append(_columns(place, index, entry.changes(), offset))
        prompts = max(prompts, offset + size)
    columns = [torch.cat(column) for column in zip(*rows, strict=True)] if rows else _empty()
    return Events(tuple(basis.site for basis, _ in latents.parts), prompts, *columns)


def _columns(
    place: int, index: Tensor, found: dict[str, Tensor], offset: int
) -> tuple[Tensor, ...]:
    """One forward pass's events: a tensor a column."""
    row = found["row"]
    latent = (torch.full_like(row, place), index[found["latent"]])
    values = (found["before"], found["after"], found["norm"])
    return (row + offset, found["position"], found["step"], found["token"], *latent, *values)


def _empty() -> list[Tensor]:
    none = torch.zeros(0)
    return [*[none.long()] * 6, none, none, none]


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
