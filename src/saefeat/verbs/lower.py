"""Verbs made into the kernel's plain program for one model.

All checks that need the model happen here, before anything runs: families, layers, widths, train
mode. What comes out is nested dictionaries of tensors and strings, with a storage of its own for
every tensor: a view would drag its whole matrix over the wire.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..dictionaries.base import Dictionary
from ..latents import index_tensor
from ..sites import Place, Site, check_ready, check_width, find, torch_module
from ..tokens import Tokens
from .base import Intervention, Step, numbered


def lower(intervention: Intervention, model: Any, rows: slice = slice(None)) -> dict[str, Any]:
    """The program of an intervention on a model, visits sorted in the order they are reached.

    ``rows`` picks the prompts of this batch out of values that differ by prompt.

    Raises:
        ModelError: train mode with dropout, or a family without a site table.
        SiteError: a layer the model lacks, or a dictionary of another width.
    """
    module = torch_module(model)
    check_ready(module, "saefeat")
    visits: dict[Place, dict[str, Any]] = {}
    for step, numbers in numbered(intervention):
        start = 0
        for number, (basis, indices) in zip(numbers, step.latents.parts, strict=True):
            stop = start + len(indices)
            _add(visits, module, model, step, number, basis, indices, slice(start, stop), rows)  # type: ignore[arg-type]
            start = stop
    return {"visits": in_order(visits)}


def _add(
    visits: dict[Place, dict[str, Any]],
    module: nn.Module,
    model: Any,
    step: Step,
    number: int,
    dictionary: Dictionary,
    indices: tuple[int, ...],
    span: slice,
    rows: slice,
) -> None:
    """Append one dictionary's read, and its write if the step is an edit."""
    check_width(module, dictionary.site, dictionary.d_in, "dictionary")
    check_width(module, dictionary.write_site, dictionary.d_out, "dictionary")
    columns = dictionary.columns(index_tensor(indices))
    directions = columns.pop("directions")
    place = find(module, dictionary.site)
    read = {
        "do": "read",
        "id": number,
        "tensors": columns,
        "rule": (step.rule or default_rule(dictionary, model)).rule,
        "record": step.change is None,
        "reduce": step.reduction,
        "transform": place.transform,
        "eps": place.eps,
        "plus": place.plus,
    }
    if place.plus is not None:
        add_stash(visits, place.plus, dictionary.site.layer)
    add_visit(visits, place, dictionary.site.order)["actions"].append(read)
    if step.change is not None:
        tensors = {"directions": directions, **step.change.take(span, rows)}
        write = {"do": "write", "id": number, "tensors": tensors}
        target = find(module, dictionary.write_site)
        add_visit(visits, target, dictionary.write_site.order)["actions"].append(write)


def add_visit(
    visits: dict[Place, dict[str, Any]], place: Place, order: tuple[int, int]
) -> dict[str, Any]:
    """The visit to a place; a site with a transform shares it with the plain value."""
    key = Place(place.path, place.end)
    new = {"path": place.path, "end": place.end, "order": order, "actions": []}
    return visits.setdefault(key, new)


def add_stash(visits: dict[Place, dict[str, Any]], block: str, layer: int) -> None:
    """Keep a block's input until its attention's output is there, for resid_mid."""
    visit = add_visit(visits, Place(block, "input"), Site("resid_pre", layer).order)
    if not any(action["do"] == "stash" for action in visit["actions"]):
        visit["actions"].append({"do": "stash", "id": block})


def in_order(visits: dict[Place, dict[str, Any]]) -> list[dict[str, Any]]:
    """Visits as a forward pass reaches them, stashing last: what is kept is what edits left."""
    for visit in visits.values():
        visit["actions"].sort(key=lambda action: action["do"] == "stash")
    return sorted(visits.values(), key=lambda visit: visit["order"])


def default_rule(dictionary: Dictionary, model: Any) -> Tokens:
    """Every real token, less those the dictionary was not trained on."""
    excluded = dictionary.excluded
    if excluded == "special":
        excluded = _special(model)
    return ~Tokens.ids(*excluded) if excluded else Tokens.all()  # type: ignore[misc]


def _special(model: Any) -> tuple[int, ...]:
    """Special token ids: the tokenizer's, or those the configuration names."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        return tuple(tokenizer.all_special_ids)
    config = torch_module(model).config.get_text_config()  # type: ignore[union-attr, operator]
    found = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    flat = [
        i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])
    ]
    return tuple(flat)
