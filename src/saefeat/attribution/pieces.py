"""An attribution's finished batches as plain tensors, and what tells its job from another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..dictionaries.latents import as_latents
from ..files.identity import digest, model_identity, remote_identity
from ..results.receipt import Fired, Receipt
from .passes import Watch
from .prepare import Data
from .scores import Attribution

if TYPE_CHECKING:
    from .attribute import Attribute

_ALWAYS = (
    *("prompt", "dictionary", "position", "latent", "score", "activation", "change"),
    *("clean", "baseline", "tokens"),
)
_SOMETIMES = ("ends", "dropped", "scored")


def identity(
    job: Attribute, model: Any, data: Data, batch_size: int, remote: bool | str = False
) -> dict[str, Any]:
    """Everything that scores depend on; how many nodes share a pass is not among it."""
    paths = ("method", "where", "semantics", "one_site", "backward", "keep")
    return {
        **(remote_identity(model, remote) if remote else model_identity(model)),
        "target": digest(as_latents(job.target, "Attribute")),
        **{name: digest(getattr(job, name)) for name in ("metric", "baseline", *paths)},
        "prompts": digest(*data),
        "batch_size": batch_size,
    }


def plain_piece(piece: Attribution, receipt: Receipt) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A batch's scores as tensors, and its receipt as plain data."""
    names = [name for name in (*_ALWAYS, *_SOMETIMES) if getattr(piece, name) is not None]
    rows = [[row.edit, row.tokens, row.changed, row.largest] for row in receipt.rows]
    tensors = {name: getattr(piece, name) for name in names}
    return tensors, {"passes": receipt.passes, "rows": rows}


def restored(
    held: tuple[dict[str, Tensor], dict[str, Any]] | None, watch: Watch
) -> tuple[Attribution, Receipt] | None:
    """A batch that was finished before, or None."""
    if held is None:
        return None
    tensors: dict[str, Any] = held[0]
    meta = held[1]
    found = Attribution(tuple(part.dictionary for part in watch.parts), **tensors)
    rows = tuple(Fired(*row) for row in meta["rows"])
    return found, Receipt(rows, meta["passes"])
