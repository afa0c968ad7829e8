"""edges: which latents drive which later latents, through the bare model."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import nnsight
import torch
from torch import Tensor
from tqdm import tqdm

from ..dictionaries.base import Dictionary, cast
from ..errors import FiringError, SiteError, explain
from ..execution.run import run
from ..kernel.encode import encode
from ..kernel.program import lift, new_log
from ..kernel.tokens import select
from ..kernel.trace import whole_run
from ..latents import Latents, as_latents, index_tensor, stack
from ..prompts import Prompts, encode_prompts, split
from ..route import Route, route
from ..sites import Order, Place, Site, torch_module
from ..tokens import Tokens
from ..verbs.base import Chain
from ..verbs.edits import Clamp
from ..verbs.lower import acts_at, add_stash, add_visit, in_order, lower, plain
from ..verbs.probe import Probe
from .require import require, require_gradients
from .stats import spearman


@dataclass(frozen=True, eq=False, repr=False)
class Edges:
    """Estimated effects of ablating upstream latents on downstream latents, some checked.

    Attributes:
        upstream: u latents.
        downstream: d latents.
        ordered: [u, d] bool, whether the downstream latent is read after the upstream one is
            written; there is no edge otherwise.
        by_prompt: [u, d, prompts], the estimate.
        exact: [u, d], the mean exact change for edges that were checked, NaN for others.

    Examples:
        >>> a, b = (sf.Neurons(f"resid_post.{n}", 4).latents([1]) for n in (0, 1))
        >>> one = torch.ones(1, 1)
        >>> sf.Edges(a, b, one > 0, -one[..., None], -one).top(1)
        ((Latents(1: resid_post.0 [1]), Latents(1: resid_post.1 [1]), -1.0),)
    """

    upstream: Latents
    downstream: Latents
    ordered: Tensor
    by_prompt: Tensor
    exact: Tensor

    @property
    def estimate(self) -> Tensor:
        """[u, d]: the mean over prompts; zero where there is no edge."""
        return self.by_prompt.mean(-1)

    @property
    def rank(self) -> float:
        """Spearman's correlation of estimate and exact change over the checked edges."""
        checked = ~self.exact.isnan()
        return spearman(self.estimate[checked], self.exact[checked])

    def top(self, n: int) -> tuple[tuple[Latents, Latents, float], ...]:
        """The n strongest edges, of either sign: upstream, downstream, estimate."""
        ups, downs = self.upstream.singles(), self.downstream.singles()
        size = self.estimate.abs().flatten()
        order = size.argsort(descending=True, stable=True)[:n].tolist()
        pairs = [divmod(place, len(downs)) for place in order if size[place] > 0]
        return tuple((ups[i], downs[j], float(self.estimate[i, j])) for i, j in pairs)

    def to_pandas(self) -> Any:
        """A DataFrame, one row an edge that is not zero, strongest first (needs pandas)."""
        import pandas

        ups, downs = list(self.upstream), list(self.downstream)
        rows = [
            {
                "upstream_site": str(ups[i][0]),
                "upstream": ups[i][1],
                "downstream_site": str(downs[j][0]),
                "downstream": downs[j][1],
                "estimate": float(self.estimate[i, j]),
                "exact": float(self.exact[i, j]),
            }
            for i, j in (self.estimate != 0).nonzero().tolist()
        ]
        return pandas.DataFrame(sorted(rows, key=lambda row: -abs(row["estimate"])))

    def __repr__(self) -> str:
        found, checked = int((self.estimate != 0).sum()), int((~self.exact.isnan()).sum())
        lines = [
            f"Edges: {found} from {len(self.upstream)} to {len(self.downstream)} latents over "
            f"{self.by_prompt.shape[-1]} prompts; {checked} checked, rank correlation "
            f"{self.rank:.2f}; strongest"
        ]
        for up, down, value in self.top(5):
            (a, i), (b, j) = *up, *down
            row, column = list(self.upstream).index((a, i)), list(self.downstream).index((b, j))
            lines.append(f"  {a} {i} → {b} {j}: {value:+.3f}, exact {self.exact[row, column]:+.3f}")
        return "\n".join(lines)


