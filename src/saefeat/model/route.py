"""Routes: when one model reaches its sites, and how wide they are there.

For sites of the table the table knows, and nothing runs. What a module's path leads to nobody
knows: whether a pass reaches it at all, once or several times, before or after another, and what
it carries. So it is found out in one dry run of two rows of three tokens, without gradients,
with every hook put aside (no user's hook sees it) and, inside a trace, with nnsight standing down.

A model whose weights are not loaded (on the meta device, as nnsight leaves a name until the
first trace) is run on shapes alone, which its code must allow; mixtures of experts mostly do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelError, SiteError
from .aside import hooks_aside
from .modules import find, text_config, torch_module, width_at
from .sites import Order, Place, Site

if TYPE_CHECKING:
    from nnsight import TransformersModel

ROWS, TOKENS = 2, 3


class Fits(Protocol):
    """What a route needs to know of a dictionary."""

    @property
    def site(self) -> Site: ...

    @property
    def read_sites(self) -> tuple[Site, ...]: ...

    @property
    def write_sites(self) -> tuple[Site, ...]: ...

    @property
    def d_in(self) -> int: ...

    @property
    def d_out(self) -> int: ...


@dataclass(frozen=True)
class Route:
    """Where sites lie in one model, how wide they are, and in which order a pass reaches them.

    Attributes:
        module: the model.
        places: where each site lies.
        widths: of the site's values.
        orders: sorts sites as a forward pass reaches them.
        starts: path of a block → order of its input, for the sites that add it.
    """

    module: nn.Module = field(compare=False, repr=False)
    places: dict[Site, Place]
    widths: dict[Site, int]
    orders: dict[Site, Order]
    starts: dict[str, Order]

    def check(self, dictionary: Fits, what: str) -> None:
        """Refuse a dictionary that cannot belong to its sites of this model.

        Raises:
            SiteError: naming both widths.
            ModelError: for an SAE of centered values where the model does not center.
        """
        reads = dictionary.read_sites
        ends = [(site, dictionary.d_in // len(reads)) for site in reads]
        for site, width in (*ends, *((site, dictionary.d_out) for site in dictionary.write_sites)):
            if width != self.widths[site]:
                raise SiteError(
                    f"saefeat: `{what}` is {width} wide at {site}, wanted {self.widths[site]}, as"
                    f" {type(self.module).__name__} is there. Likely cause: a dictionary of another"
                    " model or another size of it. Try: load the release trained on this model"
                )
        if getattr(dictionary, "centered", False) and not _centers(self.module):
            raise ModelError(
                f"saefeat: `{what}` is an SAE of centered values (center_writing_weights) at"
                f" {dictionary.site}, wanted a model with LayerNorm;"
                f" {type(self.module).__name__} has RMSNorm."
                " Likely cause: TransformerLens trained it on a stream whose mean was taken out,"
                " which only a LayerNorm does not see. Try: an SAE trained on this model as it is"
            )

    def writable(self, site: Site, where: object) -> Place:
        """Where directions are added, and where gradients along them are taken.

        Raises:
            SiteError: for a value that is computed and never passed on: what is found there is
                the norm's input, whose gradient belongs to other directions.
        """
        place = self.places[site]
        if place.aside:
            raise SiteError(
                f"{where}: `latents` is written at {site}, wanted a site that the model goes on"
                f" with. Likely cause: {place.path} gives its logits beside the experts it has"
                " chosen by them, and nothing reads them again. Try: mlp_out, or Probe"
            )
        if place.transform is None:
            return place
        raise SiteError(
            f"{where}: `latents` is written at {site}, wanted a site that is a module's input or"
            " output. Likely cause: the norm's value without its weight is computed, not passed on,"
            " so it can be read but not edited. Try: a transcoder, which writes at mlp_out, or"
            " Probe"
        )


def route(model: TransformersModel, sites: Iterable[Site]) -> Route:
    """The route past these sites; runs the model once on a tiny input if one is a module's path.

    Args:
        model: an nnsight model or a Hugging Face module.
        sites: which sites.

    Raises:
        SiteError: for a layer or a module the model lacks, or one a pass does not reach once
            with a value [batch, tokens, width] (or [batch * tokens, width]).
        ModelError: for an unknown family, or a model that cannot be run on a tiny input.
    """
    module = torch_module(model)
    listed = list(dict.fromkeys(sites))
    places = {site: find(module, site) for site in listed}
    if any(site.is_path for site in listed):
        return _tried(model, module, places)
    return Route(
        module,
        places,
        widths={site: width_at(module, site) for site in listed},
        orders={site: site.order for site in listed},
        starts={
            place.plus: Site("resid_pre", site.layer).order
            for site, place in places.items()
            if place.plus is not None
        },
    )


class Seen(NamedTuple):
    """One arrival at a place: its number among all arrivals, and the value's shape."""

    moment: int
    shape: tuple[int, ...] | None


