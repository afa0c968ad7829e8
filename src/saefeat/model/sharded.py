"""Tensor parallelism: places where a module has one process's part of a value.

nnsight puts the parts together before a block sees them. Plain hooks see what the module sees.
"""

from __future__ import annotations

from torch import nn

from ..errors import SiteError


def sharded(module: nn.Module) -> bool:
    """Whether some of a model's weights are spread over processes."""
    return any(hasattr(weight, "placements") for weight in module.parameters())


def require_whole(module: nn.Module, path: str, end: str) -> None:
    """Refuse a hook at the input of a linear layer that every process has some columns of.

    What is added up over processes is whole where hooks see it: the stream, and what attention and
    MLP add to it.

    Raises:
        SiteError: naming the place.
    """
    weight = getattr(module.get_submodule(path), "weight", None)
    placements = getattr(weight, "placements", ())  # of a DTensor
    if end != "input" or not any(place.is_shard(1) for place in placements):
        return
    raise SiteError(
        f"hooked: `intervention` is at {path}.{end}, of which this process has a part, wanted a"
        " place where the value is whole, such as resid_post, attn_out or mlp_out. Likely cause: a"
        " tensor-parallel model, whose heads and neurons lie in several processes. Try: run, edit"
        " or a trace on a TransformersModel: nnsight gathers the parts"
    )
