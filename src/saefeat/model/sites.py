"""Sites: the places in a transformer at which a dictionary reads or writes.

A site is a kind and a layer, written as TransformerLens writes hook names, because that is what
SAE releases declare. Where it lies in a Hugging Face model depends on the family; the table below
was checked on tensors. The trap it removes: on Gemma-2 and Gemma-3 what TransformerLens calls
``hook_mlp_out`` is not the MLP's output but that of the norm behind it, and no error says so.

Any other place is a site by its module's path, ``model.layers.3.mlp.gate_proj.output``; ``route``
tries those out, since nothing tells when a model reaches them, nor how wide they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from ..arguments import checked
from ..errors import SiteError
from ..kernel.program import Part

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn_norm": "ln1.hook_normalized",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_norm": "ln2.hook_normalized",
    "mlp_in": "mlp.hook_in",
    "router": "mlp.gate.hook_out",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Site kind → TransformerLens hook, in the order a block reaches them."""

WHOLE = {"embed": "hook_embed", "final_norm": "ln_final.hook_out", "logits": "unembed.hook_out"}
"""Kinds of which a model has one, whatever its layers, in the order it reaches them."""


_ORDER = {kind: order for order, kind in enumerate(HOOKS)}


_AROUND = {"embed": -1, "final_norm": sys.maxsize - 1, "logits": sys.maxsize}
"""The layer that each of the model's own would have."""


HEADS = ("q", "k", "v", "z")
"""The kinds that are heads side by side."""


_NAME = re.compile(
    r"blocks\.(?P<at>\d+)(?::(?P<its>\d+))?\.(?P<hook>[\w.]+)"
    r"|(?P<kind>[a-z_]+)\.(?P<layer>\d+)(?::(?P<head>\d+))?"
)


_PATH = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)\.(input|output)")


Order = tuple[int, int, int, str]
"""Sorts sites."""


