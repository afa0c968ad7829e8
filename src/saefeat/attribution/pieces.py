"""An attribution's batches: as plain tensors for a checkpoint, and joined to one result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files.hashing import digest
from ..results.provenance import model_identity, remote_identity
from ..results.receipt import Fired, Receipt
from .job import Job
from .passes import SitePasses
from .prepare import Prepared
from .scores import Attribution

if TYPE_CHECKING:
    from nnsight import TransformersModel

_ALWAYS = (
    *("prompt", "dictionary", "position", "latent", "score", "activation", "change"),
    *("clean", "baseline", "tokens"),
)
_SOMETIMES = ("ends", "dropped", "scored")


def identity(
    job: Job,
    model: TransformersModel,
    prepared: Prepared,
    batch_size: int,
    remote: bool | str = False,
) -> dict[str, Any]:
    """Everything that scores depend on; how many nodes share a pass is not among it."""
    paths = ("method", "where", "semantics", "one_site", "backward", "keep")
    return {
        **(remote_identity(model, remote) if remote else model_identity(model)),
        "target": digest(job.target),
        **{name: digest(getattr(job, name)) for name in ("metric", "baseline", *paths)},
        "prompts": digest(prepared.data, prepared.others),
        "batch_size": batch_size,
    }


def plain_piece(piece: Attribution, receipt: Receipt) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A batch's scores as tensors, and its receipt as plain data."""
    names = [name for name in (*_ALWAYS, *_SOMETIMES) if getattr(piece, name) is not None]
    rows = [[row.edit, row.tokens, row.changed, row.largest] for row in receipt.rows]
    tensors = {name: getattr(piece, name) for name in names}
    return tensors, {"passes": receipt.passes, "rows": rows}


def restored(
    saved: tuple[dict[str, Tensor], dict[str, Any]] | None, passes: SitePasses
) -> tuple[Attribution, Receipt] | None:
    """A batch that was finished before, or None."""
    if saved is None:
        return None
    tensors: dict[str, Any] = saved[0]
    meta = saved[1]
    piece = Attribution(tuple(part.dictionary for part in passes.parts), **tensors)
    rows = tuple(Fired(*row) for row in meta["rows"])
    return piece, Receipt(rows, meta["passes"])


def join_attributions(pieces: Sequence[Attribution]) -> Attribution:
    """Batches of prompts as one result; prompts are renumbered in order."""

    def joined(name: str) -> Tensor | None:
        columns = [getattr(piece, name) for piece in pieces]
        return None if any(column is None for column in columns) else torch.cat(columns)

    starts = torch.tensor([0] + [len(piece.tokens) for piece in pieces]).cumsum(0)
    prompt = torch.cat([p.prompt + start for p, start in zip(pieces, starts[:-1], strict=True)])
    columns: dict[str, Any] = {name: joined(name) for name in (*_ALWAYS[1:], *_SOMETIMES)}
    return Attribution(pieces[0].dictionaries, prompt, **columns)
