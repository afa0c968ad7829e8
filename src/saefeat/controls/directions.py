"""random_directions: the same latents, writing along directions drawn at random."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..dictionaries.latents import Dictionary, Latents, as_latents


def random_directions(latents: Latents, *, seed: int) -> Latents:
    """The same latents, read as they are, each writing a random direction of its own length.

    An edit of them moves the site at the same tokens and by the same length as the edit of the
    latents themselves (of one latent exactly, of several on average), elsewhere.

    Args:
        latents: the selection to be controlled for.
        seed: of the directions; a latent's is the same in every selection.

    Examples:
        >>> sae = sf.SAE.from_tensors({"W_enc": torch.randn(8, 32), "b_enc": torch.zeros(32),
        ...     "W_dec": torch.randn(32, 8), "b_dec": torch.zeros(8)}, site="resid_post.1")
        >>> control = sf.controls.random_directions(sae.latents([3, 7]), seed=0)
        >>> control
        Latents(2: resid_post.1 [3, 7])
        >>> round(float(control.parts[0][0].directions([3]).norm() / sae.directions([3]).norm()), 4)
        1.0
    """
    chosen = as_latents(latents, "random_directions")
    return Latents(tuple((_Redirected(basis, seed), ix) for basis, ix in chosen.parts))


@final
class _Redirected(Dictionary):
    """A dictionary with random directions of the same lengths; made by ``random_directions``."""

    def __init__(self, dictionary: Dictionary, seed: int) -> None:
        self._inner, self._seed = dictionary, seed
        self.site, self.write_site = dictionary.site, dictionary.write_site
        self.d_in, self.d_out, self.d_sae = dictionary.d_in, dictionary.d_out, dictionary.d_sae
        self.excluded, self.prefix = dictionary.excluded, dictionary.prefix
        self.centered = getattr(dictionary, "centered", False)
        self.name = f"random directions {seed} of {dictionary.name}"

    def columns(self, indices: Tensor) -> dict[str, Any]:
        columns = self._inner.columns(indices)
        rows = columns["directions"]
        drawn = torch.stack([self._drawn(int(index)) for index in indices]).to(rows)
        drawn = drawn / drawn.norm(dim=1, keepdim=True) * rows.norm(dim=1, keepdim=True)
        return columns | {"directions": drawn}

    def _drawn(self, index: int) -> Tensor:
        """[d_out]: of one latent, whatever else is selected."""
        number = (self._seed * 1_000_003 + index) % 2**63
        return torch.randn(self.d_out, generator=torch.Generator().manual_seed(number))

    def content(self, indices: Tensor) -> object:
        return self._inner.fingerprint(indices), indices.tolist(), self._seed