def edges(
    model: Any,
    prompts: Prompts,
    upstream: Latents,
    downstream: Latents,
    *,
    where: Tokens | None = None,
    check: int = 16,
    batch_size: int = 16,
    progress: bool = False,
) -> Edges:
    """How ablating each upstream latent would change each downstream latent, to first order.

    The value of the edge i → j, for one prompt, is

        −Σ_t f_i(t) · (∂F_j/∂x(t) · direction_i),   F_j = Σ over `where` of f_j

    with x the value where latent i is written, and the gradient taken through the bare model: all
    paths count, also those through other latents and through the error terms. Where latent j is
    active, the gradient of its activation is that of its pre-activation; where it is off, it is
    zero, so an edge does not see latents that ablation would switch on. The strongest edges are
    checked: the upstream latent is ablated at every token, and the downstream latent read.

    It costs one forward pass a batch and one backward pass a downstream latent, and for the check
    one row a prompt for each upstream latent among the checked edges.

    Args:
        model: an nnsight ``TransformersModel``.
        prompts: strings, chats or token ids.
        upstream: u latents; they are ablated at every real token their dictionary knows.
        downstream: d latents, read after at least one of the upstream latents is written.
        where: the tokens at which downstream latents are summed; every real token by default.
        check: how many of the strongest edges to check.
        batch_size: prompts a forward pass.
        progress: show a progress bar.

    Returns:
        An ``Edges``.

    Raises:
        SiteError: if no downstream latent comes after an upstream one.
        FiringError: if no upstream or no downstream latent is ever active there.
        GradientError: under ``torch.no_grad``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> harmful = tiny.splits()["harmful_val"][0].instruction
        >>> up, down = saes.latents({0: [362, 484]}), saes.latents({2: [42]})
        >>> found = sf.edges(model, [{"role": "user", "content": harmful}], up, down, check=2)
        >>> found.estimate.shape, bool((found.estimate * found.exact >= 0).all())
        (torch.Size([2, 1]), True)
    """
    require("edges", check=(check, 0), batch_size=(batch_size, 1))
    require_gradients("edges")
    up, down = as_latents(upstream, "edges"), as_latents(downstream, "edges")
    way = route(model, _sites(up, down))
    ordered = _ordered(up, down, way)
    batch = encode_prompts(getattr(model, "tokenizer", None), prompts)
    graph = _Graph(model, way, up, down, where)
    pieces = split(batch, batch_size)
    bar = tqdm(pieces, disable=not progress, desc="edges", unit="batch")
    values = torch.cat([graph.values(piece) for piece in bar], -1)
    _require_active(graph.active, up, down, where)
    values = torch.where(ordered[..., None], values, 0.0)
    exact = torch.full(ordered.shape, math.nan)
    strong = values.mean(-1).abs().flatten().argsort(descending=True, stable=True)[:check]
    chosen = [divmod(place, len(down)) for place in strong.tolist()]
    chosen = [(i, j) for i, j in chosen if values[i, j].any()]
    rows = sorted({i for i, _ in chosen})
    if rows:
        changes = _ablated(model, batch, [up.singles()[i] for i in rows], down, where, batch_size)
        for i, j in chosen:
            exact[i, j] = changes[rows.index(i), j]
    return Edges(up, down, ordered, values, exact)


class _Part(NamedTuple):
    """Latents of one dictionary, the place they are read or written, and how it is transformed."""

    dictionary: Dictionary
    columns: dict[str, Any]
    place: Place
    transform: dict[str, Any]
    rule: tuple


