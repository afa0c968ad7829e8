"""An intervention as plain steering vectors, where it is nothing but the addition of a constant."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import checked
from ..dictionaries.latents import index_tensor
from ..errors import LatentError
from ..files.container import refuse, write
from ..model.sites import Site
from ..text.tokens import Tokens
from ..values.declared import same
from ..verbs.base import Intervention, Step
from ..verbs.edits import Clamp


@checked(own=("intervention",))
def steering_vector(
    intervention: Intervention, *, path: str | Path | None = None
) -> dict[Site, Tensor]:
    """What an intervention adds to each site at every token, if that is all it does.

    ``Clamp(latents, add=...)`` adds Σ add_i · direction_i whatever the latents' activations are, so
    it is a steering vector, and any tool that adds vectors to the residual stream can apply it.
    Every other edit depends on the activations, the token or the prompt, and is refused.

    Args:
        intervention: ``Clamp(..., add=...)``, or a chain of them, on every token.
        path: write the vectors there too, as a safetensors file with one float32 tensor [d_out] a
            site, named by its hook (``blocks.3.hook_resid_post``).

    Returns:
        Site → [d_out], float32 or wider, in the order in which the model reaches the sites.

    Raises:
        LatentError: for an intervention that is not the addition of a constant, saying why.
        FileError: for a path that cannot be written.

    Examples:
        >>> v = sf.Direction(torch.tensor([3.0, 4.0]), site="resid_post.1")
        >>> sf.hub.steering_vector(sf.Clamp(v, add=5.0))
        {Site(kind='resid_post', layer=1): tensor([3., 4.])}
    """
    found: dict[Site, Tensor] = {}
    for step in intervention.parts():
        add = _constant(step)
        start = 0
        for dictionary, indices in step.latents.parts:
            columns = dictionary.columns(index_tensor(indices))
            _require(
                columns["norm"] == "none" and columns["activation"] != "error",
                step,
                f"{dictionary!r}, whose directions scale with the activations",
            )
            part = add[start : start + len(indices)]
            for site, rows in dictionary.writes(indices).items():  # [k, d_out]
                before = found.get(site, rows.new_zeros(rows.shape[1]))
                found[site] = before + part.to(rows.dtype) @ rows
            start += len(indices)
    _require(bool(found), intervention, "no edit at all")
    ordered = {site: found[site] for site in sorted(found, key=lambda site: site.order)}
    if path is not None:
        _write(ordered, path)
    return ordered


def _constant(step: Step) -> Tensor:
    """What a step adds to each of its latents, [k], if it does nothing else."""
    _require(isinstance(step, Clamp), step, "another verb than Clamp")
    assert isinstance(step, Clamp)
    add = step.add
    for field in fields(step):
        if field.name not in ("latents", "add", "where"):
            given = getattr(step, field.name)
            _require(same(given, field.default), step, f"{field.name}=")
    _require(step.latents.written == "frozen", step, f"latents.{step.latents.written}()")
    plain = isinstance(add, (int, float, Tensor))
    _require(plain, step, "no add=" if add is None else f"add={type(add).__name__}")
    found = torch.as_tensor(add)
    _require(found.ndim < 2, step, "values that differ by prompt")
    where: Tokens | None = step.rule
    everywhere = where is None or where == Tokens.all()
    _require(everywhere, step, f"where={where!r}")
    for basis, _ in step.latents.parts:
        skips = where is None and bool(getattr(basis, "excluded", ()))
        _require(not skips, step, f"{basis!r}, which skips tokens it was not trained on")
    return found.expand(len(step.latents))


def _require(met: bool, subject: object, got: str) -> None:
    if not met:
        raise LatentError(
            f"steering_vector: `intervention` is {subject!r}, with {got}, wanted Clamp(latents,"
            " add=...) alone, on every token. Likely cause: an edit that depends on the"
            " activations, the token or the prompt is no constant vector. Try: sf.save, which keeps"
            " it as it is; or Clamp(direction, add=..., where=sf.Tokens.all())"
        )


def _write(vectors: dict[Site, Tensor], path: str | Path) -> None:
    from safetensors.torch import save

    names = {site.hook: vector.float().contiguous() for site, vector in vectors.items()}
    if Path(path).suffix != ".safetensors":
        wanted = "a name that ends in .safetensors"
        call = 'path="steer.safetensors"'
        raise refuse("steering_vector", repr(str(path)), wanted, "another format", call)
    write(path, save(names, metadata={"format": "pt"}), "steering_vector")
