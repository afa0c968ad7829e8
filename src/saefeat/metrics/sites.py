"""Metrics of a site's value: any function of it, or the activations of latents there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked
from ..dictionaries.given import as_latents
from ..dictionaries.latents import Dictionary, Latents, cast, index_tensor
from ..dictionaries.places import require_one_site
from ..errors import LatentError
from ..kernel.encode import encode
from ..kernel.tokens import select
from ..model.sites import Site
from ..text.tokens import Tokens, plain
from .base import Metric, Reader, Seen, real, require_takes, require_tokenwise


@checked
def at_site(
    site: Site | str, function: Callable[[Tensor, Tensor], Tensor], name: str | None = None
) -> Metric:
    """Any function of a site's value, one number a prompt, each prompt's own.

    Gradients reach what lies before the site, so every watched site must: others are refused.

    Args:
        site: where to look.
        function: value [b, t, d] in at least float32, and the mask of real tokens [b, t], padding
            on the left → [b], as in ``custom``.
        name: how it prints.

    Raises:
        SaefeatError: for a function of other arguments; when it is read, as ``custom``.

    Examples:
        >>> sf.metrics.at_site("resid_post.3", lambda x, mask: x[:, -1].norm(dim=-1))
        at_site('resid_post.3', <lambda>)
    """
    require_takes("metrics.at_site", function, ("value", "mask"))
    place = Site.parse(site)
    label = getattr(function, "__name__", "function") if name is None else name
    shown = f"at_site('{place}', {label})" if name is None else name

    def read(seen: Seen) -> Tensor:
        assert seen.value is not None
        return function(seen.value, real(seen))

    return Metric(shown, lambda _: read, site=place)


@checked
def activation(latents: Any, where: Tokens | None = None) -> Metric:
    """The activations of downstream latents, summed over them and over tokens.

    So attribution runs from latents to a latent, or to a direction's projection. A latent that is
    off has no gradient: such prompts score nothing.

    Args:
        latents: ``Latents`` of one dictionary, or a dictionary (all its latents).
        where: which tokens; the prompt's last by default.

    Returns:
        A metric.

    Raises:
        LatentError: for latents of several dictionaries, or that depend on earlier tokens.

    Examples:
        >>> sf.metrics.activation(sf.Direction(torch.ones(8), site="resid_post.1"))
        activation(Latents(1: resid_post.1 [0]), Tokens.last(1))
    """
    chosen, rule = as_latents(latents, "activation"), where or Tokens.last(1)
    if len(chosen.parts) != 1:
        raise LatentError(
            f"activation: `latents` is of {len(chosen.parts)} dictionaries, wanted latents of one."
            " Likely cause: several sites. Try: one attribution a site, activation(latents.at(s))"
        )
    require_one_site("activation", "latents", chosen, reads=True)
    dictionary: Dictionary = chosen.parts[0][0]
    require_tokenwise("activation", "latents", dictionary)

    def reader(tokenizer: Any) -> Reader:
        # what lowering a token rule asks of a model is its tokenizer
        bound = plain(rule.rule, SimpleNamespace(tokenizer=tokenizer))
        return lambda seen: _summed_latents(seen, chosen, bound)

    name = f"activation({chosen!r}, {rule!r})"
    return Metric(name, reader, site=dictionary.site, apart=True)


def _summed_latents(seen: Seen, chosen: Latents, rule: tuple) -> Tensor:
    """[b]: activations summed over latents and selected tokens."""
    assert seen.value is not None
    x, (dictionary, indices) = seen.value, chosen.parts[0]
    columns = cast(dictionary.columns(index_tensor(indices)), x.dtype, x.device)
    f = encode(columns, x)[0].sum(-1)
    return torch.where(select(rule, seen.view).to(f.device), f, 0.0).sum(1)