class _Graph:
    """The bare model's graph from the places upstream latents write to those downstream read."""

    def __init__(
        self, model: Any, way: Route, up: Latents, down: Latents, where: Tokens | None
    ) -> None:
        self._model, self._module, self._route = model, torch_module(model), way
        self._numbers: dict[Place, tuple[int, Order]] = {}
        self.active = {"upstream": False, "downstream": False}
        self._reads = [self._part(*part, None, write=False) for part in up.parts]
        self._writes = [self._part(*part, None, write=True) for part in up.parts]
        self._sinks = [self._part(*part, where, write=False) for part in down.parts]
        written = {self._numbers[part.place] for part in self._writes}
        self._first = min(written, key=lambda entry: entry[1])[0]
        accepted = inspect.signature(self._module.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def _part(self, basis: Any, indices: Any, where: Tokens | None, *, write: bool) -> _Part:
        site: Site = basis.write_site if write else basis.site
        found = self._route.writable(site, "edges") if write else self._route.places[site]
        place = Place(found.path, found.end, plus=found.plus)
        self._numbers.setdefault(place, (len(self._numbers), self._route.orders[site]))
        if place.plus is not None:  # resid_mid: the block's input is the other half of its value
            block = Place(place.plus, "input")
            order = self._route.starts[place.plus]
            self._numbers.setdefault(block, (len(self._numbers), order))
        rule = plain(acts_at(where, basis, self._model).rule, self._model)
        columns = basis.columns(index_tensor(indices))
        transform = {"transform": found.transform, "eps": found.eps}
        return _Part(basis, columns, place, transform, rule)

    def values(self, batch: dict[str, Tensor]) -> Tensor:
        """[u, d, b]: the edges of one batch."""
        log = self._run(batch)
        with torch.enable_grad():
            sums = torch.cat([self._sum(part, log) for part in self._sinks], -1)  # [b, d]
        nodes = [log["nodes"][self._numbers[part.place][0]] for part in self._writes]
        found = []
        for j in range(sums.shape[1]):
            slopes = torch.autograd.grad(
                sums[:, j].sum(), nodes, retain_graph=True, materialize_grads=True,
                allow_unused=True,
            )  # fmt: skip
            pieces = [
                self._weigh(read, slope, log)
                for read, slope in zip(self._reads, slopes, strict=True)
            ]
            found.append(torch.cat(pieces, -1))  # [b, u]
        return torch.stack(found).permute(2, 0, 1).float().cpu()

    def _run(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """One forward pass in which every place's value is kept as a node of the graph."""
        program = lower(Chain(()), self._model)
        visits: dict[Place, dict[str, Any]] = {}
        for place, (number, order) in self._numbers.items():
            if place.plus is not None:
                add_stash(visits, place.plus, self._route.starts[place.plus])
            action = {"do": "keep", "id": number, "target": None, "plus": place.plus}
            action |= {"copy": True, "through": None, "source": None}
            # what lies before the first written place needs no gradient, and frozen models work
            action["gradient"] = order >= self._order(self._first)
            action["first"] = number == self._first
            add_visit(visits, place, order)["actions"].append(action)
        program["visits"] = in_order(visits)
        with torch.enable_grad(), self._model.trace(batch, **self._options):
            log = nnsight.save(new_log())
            whole_run(self._model, program, log)
        return log

    def _order(self, number: int) -> Order:
        return next(order for found, order in self._numbers.values() if found == number)

    def _node(self, place: Place, log: dict[str, Any]) -> Tensor:
        """The site's value [b, t, d], in the graph where it can be."""
        number = self._numbers[place][0]
        if number not in log["nodes"]:
            return log["kept"][number]
        x = log["nodes"][number]
        if place.plus is None:
            return x
        return x + self._node(Place(place.plus, "input"), log)

    def _sum(self, part: _Part, log: dict[str, Any]) -> Tensor:
        """[b, k]: each downstream latent's activation, summed over its tokens."""
        x = lift(self._node(part.place, log), part.transform)
        f = encode(cast(part.columns, x.dtype, x.device), x)[0]  # [b, t, k]
        mask = select(part.rule, log["view"]).to(x.device)
        f = torch.where(mask[..., None], f, 0.0)
        self.active["downstream"] |= bool(f.any())
        return f.sum(1)

    @torch.no_grad()
    def _weigh(self, read: _Part, slope: Tensor, log: dict[str, Any]) -> Tensor:
        """[b, k]: −Σ_t f · (slope · direction)."""
        x = lift(log["kept"][self._numbers[read.place][0]], read.transform)
        columns = cast(read.columns, x.dtype, x.device)
        f, scale = encode(columns, x)
        slope = slope.to(x.device, x.dtype)
        along = (slope if scale is None else slope * scale) @ columns["directions"].T
        f = torch.where(select(read.rule, log["view"]).to(x.device)[..., None], f, 0.0)
        self.active["upstream"] |= bool(f.any())
        return -(f * along).sum(1)


def _ablated(
    model: Any,
    batch: dict[str, Tensor],
    ablated: list[Latents],
    down: Latents,
    where: Tokens | None,
    size: int,
) -> Tensor:
    """[n, d]: the mean exact change of downstream sums when each of n latents is ablated."""
    prompts = len(batch["input_ids"])
    union, member = stack(ablated)
    scale = (~member).float().repeat_interleave(prompts, 0)
    rows = {name: tensor.repeat(len(ablated), 1) for name, tensor in batch.items()}
    edit = Clamp(union, scale=scale) | Probe(down, where=where)

    def total(found: Any) -> Tensor:
        reading = found.readings[0]
        return torch.where(reading.mask, reading.values, 0.0).sum(1)  # [rows, d]

    before = total(run(model, batch, Probe(down, where=where), batch_size=size))
    after = total(run(model, rows, edit, batch_size=size))
    return (after.reshape(len(ablated), prompts, -1) - before).mean(1).float()


def _sites(up: Latents, down: Latents) -> list[Site]:
    """Every site that either reads or writes."""
    bases: list[Any] = [basis for latents in (up, down) for basis, _ in latents.parts]
    return [site for basis in bases for site in (basis.site, basis.write_site)]


def _ordered(up: Latents, down: Latents, way: Route) -> Tensor:
    """[u, d] bool."""
    written = [way.orders[basis.write_site] for basis, ix in up.parts for _ in ix]  # type: ignore[attr-defined]
    read = [way.orders[basis.site] for basis, ix in down.parts for _ in ix]
    found = torch.tensor([[w < r for r in read] for w in written])
    if bool(found.any()):
        return found
    raise SiteError(
        explain(
            "edges",
            "downstream",
            got=f"{down!r}, none of which is read after {up!r} is written",
            wanted="latents of a later site",
            cause="upstream and downstream swapped, or of one site",
            call="edges(model, prompts, saes.latents({1: [3]}), saes.latents({2: [5]}))",
        )
    )


def _require_active(
    active: dict[str, bool], up: Latents, down: Latents, where: Tokens | None
) -> None:
    """Latents that never fire would give zeros that read as "no edge"."""
    for name, latents in (("upstream", up), ("downstream", down)):
        if not active[name]:
            at = where if where is not None and name == "downstream" else "any token"
            raise FiringError(
                explain(
                    "edges",
                    name,
                    got=f"{latents!r}, of which none is active at {at}",
                    wanted="at least one active latent",
                    cause="prompts or tokens on which they do not fire",
                    call="scores.top(20), an attribution over these prompts",
                )
            )
