"""Sites: the places in a transformer at which a dictionary reads or writes.

A site is a kind and a layer, written as TransformerLens writes hook names, because that is what
SAE releases declare. Where it lies in a Hugging Face model depends on the family; the table below
was checked on tensors. The trap it removes: on Gemma-2 and Gemma-3 what TransformerLens calls
``hook_mlp_out`` is not the MLP's output but that of the norm behind it, and no error says so.

Any other place is a site by its module's path, ``model.layers.3.mlp.gate_proj.output``; ``route``
tries those out, since nothing tells when a model reaches them, nor how wide they are.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from .errors import ModelError, SiteError, explain
from .families import FAMILIES, NESTED, SKIP, TEXT

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_norm": "ln2.hook_normalized",
    "mlp_in": "mlp.hook_in",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Site kind → TransformerLens hook, in the order a block reaches them."""

_ORDER = {kind: order for order, kind in enumerate(HOOKS)}
_NAME = re.compile(r"(?:blocks\.(\d+)\.([\w.]+)|([a-z_]+)\.(\d+))")
_PATH = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)\.(input|output)")
Order = tuple[int, int, int, str]
"""Sorts sites."""


@dataclass(frozen=True)
class Site:
    """A place in the model: a kind (``resid_post``, ``mlp_out``, ...) and a layer, or a module.

    Args:
        kind: one of ``resid_pre``; ``z``, all heads side by side before the output projection;
            ``attn_out``; ``resid_mid``; ``mlp_norm``, the MLP's input normalized without the
            norm's weight; ``mlp_in``, what the MLP is given; ``mlp_post``, after its activation;
            ``mlp_out``; ``resid_post``. Or, without a layer, a module's path as the model names
            it and ``.input`` or ``.output``: the first thing it is given or returns, which must
            be [batch, tokens, width] and come once a forward pass.
        layer: 0-based; None for a module's path.

    Raises:
        SiteError: for an unknown kind, a negative layer, or a path with a layer.

    Examples:
        >>> sf.Site("resid_post", 15).hook
        'blocks.15.hook_resid_post'
        >>> sf.Site.parse("blocks.15.hook_resid_post") == sf.Site.parse("resid_post.15")
        True
        >>> print(sf.Site.parse("model.layers.3.mlp.gate_proj.output"))
        model.layers.3.mlp.gate_proj.output
    """

    kind: str
    layer: int | None = None

    def __post_init__(self) -> None:
        path = isinstance(self.kind, str) and _PATH.fullmatch(self.kind)
        if not path and self.kind not in HOOKS:
            raise SiteError(
                explain(
                    "Site",
                    "kind",
                    got=repr(self.kind),
                    wanted="one of " + ", ".join(HOOKS) + ", or a module's path and its end",
                    cause="a misspelt or unsupported site",
                    call='Site("resid_post", 3) or Site("model.layers.3.mlp.output")',
                )
            )
        if path and self.layer is not None:
            raise SiteError(
                explain(
                    "Site",
                    "layer",
                    got=repr(self.layer),
                    wanted="none beside a module's path",
                    cause="the path names its layer itself",
                    call=f"Site({self.kind!r})",
                )
            )
        if not path and (not isinstance(self.layer, int) or self.layer < 0):
            raise SiteError(
                explain(
                    "Site",
                    "layer",
                    got=repr(self.layer),
                    wanted="an integer from 0",
                    cause="layers are counted from the first, never from the last",
                    call='Site("resid_post", 3)',
                )
            )

    @classmethod
    def parse(cls, name: str | Site) -> Site:
        """Read a site from a hook's name, its short form, or a module's path and its end.

        Args:
            name: ``"blocks.3.hook_resid_post"``, ``"resid_post.3"`` or
                ``"model.layers.3.mlp.output"``.

        Raises:
            SiteError: if the name is none of them.
        """
        if isinstance(name, Site):
            return name
        match = _NAME.fullmatch(name)
        kinds = {hook: kind for kind, hook in HOOKS.items()}
        if match and match[1] and match[2] in kinds:
            return cls(kinds[match[2]], int(match[1]))
        if match and match[3] in HOOKS:
            return cls(match[3], int(match[4]))
        if _PATH.fullmatch(name):
            return cls(name)
        raise SiteError(
            explain(
                "Site.parse",
                "name",
                got=repr(name),
                wanted="blocks.<layer>.<hook> with hook in "
                + ", ".join(HOOKS.values())
                + ", or a module's path that ends in .input or .output",
                cause="a hook this version has no place for, or a typing error",
                call='Site.parse("blocks.3.hook_resid_post") or, for any module, '
                'Site.parse("model.layers.3.mlp.output")',
            )
        )

    @property
    def hook(self) -> str:
        """The TransformerLens hook name; a module's path as it is."""
        return self.kind if self.layer is None else f"blocks.{self.layer}.{HOOKS[self.kind]}"

    @property
    def order(self) -> Order:
        """Sorts sites for display: the table's as a pass reaches them, then paths by name.

        In which order a model reaches a path is for ``route`` to find out.
        """
        if self.layer is None:
            return (1, 0, 0, re.sub(r"\d+", lambda number: number[0].zfill(6), self.kind))
        return (0, self.layer, _ORDER[self.kind], "")

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