@checked(error=SiteError, own=("layer",))
@dataclass(frozen=True)
class Site:
    """A place in the model: a kind (``resid_post``, ``mlp_out``, ...) and a layer, or a module.

    Args:
        kind: one of ``resid_pre``; ``attn_norm``, the attention's input normalized without the
            norm's weight (or a state-space mixer's, in a layer that has one); ``q``, ``k`` and
            ``v``, what attention projects, all heads side by side, before any norm or rotation of
            theirs; ``z``, all heads side by side before the output projection; ``attn_out``, what
            is added to the stream; ``resid_mid``; ``mlp_norm``, the MLP's input normalized without
            the norm's weight; ``mlp_in``, what the MLP is given; ``router``, the logits by which
            experts are chosen; ``mlp_post``, after its activation; ``mlp_out``, what is added to
            the stream; ``resid_post``. Without a layer, one of ``embed``, what the token embedding
            gives; ``final_norm``, what the last norm gives, its weight included; ``logits``. Or,
            without a layer, a module's path as the model names it and ``.input`` or ``.output``:
            the first thing it is given or returns, which must be [batch, tokens, width] and come
            once a forward pass.
        layer: 0-based; None for a module's path and for the last three.
        head: one head of ``q``, ``k``, ``v`` or ``z``, 0-based; None for all of them. Where
            queries share keys and values, these have fewer heads.

    Raises:
        SiteError: for an unknown kind, a negative layer or head, a path with a layer, or a head
            of what has none.

    Examples:
        >>> sf.Site("resid_post", 15).hook
        'blocks.15.hook_resid_post'
        >>> print(sf.Site("z", 15, head=3))
        z.15:3
        >>> sf.Site.parse("blocks.15.hook_resid_post") == sf.Site.parse("resid_post.15")
        True
        >>> print(sf.Site.parse("model.layers.3.mlp.gate_proj.output"))
        model.layers.3.mlp.gate_proj.output
    """

    kind: str
    layer: int | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        path = _PATH.fullmatch(self.kind)
        if not path and self.kind not in HOOKS and self.kind not in WHOLE:
            call = f'Site("{_nearest(self.kind, HOOKS)}", 3) or Site("model.layers.3.mlp.output")'
            raise SiteError(
                f"Site: `kind` is {self.kind!r}, wanted one of {', '.join((*HOOKS, *WHOLE))}, or"
                " a module's path and its end. Likely cause: a misspelt or unsupported site. Try:"
                f" {call}"
            )
        if path and self.layer is not None:
            raise SiteError(
                f"Site: `layer` is {self.layer!r}, wanted none beside a module's path. Likely"
                f" cause: the path names its layer itself. Try: Site({self.kind!r})"
            )
        if self.kind in WHOLE and self.layer is not None:
            raise SiteError(
                f"Site: `layer` is {self.layer!r} for {self.kind}, wanted none. Likely cause: a"
                f" model has one of these, and not one a layer. Try: Site({self.kind!r})"
            )
        if not path and self.kind not in WHOLE and (type(self.layer) is not int or self.layer < 0):
            raise SiteError(
                f"Site: `layer` is {self.layer!r}, wanted an integer from 0. Likely cause: layers"
                ' are counted from the first, never from the last. Try: Site("resid_post", 3)'
            )
        counted = type(self.head) is int and self.head >= 0
        if self.head is not None and not (counted and self.kind in HEADS):
            raise SiteError(
                f"Site: `head` is {self.head!r} for {self.kind}, wanted an integer from 0 beside"
                f" one of {', '.join(HEADS)}. Likely cause: only these are heads side by side."
                ' Try: Site("z", 3, head=5)'
            )

    @classmethod
    def parse(cls, name: str | Site) -> Site:
        """Read a site from a hook's name, its short form, or a module's path and its end.

        Args:
            name: ``"blocks.3.hook_resid_post"``, ``"resid_post.3"`` or
                ``"model.layers.3.mlp.output"``; ``"blocks.3:5.attn.hook_z"`` or ``"z.3:5"`` is
                head 5 alone.

        Raises:
            SiteError: if the name is none of them.
        """
        if isinstance(name, Site):
            return name
        match = _NAME.fullmatch(name)
        kinds = {hook: kind for kind, hook in HOOKS.items()}
        if match and (kind := kinds.get(match["hook"]) or match["kind"]) in HOOKS:
            layer, head = match["at"] or match["layer"], match["its"] or match["head"]
            return cls(kind, int(layer), None if head is None else int(head))
        whole = {hook: kind for kind, hook in WHOLE.items()}
        if name in WHOLE or name in whole or _PATH.fullmatch(name):
            return cls(whole.get(name, name))
        raise SiteError(
            f"Site.parse: `name` is {name!r}, wanted blocks.<layer>.<hook> with hook in"
            f" {', '.join(HOOKS.values())}, or a module's path that ends in .input or .output."
            " Likely cause: a hook this version has no place for, or a typing error. Try:"
            f" {_meant(name)}"
        )

    @property
    def is_path(self) -> bool:
        """Whether it is a module's path, of which the table says nothing."""
        return self.layer is None and self.kind not in WHOLE

    @property
    def hook(self) -> str:
        """The TransformerLens hook name; a module's path as it is."""
        if self.layer is None:
            return WHOLE.get(self.kind, self.kind)
        return f"blocks.{self.layer}{self._ending()}.{HOOKS[self.kind]}"

    @property
    def order(self) -> Order:
        """Sorts sites for display: the table's as a pass reaches them, then paths by name.

        In which order a model reaches a path is for ``route`` to find out.
        """
        if self.kind in WHOLE:
            return (0, _AROUND[self.kind], 0, self.kind)
        if self.layer is None:
            return (1, 0, 0, re.sub(r"\d+", lambda number: number[0].zfill(6), self.kind))
        return (0, self.layer, _ORDER[self.kind], "")

    def _ending(self) -> str:
        return "" if self.head is None else f":{self.head}"

    def __repr__(self) -> str:
        head = "" if self.head is None else f", head={self.head}"
        return f"Site(kind={self.kind!r}, layer={self.layer!r}{head})"

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}{self._ending()}"


def _meant(name: str) -> str:
    """The call to make in place of one with a name that is no site."""
    number = re.search(r"\d+", name)
    layer = number[0] if number else "3"
    words = re.split(r"[.\s]", name.strip())
    if len(words) > 2 and words[0] != "blocks":  # a module's path without its end
        return f'Site.parse("{name.strip()}.output"), or .input'
    last = next((word for word in reversed(words) if not word.isdigit()), "")
    short = re.sub(r"(?<!^)(?=[A-Z])", "_", last).lower().removeprefix("hook_")
    call = f'Site.parse("{_nearest(short, HOOKS)}.{layer}")'
    return f'{call} or, for any module, Site.parse("model.layers.{layer}.mlp.output")'


def _nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is spelled most alike; resid_post where none is."""
    return next(iter(get_close_matches(word, known, 1)), "resid_post")


class Place(NamedTuple):
    """Where a site lies in one model.

    Attributes:
        path: the module.
        end: its ``input`` or ``output``.
        transform: ``rms`` or ``layer`` where the site is a norm's value without its weight.
        eps: that norm's epsilon.
        plus: the path of the block whose input is added to the value found here. resid_mid has no
            module: it is the block's input plus the attention's output, and is written there.
        part: the columns that are the site's and what they are multiplied by, if the value is not
            the site's as it stands.
        aside: whether the model goes on with another value, computed before this one: it can be
            read, and an edit would do nothing.
    """

    path: str
    end: str
    transform: str | None = None
    eps: float = 0.0
    plus: str | None = None
    part: Part | None = None
    aside: bool = False

    def plain(self) -> Place:
        """Where the value itself lies, which sites with and without a norm share."""
        return self._replace(transform=None, eps=0.0)
