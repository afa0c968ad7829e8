"""A dictionary from two functions: for architectures this library does not know."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, final

from torch import Tensor

from ..errors import CheckpointError, DictionaryError
from ..hashing import digest
from ..kernel.encode import picked
from ..model.sites import Site
from .latents import Dictionary


@final
class Function(Dictionary):
    """Any encoder with linear directions: what f is, and what one unit of each latent adds.

    The whole encoder runs at every token, so a few latents cost as much as all of them. Edits keep
    the delta form: x' = x + (f' − f) · directions, other latents as they were (``frozen``).

    Args:
        encode: x [..., d_in] → f [..., d_sae], differentiable if attribution is wanted, without
            state between calls, and without mixing positions, unless ``prefix`` says so.
        directions: [d_sae, d_out].
        site: where it reads.
        width: d_in.
        write_site: where it writes; the read site by default.
        name: a label for reports. The fingerprint is a hash of the function's code and of what it
            encloses; where that cannot be hashed, it is this name, which should then change when
            the function does.
        prefix: f depends on earlier tokens: ``encode`` is then given [1, tokens, d_in], one row's
            real tokens from the start of its sequence, and must not look ahead. Exact under
            padding and in generation with a cache, where the whole sequence is encoded anew at
            every token; not under beam search, which changes rows about between tokens.

    Raises:
        DictionaryError: for directions that are not a matrix.

    Examples:
        >>> squares = sf.dictionaries.Function(
        ...     lambda x: x**2, torch.eye(4), site="resid_post.0", width=4
        ... )
        >>> squares.encode(torch.tensor([1.0, 2.0, 3.0, 4.0]), [1, 3])
        tensor([ 4., 16.])
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        directions: Tensor,
        *,
        site: Site | str,
        width: int,
        write_site: Site | str | None = None,
        name: str = "generic",
        prefix: bool = False,
    ) -> None:
        if directions.ndim != 2:
            raise DictionaryError(
                f"Function: `directions` is of shape {tuple(directions.shape)}, wanted [d_sae,"
                " d_out]. Likely cause: one direction without its first dimension. Try:"
                " directions.unsqueeze(0)"
            )
        self._encode, self._directions = encode, directions.detach()
        self.site = Site.parse(site)
        self.write_site = self.site if write_site is None else Site.parse(write_site)
        self.d_in = width
        self.d_sae, self.d_out = directions.shape
        self.name, self.prefix, self.joint = name, prefix, True

    def columns(self, indices: Tensor) -> dict[str, Any]:
        return {
            "activation": partial(picked, self._encode, indices),
            "directions": self._directions[indices].clone(),  # [k, d_out]
            "norm": "none",
            "prefix": self.prefix,
        }

    def content(self, indices: Tensor) -> object:
        try:
            function = digest(self._encode)
        except CheckpointError:  # it holds an object that cannot be read: the name stands for it
            function = ""
        return self.name, function, indices.tolist(), self._directions[indices]