class Place(NamedTuple):
    """Where a site lies in one model.

    Attributes:
        path: the module.
        end: its ``input`` or ``output``.
        transform: ``rms`` or ``layer`` where the site is a norm's value without its weight.
        eps: that norm's epsilon.
        plus: the path of the block whose input is added to the value found here. resid_mid has no
            module: it is the block's input plus the attention's output, and is written there.
    """

    path: str
    end: str
    transform: str | None = None
    eps: float = 0.0
    plus: str | None = None


def torch_module(model: object) -> nn.Module:
    """The torch module behind an nnsight model, or the module itself."""
    module = getattr(model, "_module", model)
    if isinstance(module, nn.Module):
        return module
    raise ModelError(
        explain(
            "saefeat",
            "model",
            got=type(model).__name__,
            wanted="an nnsight TransformersModel or a Hugging Face module",
            cause="a tokenizer, a name or a pipeline was passed instead of the model",
            call='nnsight.TransformersModel(module, tokenizer=tokenizer, task="text-generation")',
        )
    )


def family(module: nn.Module) -> tuple[str, dict[str, tuple]]:
    """The blocks' path and the site table of a model's family.

    Raises:
        ModelError: for a family that is not in the table.
    """
    kind: Any = getattr(getattr(module, "config", None), "model_type", None)
    if kind in FAMILIES:
        return FAMILIES[kind]
    text = str(module.config.get_text_config().model_type) if kind in NESTED else ""  # type: ignore[union-attr, operator]
    if kind in NESTED and TEXT.get(text, text) in FAMILIES:
        return NESTED[kind], FAMILIES[TEXT.get(text, text)][1]
    raise ModelError(
        explain(
            "saefeat",
            "model",
            got=f"of family {kind!r}" + (f" around {text!r}" if text else ""),
            wanted="one of " + ", ".join([*FAMILIES, *NESTED]),
            cause="sites have not been checked on this family's tensors yet",
            call=f'a site by its module\'s path, such as "{_example(module)}"',
        )
    )


def _example(module: nn.Module) -> str:
    """A path site of this model: what its second block returns, if it has blocks."""
    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    return f"{lists[0]}.1.output" if lists else "model.layers.1.output"


def layer_count(module: nn.Module) -> int:
    """How many blocks the model has."""
    return len(module.get_submodule(family(module)[0]))  # type: ignore[arg-type]


def find(module: nn.Module, site: Site) -> Place:
    """Where the site lies in this model.

    Raises:
        SiteError: for a layer or a module the model lacks.
        ModelError: for a kind of site in a family that is not in the table.
    """
    if site.layer is None:
        return _module_at(module, site)
    blocks, places = family(module)
    layers = layer_count(module)
    if site.layer >= layers:
        raise SiteError(
            explain(
                "saefeat",
                "site",
                got=str(site),
                wanted=f"a layer in 0..{layers - 1}",
                cause="the dictionary belongs to a deeper model",
                call=f"a dictionary trained on {type(module).__name__} with {layers} layers",
            )
        )
    if site.kind not in places:
        raise SiteError(
            explain(
                "saefeat",
                "site",
                got=str(site),
                wanted="one of " + ", ".join(places),
                cause=f"{type(module).__name__} has no such value: its blocks are built otherwise",
                call="a dictionary trained on one of these sites, or a site by its module's path",
            )
        )
    block = f"{blocks}.{site.layer}"
    name, end, *how = places[site.kind]
    path = f"{block}.{name}" if name else block
    _check_eager(module, path)
    if SKIP in how:
        return Place(path, end, plus=block)
    return (
        Place(path, end, how[0], _epsilon(module.get_submodule(path))) if how else Place(path, end)
    )


