"""Sites: the places in a transformer at which a dictionary reads or writes.

A site is a kind and a layer, written as TransformerLens writes hook names, because that is what
SAE releases declare. Where it lies in a Hugging Face model depends on the family; the table below
was checked on tensors. The trap it removes: on Gemma-2 and Gemma-3 what TransformerLens calls
``hook_mlp_out`` is not the MLP's output but that of the norm behind it, and no error says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .errors import ModelError, SiteError, explain

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


@dataclass(frozen=True)
class Site:
    """A place in the model: a kind (``resid_post``, ``mlp_out``, ...) and a layer.

    Args:
        kind: one of ``resid_pre``; ``z``, all heads side by side before the output projection;
            ``attn_out``; ``resid_mid``; ``mlp_norm``, the MLP's input normalized without the
            norm's weight; ``mlp_in``, what the MLP is given; ``mlp_post``, after its activation;
            ``mlp_out``; ``resid_post``.
        layer: 0-based.

    Raises:
        SiteError: for an unknown kind or a negative layer.

    Examples:
        >>> sf.Site("resid_post", 15).hook
        'blocks.15.hook_resid_post'
        >>> sf.Site.parse("blocks.15.hook_resid_post") == sf.Site.parse("resid_post.15")
        True
    """

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in HOOKS:
            raise SiteError(
                explain(
                    "Site",
                    "kind",
                    got=repr(self.kind),
                    wanted="one of " + ", ".join(HOOKS),
                    cause="a misspelt or unsupported site",
                    call='Site("resid_post", 3)',
                )
            )
        if not isinstance(self.layer, int) or self.layer < 0:
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
        """Read a site from ``"blocks.3.hook_resid_post"`` or ``"resid_post.3"``.

        Raises:
            SiteError: if the name is neither.
        """
        if isinstance(name, Site):
            return name
        match = _NAME.fullmatch(name)
        kinds = {hook: kind for kind, hook in HOOKS.items()}
        if match and match[1] and match[2] in kinds:
            return cls(kinds[match[2]], int(match[1]))
        if match and match[3] in HOOKS:
            return cls(match[3], int(match[4]))
        raise SiteError(
            explain(
                "Site.parse",
                "name",
                got=repr(name),
                wanted="blocks.<layer>.<hook> with hook in " + ", ".join(HOOKS.values()),
                cause="a hook this version has no place for, or a typing error",
                call='Site.parse("blocks.3.hook_resid_post")',
            )
        )

    @property
    def hook(self) -> str:
        """The TransformerLens hook name."""
        return f"blocks.{self.layer}.{HOOKS[self.kind]}"

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sites in the order a forward pass reaches them."""
        return (self.layer, _ORDER[self.kind])

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


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


