"""A model's own modules: which family it is of, and where a site lies in it."""

from __future__ import annotations

import difflib
import inspect
from contextlib import suppress
from typing import Any, cast

import torch
from torch import nn

from ..errors import ModelError, SiteError
from ..kernel.program import Part
from .families import FAMILIES, NESTED, TEXT, table_of
from .heads import heads_of, part_of
from .inferred import inferred
from .outside_blocks import place_without_layer, width_without_layer
from .sites import HEADS, Place, Site
from .tables import NORMS, OWN, SKIP, STREAM, TIMES, Table
from .wrappers import inside, is_compiled


def torch_module(model: object) -> nn.Module:
    """The torch module behind an nnsight model, or the module itself; of a wrapper, the one inside.

    Raises:
        ModelError: for anything else, and under another default device of torch: what is made
            beside the model belongs on the CPU, or where the model says; for a wrapper that puts
            virtual tokens before the text, or runs copies.
    """
    if (device := torch.get_default_device().type) != "cpu":
        raise ModelError(
            f"saefeat: torch's default device is {device!r}, wanted the CPU. Likely cause:"
            " torch.set_default_device, or a block of `with torch.device(...)`. Try: the model on"
            f" its device, as with device_map={device!r}, and torch.set_default_device('cpu')"
        )
    module = getattr(model, "_module", model)
    if isinstance(module, nn.Module):
        return inside(module)
    raise ModelError(
        f"saefeat: `model` is {type(model).__name__}, wanted an nnsight TransformersModel or a"
        " Hugging Face module. Likely cause: a tokenizer, a name or a pipeline was passed instead"
        " of the model. Try: nnsight.TransformersModel(module, tokenizer=tokenizer,"
        ' task="text-generation")'
    )


def require_tracing(function: str, model: Any) -> None:
    """Refuse a call outside an nnsight block, where no forward pass reads or writes anything.

    Raises:
        ModelError: naming the blocks.
    """
    if model.interleaver.interleaving:
        return
    raise ModelError(
        f"{function}: `model` is a model that runs no block, wanted one inside a trace. Likely"
        " cause: a call outside the block, or in a session before its traces. Try: with"
        f" model.trace(prompts): log = nnsight.save({function}(model)); or run(model, prompts,"
        " intervention), which needs no block"
    )


def text_config(module: nn.Module) -> Any:
    """The configuration of a model's language half; None for a model without a configuration."""
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def family(module: nn.Module) -> tuple[str, Table]:
    """The blocks' path and the site table of a model's family.

    Those of a type that is not in the table are inferred, with a warning.

    Raises:
        ModelError: for a family that is not in the table and shows no blocks, or has no weights.
    """
    kind: Any = getattr(getattr(module, "config", None), "model_type", None)
    text = str(text_config(module).model_type) if kind in NESTED else ""
    known = TEXT.get(text, text) if kind in NESTED else kind
    if known in FAMILIES:
        path = _standing(module, NESTED[kind] if kind in NESTED else FAMILIES[known][0])
        return path, table_of(known, text_config(module))
    found = inferred(module, text_config(module)) if kind is not None else None
    if found is not None:
        return found
    got = f"of family {kind!r}" + (f" around {text!r}" if text else "")
    raise ModelError(
        f"saefeat: `model` is {got}, wanted one of {', '.join([*FAMILIES, *NESTED])}. Likely cause:"
        " sites have not been checked on this family, and its modules and a pass over a few"
        " tokens show no blocks that add up. Try: a site by its module's"
        f' path, such as "{_example(module)}"'
    )


def _standing(module: nn.Module, blocks: str) -> str:
    """The blocks' path from a model with its head, or from the body alone, as AutoModel gives it.

    Raises:
        ModelError: for what is neither, as an unknown wrapper is.
    """
    for path in (blocks, blocks.partition(".")[2]):
        with suppress(AttributeError):
            if path and module.get_submodule(path):
                return path
    raise ModelError(
        f"saefeat: `model` is a {type(module).__name__} without {blocks}, wanted the whole"
        " language model, or its body, where its blocks lie. Likely cause: a wrapper around it, or"
        " a part of it. Try: the language model inside, as transformers loads it"
    )


