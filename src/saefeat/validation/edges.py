"""edges: which latents drive which later latents, through the bare model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..checks import gradients_on, whole, wholes
from ..dictionaries.by_site import Dictionaries
from ..dictionaries.given import as_latents
from ..dictionaries.latents import Dictionary, Latents
from ..dictionaries.places import require_one_site
from ..errors import FiringError, SiteError
from ..files.checkpoint import Checkpoint
from ..files.hashing import digest
from ..metrics.evaluator import Batch, Data
from ..model.route import Route, route
from ..results.formats import frame
from ..results.provenance import Sourced, model_identity, provenance, told
from ..running.run import run
from ..text.prompts import Prompts, encode_for
from ..text.tokens import Tokens
from ..values.per_prompt import per_prompt
from ..verbs.base import Intervention
from ..verbs.edits import Clamp
from ..verbs.probe import Probe
from .experiment import Folder
from .jacobian import Jacobian
from .stats import spearman

if TYPE_CHECKING:
    import pandas
    from nnsight import TransformersModel


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Edges(Sourced):
    """Estimated effects of ablating upstream latents on downstream latents, some checked.

    Attributes:
        upstream: u latents.
        downstream: d latents.
        ordered: [u, d] bool, whether the downstream latent is read after the upstream one is
            written; there is no edge otherwise.
        by_prompt: [u, d, prompts], the estimate.
        exact: [u, d], the mean exact change for edges that were checked, NaN for others.
        ablated: [u, d], the mean exact change of every later latent for the upstream latents among
            the checked edges, NaN for others. It comes for nothing with the check, and holds what
            the estimate cannot see: downstream latents that the ablation switches on.

    Examples:
        >>> a, b = (sf.Neurons(f"resid_post.{n}", 4).latents([1]) for n in (0, 1))
        >>> one = torch.ones(1, 1)
        >>> sf.validation.Edges(a, b, one > 0, -one[..., None], -one).top(1)
        ((Latents(1: resid_post.0 [1]), Latents(1: resid_post.1 [1]), -1.0),)
    """

    upstream: Latents
    downstream: Latents
    ordered: Tensor
    by_prompt: Tensor
    exact: Tensor
    ablated: Tensor | None = None

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
        whole("Edges.top", "n", n, 0)
        return self._largest(self.estimate, n)

    def _largest(self, values: Tensor, n: int) -> tuple[tuple[Latents, Latents, float], ...]:
        ups, downs = self.upstream.singles(), self.downstream.singles()
        size = values.nan_to_num(0.0).abs().flatten()
        order = size.argsort(descending=True, stable=True)[:n].tolist()
        pairs = [divmod(place, len(downs)) for place in order if size[place] > 0]
        return tuple((ups[i], downs[j], float(values[i, j])) for i, j in pairs)

    def unseen(self, n: int) -> tuple[tuple[Latents, Latents, float], ...]:
        """The n largest exact changes whose estimate is zero: upstream, downstream, change."""
        if self.ablated is None:
            return ()
        whole("Edges.unseen", "n", n, 0)
        return self._largest(torch.where(self.estimate == 0, self.ablated, math.nan), n)

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame, one row an edge that is not zero, strongest first (needs pandas)."""
        ups, downs = list(self.upstream), list(self.downstream)
        rows = []
        for i, j in (self.estimate != 0).nonzero().tolist():
            row: dict[str, Any] = {"upstream_site": str(ups[i][0]), "upstream": ups[i][1]}
            row |= {"downstream_site": str(downs[j][0]), "downstream": downs[j][1]}
            row |= {"estimate": float(self.estimate[i, j]), "exact": float(self.exact[i, j])}
            rows.append(row)
        return frame(sorted(rows, key=lambda row: -abs(row["estimate"])), "Edges.to_pandas")

    def __repr__(self) -> str:
        count, checked = int((self.estimate != 0).sum()), int((~self.exact.isnan()).sum())
        lines = [
            f"Edges: {count} from {len(self.upstream)} to {len(self.downstream)} latents over "
            f"{self.by_prompt.shape[-1]} prompts; {checked} checked, rank correlation "
            f"{self.rank:.2f}; strongest"
        ]
        rows, columns, least = list(self.upstream), list(self.downstream), 0.0
        for up, down, least in self.top(5):
            (a, i), (b, j) = *up, *down
            exact = self.exact[rows.index((a, i)), columns.index((b, j))]
            lines.append(f"  {a} {i} → {b} {j}: {least:+.3f}, exact {exact:+.3f}")
        for up, down, value in self.unseen(1):
            if abs(value) > abs(least):
                (a, i), (b, j) = *up, *down
                lines.append(f"  not seen by the gradient: {a} {i} → {b} {j}: exact {value:+.3f}")
        return "\n".join(lines) + self.origin