_SKIP = "plus the block's input"
_LLAMA = {
    "resid_pre": ("", "input"),
    "z": ("self_attn.o_proj", "input"),
    "attn_out": ("self_attn", "output"),
    "resid_mid": ("self_attn", "output", _SKIP),
    "mlp_norm": ("post_attention_layernorm", "input", "rms"),
    "mlp_in": ("mlp", "input"),
    "mlp_post": ("mlp.down_proj", "input"),
    "mlp_out": ("mlp", "output"),
    "resid_post": ("", "output"),
}
_SANDWICH = {  # norms behind attention and MLP: what is added to the stream is their output
    **_LLAMA,
    "attn_out": ("post_attention_layernorm", "output"),
    "resid_mid": ("post_attention_layernorm", "output", _SKIP),
    "mlp_out": ("post_feedforward_layernorm", "output"),
}
_GEMMA2 = {**_SANDWICH, "mlp_norm": ("pre_feedforward_layernorm", "input", "rms")}
_OLMO2 = {kind: place for kind, place in _SANDWICH.items() if kind != "mlp_norm"}  # no norm before
_GPT2 = {
    "resid_pre": ("", "input"),
    "z": ("attn.c_proj", "input"),
    "attn_out": ("attn", "output"),
    "resid_mid": ("attn", "output", _SKIP),
    "mlp_norm": ("ln_2", "input", "layer"),
    "mlp_in": ("mlp", "input"),
    "mlp_post": ("mlp.c_proj", "input"),
    "mlp_out": ("mlp", "output"),
    "resid_post": ("", "output"),
}
_NEOX = {  # attention and MLP in parallel: there is no resid_mid
    "resid_pre": ("", "input"),
    "z": ("attention.dense", "input"),
    "attn_out": ("attention", "output"),
    "mlp_norm": ("post_attention_layernorm", "input", "layer"),
    "mlp_in": ("mlp", "input"),
    "mlp_post": ("mlp.dense_4h_to_h", "input"),
    "mlp_out": ("mlp", "output"),
    "resid_post": ("", "output"),
}
FAMILIES: dict[str, tuple[str, dict[str, tuple]]] = {
    "gpt2": ("transformer.h", _GPT2),
    "gpt_neox": ("gpt_neox.layers", _NEOX),
    "llama": ("model.layers", _LLAMA),
    "mistral": ("model.layers", _LLAMA),
    "qwen2": ("model.layers", _LLAMA),
    "qwen3": ("model.layers", _LLAMA),
    "phi3": ("model.layers", _LLAMA),
    "gemma": ("model.layers", _LLAMA),
    "olmo2": ("model.layers", _OLMO2),
    "gemma2": ("model.layers", _GEMMA2),
    "gemma3_text": ("model.layers", _GEMMA2),
    "gemma3": ("model.language_model.layers", _GEMMA2),
}
"""Model type → (path of the blocks, site kind → place within a block)."""


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
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind in FAMILIES:
        return FAMILIES[kind]
    raise ModelError(
        explain(
            "saefeat",
            "model",
            got=f"of family {kind!r}",
            wanted="one of " + ", ".join(FAMILIES),
            cause="sites have not been checked on this family's tensors yet",
            call="open an issue with the model's name",
        )
    )


def layer_count(module: nn.Module) -> int:
    """How many blocks the model has."""
    return len(module.get_submodule(family(module)[0]))  # type: ignore[arg-type]


def find(module: nn.Module, site: Site) -> Place:
    """Where the site lies in this model.

    Raises:
        SiteError: for a layer the model lacks.
    """
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
                call="a dictionary trained on one of these sites",
            )
        )
    block = f"{blocks}.{site.layer}"
    name, end, *how = places[site.kind]
    path = f"{block}.{name}" if name else block
    _check_eager(module, path)
    if _SKIP in how:
        return Place(path, end, plus=block)
    return (
        Place(path, end, how[0], _epsilon(module.get_submodule(path))) if how else Place(path, end)
    )


def find_writable(module: nn.Module, site: Site, where: str) -> Place:
    """Where directions are added, and where gradients along them are taken.

    Raises:
        SiteError: for a value that is computed and never passed on: what is found there is the
            norm's input, whose gradient belongs to other directions.
    """
    place = find(module, site)
    if place.transform is None:
        return place
    raise SiteError(
        explain(
            where,
            "dictionary",
            got=f"written at {site}",
            wanted="a site that is a module's input or output",
            cause="the norm's value without its weight is computed, not passed on",
            call="a transcoder, which writes at mlp_out, or Probe",
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
    """How wide the site's value is: d_model, or the projection's input for z and mlp_post."""
    place = find(module, site)
    if site.kind in ("z", "mlp_post"):
        projection = module.get_submodule(place.path)
        # nn.Linear keeps [out, in]; GPT-2's Conv1D keeps [in, out] and has no in_features
        return int(getattr(projection, "in_features", 0) or projection.weight.shape[0])  # type: ignore[union-attr, arg-type]
    return int(module.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]


def check_width(module: nn.Module, site: Site, width: int, what: str) -> None:
    """Refuse a dictionary that cannot belong to this site of this model.

    Raises:
        SiteError: naming both widths, or a site the model lacks.
    """
    there = width_at(module, site)
    if width != there:
        raise SiteError(
            explain(
                "saefeat",
                what,
                got=f"{width} wide at {site}",
                wanted=f"{there}, as {type(module).__name__} is there",
                cause="a dictionary of another model or another size of it",
                call="load the release trained on this model",
            )
        )


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