def _example(module: nn.Module) -> str:
    """A path site of this model: what its second block returns, if it has blocks."""
    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    return f"{lists[0]}.1.output" if lists else "model.layers.1.output"


def takes_logits_to_keep(module: nn.Module) -> bool:
    """Whether a model can be told to give logits of its last tokens alone, as generate does."""
    return "logits_to_keep" in inspect.signature(type(module).forward).parameters


def blocks(module: nn.Module) -> nn.ModuleList:
    """The model's blocks in the order they run.

    A block that stands at two layers counts twice, which `children()` would not do.
    """
    return cast("nn.ModuleList", module.get_submodule(family(module)[0]))


def find(module: nn.Module, site: Site) -> Place:
    """Where the site lies in this model.

    Raises:
        SiteError: for a layer or a module the model lacks.
        ModelError: for a kind of site in a family that is not in the table.
    """
    if site.is_path:
        return _module_at(module, site)
    container, places = family(module)
    if site.layer is None:
        place = place_without_layer(module, container, text_config(module), site)
        _check_eager(module, place.path)
        return place
    layers = len(blocks(module))
    if site.layer >= layers:
        raise SiteError(
            f"saefeat: `site` is {site}, wanted a layer in 0..{layers - 1}. Likely cause: the"
            " dictionary belongs to a deeper model. Try: a dictionary trained on"
            f" {type(module).__name__} with {layers} layers"
        )
    if site.kind not in places:
        raise SiteError(
            f"saefeat: `site` is {site}, wanted one of {', '.join(places)}. Likely cause:"
            f" {type(module).__name__} has no such value: its blocks are built otherwise. Try: a"
            " dictionary trained on one of these sites, or a site by its module's path"
        )
    block = f"{container}.{site.layer}"
    name, end, *how = places[site.kind]
    path = _within(module, site, block, name)
    _check_eager(module, path)
    if site.kind in HEADS:
        width, heads = _width(module, path, end), heads_of(text_config(module))
        return Place(path, end, part=part_of(site, how[0] if how else None, heads, width))
    norm = next((kind for kind in how if kind in NORMS), None)
    return Place(
        path,
        end,
        norm,
        0.0 if norm is None else _epsilon(module.get_submodule(path)),
        plus=block if SKIP in how else None,
        part=_part(text_config(module), how),
        aside=site.kind == "router" and not isinstance(module.get_submodule(path), nn.Linear),
    )


def _within(module: nn.Module, site: Site, block: str, names: str) -> str:
    """The path of the one of these modules that the site's layer has.

    Raises:
        SiteError: naming the layers that have one, if this has none.
    """
    if not names:
        return block
    stem = block.rpartition(".")[0]
    layers = range(len(cast("nn.ModuleList", module.get_submodule(stem))))
    have = {
        layer: f"{stem}.{layer}.{name}"
        for layer in layers
        for name in reversed(names.split("|"))
        if _has(module, f"{stem}.{layer}.{name}")
    }
    if site.layer in have:
        return have[site.layer]
    raise SiteError(
        f"saefeat: `site` is {site}, wanted a layer with a module {names.replace('|', ' or ')}:"
        f" {', '.join(map(str, have)) or 'none'} of {type(module).__name__}. Likely cause: its"
        " layers differ, as attention and state-space layers do, or dense layers and mixtures of"
        " experts. Try: a site of one of these layers, or a module's path"
    )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _part(config: Any, how: list[str]) -> Part | None:
    """All columns of a value that the model multiplies or changes, or those of its stream."""
    width = int(config.hidden_size)
    scale = next((name.removeprefix(TIMES) for name in how if name.startswith(TIMES)), None)
    if scale is not None:
        return 0, width, 1, float(getattr(config, scale))
    if STREAM in how:
        return config.altup_active_idx * width, width, 1, 1.0
    return (0, width, 1, 1.0) if OWN in how else None