def _module_at(module: nn.Module, site: Site) -> Place:
    """The place of a path.

    Raises:
        SiteError: naming modules of like names.
    """
    path, _, end = site.kind.rpartition(".")
    names = [name for name, _ in module.named_modules() if name]
    if path in names:
        _check_eager(module, path)
        return Place(path, end)
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.5)
    raise SiteError(
        explain(
            "saefeat",
            "site",
            got=f"{site}, and {type(module).__name__} has no module {path}",
            wanted="a module of the model, such as " + ", ".join(near or names[:3]),
            cause="a typing error, a layer the model lacks, or a path of another model",
            call="a name from model.named_modules() and .input or .output",
        )
    )


def _check_eager(module: nn.Module, path: str) -> None:
    """Refuse a site within compiled code: what was compiled before a hook runs without it.

    torch 2.13 does not look for new hooks (``skip_nnmodule_hook_guards``): tried, a model that
    had generated once went on without the edit.
    """
    names = path.split(".")
    for depth in range(len(names) + 1):
        part = module.get_submodule(".".join(names[:depth]))
        compiled = getattr(part, "_compiled_call_impl", None) is not None
        wrapped = hasattr(part, "_orig_mod") or hasattr(part.forward, "_torchdynamo_orig_callable")
        if compiled or wrapped:
            raise ModelError(
                explain(
                    "saefeat",
                    "model",
                    got=f"compiled at {'.'.join(names[:depth]) or 'its root'!r}",
                    wanted=f"{path} outside of compiled code",
                    cause="torch.compile: hooks that come later are not run",
                    call="the model as it was before torch.compile",
                )
            )


def _epsilon(norm: nn.Module) -> float:
    """The norm's own epsilon: modules call it by three names."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        if hasattr(norm, name):
            return float(getattr(norm, name))
    raise ModelError(
        explain(
            "saefeat",
            "model",
            got=f"a {type(norm).__name__} without an epsilon",
            wanted="a norm with `eps` or `variance_epsilon`",
            cause="a custom norm",
            call="a site that is a module's input or output",
        )
    )


def width_at(module: nn.Module, site: Site) -> int:
    """How wide a table's site is: d_model, or the projection's input for z and mlp_post."""
    place = find(module, site)
    if site.kind in ("z", "mlp_post"):
        projection = module.get_submodule(place.path)
        # nn.Linear keeps [out, in]; GPT-2's Conv1D keeps [in, out] and has no in_features
        return int(getattr(projection, "in_features", 0) or projection.weight.shape[0])  # type: ignore[union-attr, arg-type]
    return int(module.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]


def check_ready(module: nn.Module, where: str) -> None:
    """Refuse train mode with dropout, in which two identical runs differ, and with checkpointing.

    Gradient checkpointing runs blocks anew in the backward pass, when an edit is no longer there
    or its hooks have gone on to another forward pass: tried, gradients were wrong by 80 percent,
    without an error with ``use_reentrant=True``. In eval mode it does nothing.

    Raises:
        ModelError: naming the first active dropout, or the module that checkpoints. A submodule
            alone in train mode counts.
    """
    training = [(name, part) for name, part in module.named_modules() if part.training]
    active = [name for name, part in training if isinstance(part, nn.Dropout) and part.p > 0]
    if training:  # attention drops out by configuration, without a module of its own
        config = module.config.get_text_config() if hasattr(module, "config") else None  # type: ignore[union-attr, operator]
        names = ("attention_dropout", "attn_pdrop")
        active += [name for name in names if getattr(config, name, 0)]
    if active:
        raise ModelError(
            explain(
                where,
                "model",
                got=f"in train mode with dropout at {active[0]!r}",
                wanted="eval mode",
                cause="the model was built or fine-tuned in this process",
                call="model.eval()",
            )
        )
    redone = [name for name, part in training if getattr(part, "gradient_checkpointing", False)]
    if redone:
        raise ModelError(
            explain(
                where,
                "model",
                got=f"in train mode with gradient checkpointing at {redone[0]!r}",
                wanted="blocks that run once in a forward and backward pass",
                cause="the backward pass would run blocks again, without the intervention",
                call="model.eval(), or model.gradient_checkpointing_disable()",
            )
        )