def _tried(model: TransformersModel, module: nn.Module, places: dict[Site, Place]) -> Route:
    """The route as a dry run finds it."""
    blocks = {place.plus for place in places.values() if place.plus is not None}
    stops = {Place(place.path, place.end) for place in places.values()}
    seen = _dry_run(model, module, stops | {Place(block, "input") for block in blocks})
    found = {site: _once(module, site, seen[Place(at.path, at.end)]) for site, at in places.items()}
    starts = {block: seen[Place(block, "input")][0].moment for block in blocks}
    return Route(
        module,
        places,
        widths={site: width for site, (_, width) in found.items()},
        # several kinds of site may lie at one place: then as the table has them
        orders={site: (0, moment, site.order[2], "") for site, (moment, _) in found.items()},
        starts={block: (0, moment, 0, "") for block, moment in starts.items()},
    )


def _centers(module: nn.Module) -> bool:
    """Whether every norm takes out the mean; norms are told apart by the names of their classes."""
    names = {type(part).__name__ for part in module.modules()}
    return any("LayerNorm" in name for name in names) and not any("RMSNorm" in n for n in names)


def _once(module: nn.Module, site: Site, seen: list[Seen]) -> tuple[int, int]:
    """The moment and the width of a site reached once, with a value for every token.

    The table says how wide its own sites are, and what of a value they are.

    Raises:
        SiteError: saying what is wrong with it otherwise.
    """
    if len(seen) == 1 and not site.is_path:
        return seen[0].moment, width_at(module, site)
    shape = seen[0].shape if len(seen) == 1 else None
    if shape is not None and shape[:-1] in ((ROWS, TOKENS), (ROWS * TOKENS,)):
        return seen[0].moment, shape[-1]
    if len(seen) == 1:
        got = "no tensor" if shape is None else f"of shape {shape} for {ROWS} rows, {TOKENS} tokens"
        cause = "a module that is given a part of the tokens, or another thing than their values"
    else:
        got = f"reached {len(seen)} times in a forward pass"
        cause = (
            "a module that several layers share"
            if seen
            else "a container, whose parts are called and not itself, or a part that is not used"
        )
    raise SiteError(
        f"saefeat: `site` is {site}, which is {got}, wanted a value [batch, tokens, width], or all"
        f" tokens in one row, once in a pass. Likely cause: {cause}. Try: the module around it or"
        " within it: see model.named_modules()"
    )


def _dry_run(
    model: TransformersModel, module: nn.Module, stops: Iterable[Place]
) -> dict[Place, list[Seen]]:
    """When each place is reached in a forward pass of a tiny input.

    Raises:
        ModelError: if the model cannot be run so.
    """
    seen: dict[Place, list[Seen]] = {stop: [] for stop in stops}
    clock = count()
    with hooks_aside(module), ExitStack() as stack:
        for stop, arrivals in seen.items():
            target = module.get_submodule(stop.path)
            if stop.end == "input":
                note = partial(_on_input, arrivals, clock)
                handle = target.register_forward_pre_hook(note, with_kwargs=True)
            else:
                handle = target.register_forward_hook(partial(_on_output, arrivals, clock))
            stack.callback(handle.remove)
        try:
            _tiny_pass(model, module)
        except Exception as error:
            raise ModelError(_no_run(module, error)) from error
    return seen


def _tiny_pass(model: TransformersModel, module: nn.Module) -> None:
    """One forward pass of an ordinary token; on shapes alone where weights are not loaded."""
    first = next(module.parameters())
    size = getattr(text_config(module), "vocab_size", 0)
    start = max(0, size // 2 - ROWS * TOKENS)  # special tokens lie at a vocabulary's ends
    unloaded = any(parameter.is_meta for parameter in module.parameters())
    # An nnsight model called as a function runs its module with the trace standing down.
    call: Callable[..., Any] = model if hasattr(model, "_module") else module
    with torch.no_grad(), _on_shapes() if unloaded else nullcontext():
        ids = torch.arange(start, start + ROWS * TOKENS, device=first.device).reshape(ROWS, TOKENS)
        call(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _on_shapes() -> Any:
    """Tensors without values.

    On the meta device alone transformers asks masks what they hold; where it sees that shapes are
    being traced it does not.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _on_input(seen: list[Seen], clock: Iterator[int], _: nn.Module, args: Any, kwargs: Any) -> None:
    value = args[0] if args else next(iter(kwargs.values()), None)
    seen.append(Seen(next(clock), _shape(value)))


def _on_output(seen: list[Seen], clock: Iterator[int], _: nn.Module, args: Any, out: Any) -> None:
    value = out[0] if isinstance(out, tuple) and out else out
    seen.append(Seen(next(clock), _shape(value)))


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of a floating tensor; token ids and masks are no site's value."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return tuple(value.shape) if floating else None


def _no_run(module: nn.Module, error: Exception) -> str:
    unloaded = any(parameter.is_meta for parameter in module.parameters())
    cause = (
        "its weights are not loaded, and its code asks for more than their shapes"
        if unloaded
        else "a model that is no causal language model, or weights that do not fit together"
    )
    call = (
        "TransformersModel(..., dispatch=True), which loads the weights"
        if unloaded
        else "model(input_ids=ids) by hand, to see what it needs"
    )
    return (
        f"saefeat: `model` is a {type(module).__name__} that cannot be run on {ROWS} rows of"
        f" {TOKENS} tokens ({type(error).__name__}: {error}), wanted a model that can, since a site"
        f" by its module's path has to be tried out. Likely cause: {cause}. Try: {call}"
    )