def has_site(module: nn.Module, site: Site) -> bool:
    """Whether the model has a table's site."""
    try:
        find(module, site)
    except SiteError:
        return False
    return True


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
        f"saefeat: `site` is {site}, and {type(module).__name__} has no module {path}, wanted a"
        f" module of the model, such as {', '.join(near or names[:3])}. Likely cause: a typing"
        " error, a layer the model lacks, or a path of another model. Try: a name from"
        " model.named_modules() and .input or .output"
    )


def _check_eager(module: nn.Module, path: str) -> None:
    """Refuse a site within compiled code: what was compiled before a hook runs without it.

    torch 2.13 does not look for new hooks (``skip_nnmodule_hook_guards``): tried, a model that
    had generated once went on without the edit.
    """
    names = path.split(".")
    for depth in range(len(names) + 1):
        part = module.get_submodule(".".join(names[:depth]))
        if is_compiled(part):
            raise ModelError(
                f"saefeat: `model` is compiled at {'.'.join(names[:depth]) or 'its root'!r}, wanted"
                f" {path} outside of compiled code. Likely cause: torch.compile: hooks that come"
                " later are not run. Try: the model as it was before torch.compile"
            )


_EPSILONS = {"OlmoLayerNorm": 1e-5}
"""Of norms that keep theirs in their code."""


def _epsilon(norm: nn.Module) -> float:
    """The norm's own epsilon: modules call it by three names."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        if hasattr(norm, name):
            return float(getattr(norm, name))
    if type(norm).__name__ in _EPSILONS:
        return _EPSILONS[type(norm).__name__]
    raise ModelError(
        f"saefeat: `model` is a {type(norm).__name__} without an epsilon, wanted a norm with `eps`"
        " or `variance_epsilon`. Likely cause: a custom norm. Try: a site that is a module's input"
        " or output"
    )


def width_at(module: nn.Module, site: Site) -> int:
    """How wide a table's site is: d_model, or what a projection takes or gives."""
    place = find(module, site)
    if site.layer is None:
        return width_without_layer(module, text_config(module), site)
    if place.part is not None:
        return place.part[1] * place.part[2]
    if site.kind in (*HEADS, "mlp_post"):
        return _width(module, place.path, place.end)
    if site.kind == "router":
        return int(cast("Any", module.get_submodule(place.path)).weight.shape[0])
    return int(text_config(module).hidden_size)


def _width(module: nn.Module, path: str, end: str) -> int:
    """What a projection takes or gives."""
    projection: Any = module.get_submodule(path)
    sides = ("in_features", "infeatures") if end == "input" else ("out_features", "outfeatures")
    for name in sides:  # the second is older GPTQ layers'
        if hasattr(projection, name):
            return int(getattr(projection, name))
    weight = getattr(projection, "weight", None)
    if hasattr(projection, "nf") and weight is not None:  # GPT-2's Conv1D: [in, out]
        return int(weight.shape[0 if end == "input" else 1])
    raise SiteError(
        f"saefeat: `site` lies at the {end} of {path}, a {type(projection).__name__} that does not"
        f" say how wide that is, wanted a layer with `{sides[0]}`. Likely cause: quantized weights,"
        f' whose shape is not the layer\'s. Try: Site("{path}.{end}"), which is tried out'
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
        config = text_config(module)
        names = ("attention_dropout", "attn_pdrop")
        active += [name for name in names if getattr(config, name, 0)]
    if active:
        raise ModelError(
            f"{where}: `model` is in train mode with dropout at {active[0]!r}, wanted eval mode."
            " Likely cause: the model was built or fine-tuned in this process. Try: model.eval()"
        )
    redone = [name for name, part in training if getattr(part, "gradient_checkpointing", False)]
    if redone:
        raise ModelError(
            f"{where}: `model` is in train mode with gradient checkpointing at {redone[0]!r},"
            " wanted blocks that run once in a forward and backward pass. Likely cause: the"
            " backward pass would run blocks again, without the intervention. Try: model.eval(), or"
            " model.gradient_checkpointing_disable()"
        )
