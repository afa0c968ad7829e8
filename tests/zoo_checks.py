"""Sites of the zoo's models against plain hooks, which know nothing of saefeat's actions."""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

import saefeat as sf
from helpers import wrapped
from saefeat.model.modules import blocks, find, has_site, width_at
from saefeat.model.sites import HOOKS, WHOLE

NEW = 3


def sites_of(model, layer: int) -> list[str]:
    """Every kind that a layer has."""
    return [f"{kind}.{layer}" for kind in HOOKS if has_site(model, sf.Site(kind, layer))]


def every_site(model) -> list[str]:
    return [site for layer in range(len(blocks(model))) for site in sites_of(model, layer)]


def whole_of(model) -> list[str]:
    """Every kind that has no layer."""
    return [kind for kind in WHOLE if has_site(model, sf.Site(kind))]


def place_of(model, site: str):
    return find(model, sf.Site.parse(site))


def read_all(model, batch, sites) -> dict[str, torch.Tensor]:
    """Each site's value [b, t, d] as saefeat reads it: a Probe on the identity basis."""
    probes = [sf.Probe(sf.Neurons(site, width_at(model, sf.Site.parse(site)))) for site in sites]
    chain = sf.verbs.base.Chain(tuple(probes))
    with torch.no_grad(), sf.hooked(model, chain) as log:
        model(**batch, use_cache=False)
    return {site: reading.values for site, reading in zip(sites, chain.readings(log), strict=True)}


def index_of(place, width: int) -> torch.Tensor:
    """The columns that are the site's, one number each."""
    if place.part is None:
        return torch.arange(width)
    start, size, groups, _ = place.part
    spans = range(0, width, width // groups)
    return torch.tensor([at + start + n for at in spans for n in range(size)])


@contextmanager
def plain_hook(model, site: str, move):
    """x [b, t, d] → move(x) at a site, by hooks written here; the model's numbers by hand."""
    place, held = place_of(model, site), {}
    scale = place.part[3] if place.part is not None else 1.0

    def moved(x):
        if x.ndim == 4:  # streams first
            active = model.config.altup_active_idx
            new = x.clone()
            new[active] = move(x[active])
            return new
        flat = x.reshape(held["shape"] + x.shape[-1:])
        columns = index_of(place, x.shape[-1])
        old = flat[..., columns] * scale
        whole = old + held["x"] if place.plus is not None else old
        new = flat.clone()
        new[..., columns] = flat[..., columns] + (move(whole) - whole) / scale
        return new.reshape(x.shape)

    def first(_, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        held["shape"] = tuple(ids.shape)

    def stash(_, args, kwargs):
        held["x"] = args[0] if args else kwargs["hidden_states"]

    def before(_, args, kwargs):
        if args:
            return (moved(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: moved(kwargs[name])}

    def after(_, __, output):
        return (moved(output[0]), *output[1:]) if isinstance(output, tuple) else moved(output)

    module = model.get_submodule(place.path)
    with ExitStack() as stack:
        put = stack.enter_context
        put(_removed(model.register_forward_pre_hook(first, with_kwargs=True)))
        if place.plus is not None:
            block = model.get_submodule(place.plus)
            put(_removed(block.register_forward_pre_hook(stash, with_kwargs=True)))
        if place.end == "input":
            put(_removed(module.register_forward_pre_hook(before, with_kwargs=True)))
        else:
            put(_removed(module.register_forward_hook(after)))
        yield


@contextmanager
def _removed(handle):
    try:
        yield
    finally:
        handle.remove()


def seen_by_hand(model, batch, site: str) -> torch.Tensor:
    found: list[torch.Tensor] = []
    with torch.no_grad(), plain_hook(model, site, lambda x: found.append(x.clone()) or x):
        model(**batch, use_cache=False)
    return found[0]


def unit_of(width: int) -> torch.Tensor:
    v = torch.randn(width, generator=torch.Generator().manual_seed(width))
    return v / v.norm()


def positions(batch) -> torch.Tensor:
    return (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)


def logits_of(model, batch) -> torch.Tensor:
    """[b, v] of the last tokens, with the positions that generate and nnsight give."""
    return model(**batch, **placed(model, batch), use_cache=False).logits[:, -1]


def placed(model, batch) -> dict:
    """position_ids, for a model that takes them."""
    names = inspect.signature(type(model).forward).parameters
    return {"position_ids": positions(batch)} if "position_ids" in names else {}


def push(batch, v):
    """x → x with its part along v set to 3, at real tokens: of the prompt, and all later ones."""
    real = batch["attention_mask"].bool()[..., None]

    def move(x):
        here = real if x.shape[1] == real.shape[1] else x.new_ones(*x.shape[:2], 1).bool()
        if x.shape[1] > real.shape[1]:  # without a cache everything is shown again
            here = torch.cat([real, here[:, real.shape[1] :]], 1)
        return torch.where(here, x + (3.0 - x @ v)[..., None] * v, x)

    return move


def _hooks(stack: ExitStack, model, batch, sites) -> None:
    for site in sites:
        move = push(batch, unit_of(width_at(model, sf.Site.parse(site))))
        stack.enter_context(plain_hook(model, site, move))


def edit_by_hand(model, batch, *sites: str) -> torch.Tensor:
    """Last logits with a direction set to 3 at each of these sites."""
    with torch.no_grad(), ExitStack() as stack:
        _hooks(stack, model, batch, sites)
        return logits_of(model, batch)


def text_by_hand(model, batch, *sites: str, **options) -> torch.Tensor:
    with ExitStack() as stack:
        _hooks(stack, model, batch, sites)
        return model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)


def clamps(model, *sites: str) -> sf.verbs.base.Chain:
    directions = [basis_at(model, site) for site in sites]
    return sf.verbs.base.Chain(tuple(sf.Clamp(direction, 3.0) for direction in directions))


def basis_at(model, site: str) -> sf.Direction:
    return sf.Direction(unit_of(width_at(model, sf.Site.parse(site))), site=site)


def scores(model, prompts, sites) -> torch.Tensor:
    """[sites, b]: what Attribute with AtP says of each site's direction, summed over tokens."""
    basis = sf.dictionaries.Dictionaries([basis_at(model, site) for site in sites])
    attribute = sf.Attribute(basis, sf.logit_diff(5, 6), method=sf.attribution.AtP())
    found = attribute(wrapped(model), prompts)
    totals = torch.zeros(len(sites), len(prompts))
    return totals.index_put_((found.dictionary, found.prompt), found.score, accumulate=True)


def scores_by_hand(model, batch, sites) -> torch.Tensor:
    """The same from the gradient of the model's own graph."""
    kept: dict[str, torch.Tensor] = {}

    def look(x, site):
        kept[site] = x.clone()
        kept[site].requires_grad_(True)
        return kept[site]

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(plain_hook(model, site, partial(look, site=site)))
        logits = logits_of(model, batch)
    nodes = [kept[site] for site in sites]
    slopes = torch.autograd.grad((logits[:, 5] - logits[:, 6]).sum(), nodes)
    rows = []
    for x, slope in zip(nodes, slopes, strict=True):
        v = unit_of(x.shape[-1])
        along = -((slope @ v) * (x.detach() @ v))
        rows.append(torch.where(batch["attention_mask"].bool(), along, 0.0).sum(1))
    return torch.stack(rows)
