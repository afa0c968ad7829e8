"""Dictionaries that were not trained as SAEs: directions, neurons, and functions of your own.

A direction is a dictionary with one latent: identity activation, f = x · v̂, direction v̂. So
ablating the refusal direction, adding a steering vector and reading a probe's score are the same
verbs on the same kernel as editing an SAE latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from ..arguments import checked
from ..checks import whole
from ..errors import CheckpointError, DictionaryError
from ..files.hashing import digest
from ..kernel.encode import picked
from ..model.sites import Site
from .by_site import Dictionaries
from .latents import Dictionary


@checked
@final
class Direction(Dictionary):
    """One direction, or an orthonormal set of them, read and written at a site.

    ``Ablate(direction)`` is x − (x·v̂)v̂; ``Clamp(direction, add=norm)`` is x + norm·v̂.

    Args:
        vector: [d_model], or [k, d_model] for a subspace. One vector is normalized; the rows of a
            matrix are orthonormalized, so that ablating them removes exactly their span.
        site: where to act.
        name: a label for reports.

    Raises:
        DictionaryError: for a zero, non-finite or rank-deficient input.

    Examples:
        >>> v = sf.Direction(torch.tensor([3.0, 4.0]), site="resid_post.1")
        >>> v.encode(torch.tensor([[1.0, 0.0]])).item()
        0.6000000238418579
    """

    def __init__(self, vector: Tensor, *, site: Site | str, name: str = "direction") -> None:
        rows = torch.atleast_2d(vector.detach()).to(
            torch.promote_types(vector.dtype, torch.float32)
        )
        # The imaginary part would be left out; a mask is no vector.
        real = not vector.is_complex() and vector.dtype != torch.bool
        held = real and rows.ndim == 2 and 0 < len(rows) <= rows.shape[1]
        if not held or not torch.isfinite(rows).all() or bool((rows.norm(dim=1) == 0).any()):
            got = f"of shape {tuple(vector.shape)}" if real else f"of {vector.dtype}"
            got += ", zero or not finite" if held else ""
            raise DictionaryError(
                f"Direction: `vector` is {got}, wanted [d_model] or [k, d_model] with k <= d_model,"
                " finite and not zero. Likely cause: a difference of means between identical prompt"
                " sets. Try: check the activations the direction was made from"
            )
        self._rows = rows / rows.norm(dim=1, keepdim=True) if len(rows) == 1 else _basis(rows)
        self.site = self.write_site = Site.parse(site)
        self.d_sae, self.d_in = self._rows.shape
        self.d_out = self.d_in
        self.name = name

    @classmethod
    def orthonormal(cls, rows: Tensor, *, site: Site | str, name: str = "direction") -> Direction:
        """The direction whose ``vectors`` these are, kept bit for bit.

        Normalizing a unit vector once more moves its last bits; a file must give back what it was
        given.

        Args:
            rows: [k, d_model], orthonormal within rounding, float32 or float64.
            site: where to act.
            name: a label for reports.

        Raises:
            DictionaryError: for rows that are not orthonormal.
        """
        found = cls(rows, site=site, name=name)
        off = (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max()
        if rows.ndim != 2 or off > 1e-4:
            raise DictionaryError(
                f"Direction.orthonormal: `rows` is {float(off):.2g} away from orthonormal, wanted"
                " rows of length 1 at right angles. Likely cause: vectors that were scaled, or not"
                " made by Direction. Try: Direction(rows, site=...), which normalizes"
            )
        found._rows = rows.detach().clone()
        return found

    @classmethod
    def random(
        cls, width: int, *, site: Site | str, seed: int, k: int = 1, name: str | None = None
    ) -> Direction:
        """A direction drawn uniformly from the sphere, the control of a direction's effect.

        Draw one a seed, use it as the direction itself was used (``Ablate``, ``Clamp`` with the
        same ``add=``), and report the direction's effect beside the spread of theirs.

        Args:
            width: of the site.
            site: where to act.
            seed: of the draw; the same numbers on every machine.
            k: how many, orthonormalized: the control of a subspace.
            name: a label for reports.

        Raises:
            DictionaryError: for a width or k below 1, or more directions than the width.

        Examples:
            >>> sf.Direction.random(8, site="resid_post.1", seed=0)
            Direction('random-0', resid_post.1, 8 x 1)
        """
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(max(k, 0), max(width, 0), generator=generator, dtype=torch.float32)
        return cls(rows, site=site, name=name or f"random-{seed}")

    @property
    def vectors(self) -> Tensor:
        """The unit vectors, [k, d_model]."""
        return self._rows.clone()

    def columns(self, indices: Tensor) -> dict[str, Any]:
        return _linear(self._rows[indices])

    @classmethod
    def at_sites(
        cls, vector: Tensor, *, sites: Iterable[Site | str], name: str = "direction"
    ) -> Dictionaries:
        """The same direction at several sites, as activation steering uses it.

        Args:
            vector: [d_model].
            sites: where to place it.
            name: a label for reports.

        Returns:
            One ``Direction`` a site.

        Examples:
            >>> sites = ["resid_post.0", "resid_post.1"]
            >>> sf.Ablate(sf.Direction.at_sites(torch.ones(8), sites=sites)).latents
            Latents(2: resid_post.0 [0], resid_post.1 [0])
        """
        return Dictionaries(cls(vector, site=site, name=name) for site in sites)


@checked
@final
class Neurons(Dictionary):
    """The identity basis: latent i is coordinate i of the site's value.

    Reading all of it reads the residual stream itself; editing one latent edits one coordinate.

    Args:
        site: where to act.
        width: d_model, or the site's width.

    Examples:
        >>> sf.Neurons("resid_post.1", 8).encode(torch.arange(8.0), [2, 3])
        tensor([2., 3.])
    """

    def __init__(self, site: Site | str, width: int) -> None:
        whole("Neurons", "width", width, error=DictionaryError)
        self.site = self.write_site = Site.parse(site)
        self.d_in = self.d_out = self.d_sae = width
        self.name = "neurons"

    def columns(self, indices: Tensor) -> dict[str, Any]:
        return _linear(torch.nn.functional.one_hot(indices, self.d_in).float())

    def content(self, indices: Tensor) -> object:
        return self.d_in, indices.tolist()


@checked
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
        whole("Function", "width", width, error=DictionaryError)
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


def _linear(rows: Tensor) -> dict[str, Any]:
    """The columns of latents that are read along what they write: rows [k, d]."""
    return {
        "activation": "identity",
        "encoder": rows.T.contiguous(),  # [d_in, k]
        "bias": rows.new_zeros(len(rows)),
        "directions": rows.clone(),  # [k, d_out]
        "norm": "none",
    }


def _basis(rows: Tensor) -> Tensor:
    """An orthonormal basis of the rows' span, [k, d]."""
    q, r = torch.linalg.qr(rows.T)
    if bool((r.diagonal().abs() < 1e-6 * r.abs().max()).any()):
        raise DictionaryError(
            f"Direction: `vector` is {len(rows)} rows of lower rank, wanted linearly independent"
            " rows. Likely cause: a direction listed twice. Try: drop the dependent rows"
        )
    return q.T.contiguous()
