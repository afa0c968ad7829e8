"""Which columns of a module's value are a site's: queries of a joint projection, or one head's."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import SiteError
from ..kernel.program import Part
from .sites import Site
from .tables import GATED, HEADWISE, JOINT


class Heads(NamedTuple):
    """How many heads attention has, for queries and for keys and values; a head's width."""

    queries: int
    keys: int
    width: int


def heads_of(config: Any) -> Heads:
    """Those that a language model's configuration tells of."""
    queries = int(config.num_attention_heads)
    names = ("num_key_value_heads", "num_kv_heads")
    keys = next((int(n) for name in names if (n := getattr(config, name, None))), queries)
    if getattr(config, "multi_query", False):  # Falcon's newer blocks do not look at it
        keys = keys if getattr(config, "new_decoder_architecture", False) else 1
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return Heads(queries, keys, int(width))


def part_of(site: Site, how: str | None, heads: Heads, width: int) -> Part | None:
    """The columns of a value, ``width`` wide, that are the site's; None for all of them.

    Raises:
        SiteError: for a head the model lacks.
    """
    count = heads.keys if site.kind in ("k", "v") else heads.queries
    if site.head is not None and site.head >= count:
        raise SiteError(
            f"saefeat: `site` is {site}, wanted a head in 0..{count - 1}. Likely cause: queries"
            " share their keys and values, or the dictionary belongs to another model. Try:"
            f" a head of this model, or {site.kind}.{site.layer}, all of them side by side"
        )
    first, some, groups = _layout(site.kind, how, heads)
    size = heads.width if how else width // count
    if site.head is None:
        return (first * size, some * size, groups, 1.0) if how else None
    group, within = divmod(site.head, some)
    return group * (width // groups) + (first + within) * size, size, 1, 1.0


def _layout(kind: str, how: str | None, heads: Heads) -> tuple[int, int, int]:
    """Where heads lie in each of some spans: the first, how many, and the number of spans."""
    if how == JOINT:
        starts = {"q": 0, "k": heads.queries, "v": heads.queries + heads.keys}
        return starts[kind], heads.queries if kind == "q" else heads.keys, 1
    if how == HEADWISE:
        shared = heads.queries // heads.keys
        return {"q": (0, shared), "k": (shared, 1), "v": (shared + 1, 1)}[kind] + (heads.keys,)
    if how == GATED:
        return 0, 1, heads.queries
    return 0, heads.keys if kind in ("k", "v") else heads.queries, 1
