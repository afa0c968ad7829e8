"""Latents that depend on every token before theirs: encoded row by row, from the sequence's start.

A key-value cache shows a forward pass only its new tokens, and padding puts others in front of a
row's own. So the site's earlier values are kept from pass to pass in the view's memory, and each
row's real tokens are encoded without its padding. That is exact, and the whole sequence is
encoded anew at every generated token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .encode import AnyEncoder
from .errors import SaefeatError
from .state import View

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def encode_prefix(
    encoder: AnyEncoder, x: Float[Tensor, "b t d"], view: View, key: Any
) -> tuple[Float[Tensor, "b t k"], Float[Tensor, "b t _"] | None]:
    """What the encoder gives for each row's newest tokens, seen after all of its earlier ones.

    Padding gets zeros. ``key`` names the action in the memory.
    """
    values, shown = remembered(x, view, key)
    found, scales = [], []
    for row in range(len(x)):
        own = values[row][shown[row]]  # [n, d]: this row's tokens, without padding
        f, scale = encoder.encode(own.unsqueeze(0))
        found.append(newest(f[0], view.shown[row]))
        scales.append(None if scale is None else newest(scale[0], view.shown[row]))
    return torch.stack(found), None if scales[0] is None else torch.stack(scales)  # type: ignore[arg-type]


def remembered(
    x: Float[Tensor, "b t d"], view: View, key: Any
) -> tuple[Float[Tensor, "b s d"], Bool[Tensor, "b s"]]:
    """The site's values over all passes so far, and which of them are real tokens."""
    shown = view.shown.to(x.device)
    before = None if view.whole else view.memory.kept.get(key)
    if before is not None:
        x = torch.cat([before[0].to(x.device), x], 1)
        shown = torch.cat([before[1].to(x.device), shown], 1)
    last = view.position[:, -1].to(x.device)
    if not torch.equal(shown.sum(1), last + 1):
        raise SaefeatError(
            "saefeat: a latent that depends on every earlier token cannot be read here: the cache"
            " holds tokens that were not seen. Likely cause: a cache filled before the"
            " intervention was there. Try: run the whole sequence under the intervention."
        )
    view.memory.kept[key] = (x.detach(), shown)
    return x, shown


def newest(f: Float[Tensor, "n k"], shown: Bool[Tensor, "t"]) -> Float[Tensor, "t k"]:
    """One row's values in the columns of this pass."""
    out = f.new_zeros((len(shown), f.shape[1]))
    count = int(shown.sum())
    out[shown.to(f.device)] = f[len(f) - count :]
    return out
