"""Sites that have no layer: what the embedding gives, what the last norm gives, and the logits."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import SiteError
from .inferred import is_inferred
from .sites import Place, Site

_NORMS = ("norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "final_norm")
_LAST = (*_NORMS, "embedding_norm")  # the last is LFM2's, and is its last norm
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_TIMES = ("logit_scale", "lm_head_multiplier")
_OVER = ("logits_scaling",)


def place_without_layer(module: nn.Module, container: str, config: Any, site: Site) -> Place:
    """Where one of them lies; ``container`` is the path of the blocks.

    Raises:
        SiteError: for a model that has no such module, caps its logits, or was inferred.
    """
    if is_inferred(module):
        raise SiteError(
            f"saefeat: `site` is {site}, wanted a model whose type is in the table: what"
            f" {type(module).__name__} does with its embeddings and logits was not inferred. Likely"
            " cause: a new family. Try: the module's path, such as lm_head.output"
        )
    if site.kind == "embed":
        return Place(_path_of(module, site, module.get_input_embeddings()), "output")  # type: ignore
    if site.kind == "final_norm":
        stem = module.get_submodule(container.rpartition(".")[0])
        found = [part for name in _LAST if isinstance(part := getattr(stem, name, None), nn.Module)]
        return Place(_path_of(module, site, next(iter(found), None)), "output")
    cap = next((name for name in _CAPS if getattr(config, name, None)), None)
    if cap is not None:
        raise SiteError(
            f"saefeat: `site` is logits, wanted logits that a module gives; {type(module).__name__}"
            f" caps them behind its last module ({cap}). Likely cause: a model of Gemma's kind."
            " Try: final_norm, or the last module's path, such as lm_head.output, before the cap"
        )
    path = _path_of(module, site, module.get_output_embeddings())  # type: ignore
    scale = _scale(config)
    width = int(config.vocab_size)
    return Place(path, "output", part=None if scale == 1 else (0, width, 1, scale))


def _scale(config: Any) -> float:
    """What a model multiplies its logits by."""
    scale = 1.0
    for name in _TIMES:
        scale *= float(getattr(config, name, None) or 1.0)
    for name in _OVER:
        scale /= float(getattr(config, name, None) or 1.0)
    return scale


def _path_of(module: nn.Module, site: Site, part: nn.Module | None) -> str:
    path = next((name for name, one in module.named_modules() if one is part), "")
    if path:
        return path
    raise SiteError(
        f"saefeat: `site` is {site}, wanted a model with such a module. Likely cause:"
        f" {type(module).__name__} is built without it, or keeps it under another name. Try: a"
        " site by its module's path: see model.named_modules()"
    )


def width_without_layer(module: nn.Module, config: Any, site: Site) -> int:
    """How wide it is there: an embedding may be narrower than the stream."""
    if site.kind == "logits":
        return int(config.vocab_size)
    if site.kind == "embed":
        embedding: Any = module.get_input_embeddings()  # type: ignore
        return int(embedding.weight.shape[1])
    return int(config.hidden_size)
