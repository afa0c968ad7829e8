"""Where an edit acted in one forward pass, as plain columns.

They are worked out once the run is over: on a server before its log leaves, here when a receipt is
made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def changes(
    step: Float[Tensor, "b t k"],
    mask: Bool[Tensor, "b t 1"],
    seen: dict[str, Any],
    directions: Float[Tensor, "n d_out"],
) -> dict[str, Tensor]:
    """One pass's events, a tensor [m] a column, one row a changed (token, latent) pair.

    ``row`` is the row of the batch, ``latent`` the latent's place in the selection; the others
    are as ``saefeat.results.events`` documents them.
    """
    change = torch.where(mask, step, 0.0)
    row, column, latent = (change != 0).nonzero(as_tuple=True)
    token = (change != 0).any(-1)  # [b, t]
    written = torch.where(mask, seen["written"], 0.0)  # of all latents, where a topk reselects
    delta = written[token] @ directions.to(step.device)  # [tokens, d_out]
    if seen["scale"] is not None:
        delta = delta * seen["scale"][token]
    norm = torch.zeros_like(change[..., 0]).masked_scatter(token, delta.norm(dim=-1))
    before = seen["before"][row, column, latent]
    after = before + change[row, column, latent]
    found = {"row": row, "latent": latent, "before": before, "after": after}
    found = {name: value.cpu() for name, value in (found | {"norm": norm[row, column]}).items()}
    place = (found["row"], column.cpu())
    position, lengths = seen["position"].cpu()[place], seen["lengths"].cpu()[found["row"], 0]
    found |= {"position": position, "step": torch.where(position < lengths, -1, position - lengths)}
    ids = seen["ids"]
    return found | {"token": torch.full_like(position, -1) if ids is None else ids.cpu()[place]}