@checked(own=("batch_size",))
def edges(
    model: TransformersModel,
    prompts: Prompts,
    upstream: Latents | Dictionary | Dictionaries,
    downstream: Latents | Dictionary | Dictionaries,
    *,
    where: Tokens | None = None,
    check: int = 16,
    batch_size: int = 16,
    checkpoint: Folder = None,
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
        checkpoint: a folder for finished batches: an interrupted call, made again, goes on from
            there.
        progress: show a progress bar.

    Returns:
        An ``Edges``.

    Raises:
        SiteError: if no downstream latent comes after an upstream one.
        FiringError: if no upstream or no downstream latent is ever active there.
        GradientError: under ``torch.no_grad``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> harmful = tiny.splits()["harmful_val"][0].instruction
        >>> up, down = saes.latents({0: [362, 484]}), saes.latents({2: [42]})
        >>> chat = [{"role": "user", "content": harmful}]
        >>> found = sf.validation.edges(model, chat, up, down, check=2)
        >>> found.estimate.shape, bool((found.estimate * found.exact >= 0).all())
        (torch.Size([2, 1]), True)
    """
    wholes("edges", check=(check, 0), batch_size=(batch_size, 1))
    gradients_on("edges")
    up, down = as_latents(upstream, "edges"), as_latents(downstream, "edges")
    require_one_site("edges", "upstream and downstream", up | down, reads=True, writes=True)
    bases = [basis for basis, _ in (*up.parts, *down.parts)]
    way = route(model, [site for basis in bases for site in (basis.site, basis.write_site)])
    ordered = _ordered(up, down, way)
    batch = encode_for(model, prompts)
    pieces = Data(batch).batches(batch_size)
    who: dict[str, Any] = {}
    if checkpoint is not None:
        asked = {"prompts": batch, "upstream": up, "downstream": down, "tokens": where}
        asked |= {"check": check, "batch_size": batch_size}
        who = model_identity(model) | {"job": "edges"} | {n: digest(v) for n, v in asked.items()}
    with Checkpoint(checkpoint, who, "edges") as done:
        values = _estimated(Jacobian(model, way, up, down, where), pieces, done, progress)
        values = torch.where(ordered[..., None], values, 0.0)
        strong = values.mean(-1).abs().flatten().argsort(descending=True, stable=True)[:check]
        chosen = [divmod(place, len(down)) for place in strong.tolist()]
        chosen = [(i, j) for i, j in chosen if values[i, j].any()]
        rows, ablated = (
            sorted({i for i, _ in chosen}),
            torch.full(ordered.shape, math.nan, dtype=torch.float32),
        )
        if rows:
            singles = [up.singles()[i] for i in rows]
            change = _ablated(model, batch, singles, down, where, batch_size, done, progress)
            ablated[rows] = torch.where(ordered[rows], change, math.nan)
    exact = torch.full_like(ablated, math.nan)
    for i, j in chosen:
        exact[i, j] = ablated[i, j]
    origin = provenance(model, [*up.parts, *down.parts], settings=told(where=where, check=check))
    return Edges(up, down, ordered, values, exact, ablated, provenance=origin)


def _estimated(jacobian: Jacobian, pieces: list[Batch], done: Checkpoint, progress: bool) -> Tensor:
    """[u, d, prompts]: every batch's edges."""
    values, active = [], {"upstream": False, "downstream": False}
    bar = tqdm(pieces, disable=not progress, desc="edges", unit="batch")
    for number, piece in enumerate(bar):
        found = _once(done, number, partial(jacobian.values, piece))
        values.append(found["values"])
        active = {name: active[name] or bool(found[name]) for name in active}
    # latents that never fire would give zeros that read as "no edge"
    sides = ("upstream", jacobian.up, None), ("downstream", jacobian.down, jacobian.where)
    for name, latents, where in sides:
        if not active[name]:
            raise FiringError(
                f"edges: `{name}` is {latents!r}, of which none is active at"
                f" {where or 'any token'}, wanted one that is. Likely cause: prompts or tokens on"
                " which they do not fire. Try: scores.top(20), of these prompts"
            )
    return torch.cat(values, -1)


def _once(
    done: Checkpoint, number: int, work: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """A piece of the job, from the checkpoint if it is there."""
    if (kept := done.load(number)) is not None:
        return kept[0]
    tensors = work()
    done.save(number, tensors, {})
    return tensors


def _ablated(
    model: TransformersModel,
    batch: dict[str, Tensor],
    ablated: list[Latents],
    down: Latents,
    where: Tokens | None,
    size: int,
    done: Checkpoint,
    progress: bool,
) -> Tensor:
    """[n, d]: the mean exact change of downstream sums when each of n latents is ablated."""
    prompts = len(batch["input_ids"])
    many, look = max(1, size // prompts), Probe(down, where=where)

    def under(some: list[Latents]) -> dict[str, Tensor]:
        """[n, prompts, d]: the sums with each latent ablated, or as they are."""
        edit: Intervention = look
        if some:
            union, member = per_prompt(some)
            edit = Clamp(union, scale=(~member).float().repeat_interleave(prompts, 0)) | look
        rows = {name: tensor.repeat(max(1, len(some)), 1) for name, tensor in batch.items()}
        reading = run(model, rows, edit, batch_size=size).readings[0]
        sums = torch.where(reading.mask, reading.values, 0.0).sum(1)  # [rows, d]
        return {"sums": sums.unflatten(0, (-1, prompts))}

    groups = [[], *(ablated[n : n + many] for n in range(0, len(ablated), many))]
    bar = tqdm(groups, disable=not progress, desc="edges, checked", unit="batch")
    pieces = enumerate(bar, -(-prompts // size))  # the estimates were pieces as well
    before, *after = (_once(done, n, partial(under, some))["sums"] for n, some in pieces)
    return (torch.cat(after) - before).mean(1).float()


def _ordered(up: Latents, down: Latents, way: Route) -> Tensor:
    """[u, d] bool."""
    written = [way.orders[basis.write_site] for basis, ix in up.parts for _ in ix]
    read = [way.orders[basis.site] for basis, ix in down.parts for _ in ix]
    ordered = torch.tensor([[w < r for r in read] for w in written])
    if bool(ordered.any()):
        return ordered
    raise SiteError(
        f"edges: `downstream` is {down!r}, of which none is read after {up!r} is written, wanted"
        " latents of a later site. Likely cause: the two swapped, or of one site. Try:"
        " edges(model, prompts, saes.latents({1: [3]}), saes.latents({2: [5]}))"
    )
