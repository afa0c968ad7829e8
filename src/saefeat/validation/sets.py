"""minimal_set and interactions: sets of latents, searched and combined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..checks import whole
from ..dictionaries.by_site import Dictionaries
from ..dictionaries.given import as_latents
from ..dictionaries.latents import Dictionary, Latents
from ..errors import LatentError, SaefeatError
from ..metrics.base import Metric
from ..results.formats import frame
from ..results.provenance import Sourced, provenance, told
from ..text.prompts import Prompts
from ..text.tokens import Tokens
from ..verbs.base import Intervention
from .experiment import Experiment, Folder, require_upstream_of

if TYPE_CHECKING:
    import pandas
    from nnsight import TransformersModel


Criterion = Callable[[Tensor], Tensor]
Holds = float | Criterion | tuple[Criterion, float]


@checked
@dataclass(frozen=True, eq=False, repr=False)
class MinimalSet(Sourced):
    """A set of which nothing can be dropped, and how it was reached.

    Attributes:
        latents: what is left.
        removed: what was dropped, in order, each a selection of its own.
        metric: [dropped + 1, prompts], the metric at the start and after each drop.
        held: [dropped + 1], the share of prompts for which the criterion held.
        without: [left, prompts], the metric if one more latent were dropped, in the order of
            ``latents``: none of these meets the criterion.
        clean: [prompts], the metric in the bare model.

    Examples:
        >>> v, one = sf.Neurons("resid_post.0", 4), torch.ones(1, 2)
        >>> sf.validation.MinimalSet(v.latents([2]), (), one, torch.ones(1), 0 * one, 0 * one[0])
        MinimalSet: 1 of 1 latents left; metric 0.000 bare, 1.000 at the start, 1.000 at the end
          Latents(1: resid_post.0 [2])
    """

    latents: Latents
    removed: tuple[Latents, ...]
    metric: Tensor
    held: Tensor
    without: Tensor
    clean: Tensor

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame, one row a drop, the start first (needs the pandas extra)."""
        dropped = [next(iter(one)) for one in self.removed]
        sites, indices = [None, *(str(s) for s, _ in dropped)], [None, *(i for _, i in dropped)]
        columns = {"site": sites, "latent": indices, "metric": self.metric.mean(1).tolist()}
        return frame({**columns, "held": self.held.tolist()}, "MinimalSet.to_pandas")

    def __repr__(self) -> str:
        means = self.metric.mean(1)
        return (
            f"MinimalSet: {len(self.latents)} of {len(self.latents) + len(self.removed)} latents "
            f"left; metric {self.clean.mean():.3f} bare, {means[0]:.3f} at the start, "
            f"{means[-1]:.3f} at the end\n  {self.latents!r}{self.origin}"
        )


@checked(own=("batch_size",))
def minimal_set(
    model: TransformersModel,
    prompts: Prompts,
    latents: Latents | Dictionary | Dictionaries,
    metric: Metric,
    *,
    holds: Holds = 0.0,
    within: Latents | Any = None,
    where: Tokens | None = None,
    baseline: Intervention | None = None,
    batch_size: int = 32,
    checkpoint: Folder = None,
    progress: bool = False,
) -> MinimalSet:
    """Greedy pruning (arXiv 2509.09708): drop the latent whose loss hurts least, and again.

    By default a set *acts by being ablated*: it suffices if its ablation brings the behavior
    about, such as compliance in place of refusal. With ``within``, it acts by being *kept* while
    all other latents of ``within`` are ablated: a circuit.

    At each step all sets with one latent less are run, every (set, prompt) a row of a batch. The
    one for which the criterion holds for most prompts is taken (ties: the higher mean metric,
    then the earlier latent), as long as it holds. So nothing can be dropped from what is left,
    one at a time; there may be smaller sets all the same, and other sets as small. The result is
    deterministic. From n latents about n²/2 · prompts rows run.

    Args:
        model: an nnsight ``TransformersModel``.
        prompts: strings, chats or token ids.
        latents: the set to start from.
        metric: higher is better; any that ``Attribute`` takes. It needs no gradient: an argmax may
            be in it.
        holds: a number that the mean metric must reach, or a function from the metric [prompts]
            to bools [prompts], such as ``lambda m: m > 0``, that must hold for all of them; for a
            share of them with ``holds=(lambda m: m > 0, 0.9)``.
        within: all latents of the circuit's model; None to ablate the set itself.
        where: which tokens are edited; every real token by default, a continuation's too.
        baseline: the run that ``BASELINE_TOP`` and ``kl("baseline")`` refer to, such as
            ``Ablate(latents)``.
        batch_size: the most rows a forward pass; fewer where prompts are long.
        checkpoint: a folder for finished batches: an interrupted call, made again, goes on from
            there.
        progress: show a progress bar.

    Returns:
        A ``MinimalSet``.

    Raises:
        SaefeatError: if the criterion does not hold for the set given, or holds for no latents at
            all; for a metric that refers to a baseline, without one.
        LatentError: for an empty set, or one that is not inside ``within``.
        SiteError: for a metric of a site that comes before the latents.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> comply = sf.logit_diff(list(tiny.COMPLY_OPENINGS), list(tiny.REFUSAL_OPENINGS))
        >>> harmful = tiny.splits()["harmful_val"][0].instruction
        >>> prompt = [{"role": "user", "content": harmful}]
        >>> top = sf.Attribute(saes, comply)(model, prompt).top(8)
        >>> sf.validation.minimal_set(model, prompt, top, comply).latents
        Latents(2: resid_post.0 [484], resid_post.1 [359])
    """
    start = as_latents(latents, "minimal_set")
    judge = _Judge(holds)
    whole = None if within is None else _around(start, within)
    require_upstream_of(metric, model, start if whole is None else whole, "minimal_set")
    experiment = Experiment.of_metric(
        model, prompts, metric, function="minimal_set", batch_size=batch_size, baseline=baseline,
        checkpoint=checkpoint, latents=start, within=whole, tokens=where, holds=holds,
    )  # fmt: skip
    clean = experiment.under()

    def measure(sets: list[Latents]) -> Tensor:
        ablated = sets if whole is None else [whole - kept for kept in sets]
        return experiment.without(ablated, where)

    first = measure([start])[0]
    _require_sufficient(judge, first, measure([Latents(())])[0], start)
    left, removed, path, tried = _pruned(start, first, measure, judge, progress)
    metrics = torch.stack(path)
    held = torch.tensor([judge.share_of(row) for row in metrics])
    settings = told(metric=metric, holds=holds, within=whole, where=where, baseline=baseline)
    origin = provenance(model, start.parts, settings=settings)
    return MinimalSet(left, tuple(removed), metrics, held, tried, clean, provenance=origin)


def _pruned(
    start: Latents,
    first: Tensor,
    measure: Callable[[list[Latents]], Tensor],
    judge: _Judge,
    progress: bool,
) -> tuple[Latents, list[Latents], list[Tensor], Tensor]:
    """What is left, what was dropped, the metric on the way, and with one more latent dropped."""
    left, removed, path = start, [], [first]
    with tqdm(total=len(start), disable=not progress, desc="minimal_set", unit="latent") as bar:
        while True:
            singles = left.singles()
            tried = measure([left - one for one in singles])  # [left, prompts]
            best = max(range(len(singles)), key=lambda n: (*judge.rank(tried[n]), -n))
            # the last one stays: that nothing at all would do was refused before
            if len(left) == 1 or not judge(tried[best]):
                return left, removed, path, tried
            left = left - singles[best]
            removed.append(singles[best])
            path.append(tried[best])
            bar.update()


class _Judge:
    """The criterion: whether a metric [prompts] meets it, and how nearly."""

    def __init__(self, holds: Holds) -> None:
        self._holds, self._share = holds if isinstance(holds, tuple) else (holds, 1.0)
        if not 0 < self._share <= 1:
            raise SaefeatError(
                f"minimal_set: `holds` is a pair with {self._share}, wanted a share in (0, 1]."
                " Likely cause: a percentage, or a count. Try: holds=(lambda m: m > 0, 0.9)"
            )

    def share_of(self, values: Tensor) -> float:
        """The share of prompts for which it holds."""
        if not callable(self._holds):
            return float((values >= self._holds).double().mean())
        met = self._holds(values)
        if isinstance(met, Tensor) and met.dtype == torch.bool and met.shape == values.shape:
            return float(met.double().mean())
        raise SaefeatError(
            f"minimal_set: `holds` is a function that gives {met!r:.60}, wanted bools of shape"
            f" {tuple(values.shape)}, one a prompt. Likely cause: a criterion on the mean, or a"
            " single bool. Try: holds=lambda m: m > 0, or a number for the mean"
        )

    def rank(self, values: Tensor) -> tuple[float, ...]:
        """Higher is nearer; where the highest fails, all fail."""
        mean = float(values.double().mean())
        return (self.share_of(values), mean) if callable(self._holds) else (mean,)

    def __call__(self, values: Tensor) -> bool:
        limit = self._share if callable(self._holds) else float(self._holds)
        return self.rank(values)[0] >= limit


def _around(latents: Latents, within: Any) -> Latents:
    whole = as_latents(within, "minimal_set")
    if len(whole & latents) == len(latents):
        return whole
    raise LatentError(
        f"minimal_set: `within` is {whole!r}, wanted a selection that holds all of {latents!r}."
        " Likely cause: the dictionaries were loaded again, or other layers. Try: within=saes, the"
        " mapping the latents came from"
    )


def _require_sufficient(judge: _Judge, whole: Tensor, none: Tensor, start: Latents) -> None:
    if not judge(whole):
        said = (
            f"`latents` is {start!r}, with which the criterion holds for"
            f" {judge.share_of(whole):.0%} of the prompts (mean metric {whole.mean():.3f}), wanted"
            " a set that suffices. Likely cause: too few latents, or a metric of the wrong sign."
            " Try: scores.top(100), or a larger share"
        )
    elif judge(none):
        said = (
            f"`holds` is met with no latents at all (mean metric {none.mean():.3f}), wanted a"
            " criterion that the set brings about. Likely cause: prompts on which the behavior is"
            " there anyway, or a metric of the wrong sign. Try: filter the prompts first"
        )
    else:
        return
    raise SaefeatError(f"minimal_set: {said}")


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Interactions(Sourced):
    """Second differences of a metric under ablation of latents, alone and in pairs.

    Attributes:
        latents: k latents.
        clean: [prompts], m.
        alone: [k, prompts], m(−i).
        pairs: [k, k, prompts], m(−i−j), symmetric; the diagonal holds m(−i).

    Examples:
        >>> v = sf.Neurons("resid_post.0", 4).latents([0, 2])
        >>> nothing = torch.zeros(2, 2, 1)  # an AND: without one of the two, nothing is left
        >>> sf.validation.Interactions(v, torch.ones(1), nothing[0], nothing).values
        tensor([[0., 1.],
                [1., 0.]])
    """

    latents: Latents
    clean: Tensor
    alone: Tensor
    pairs: Tensor

    @property
    def by_prompt(self) -> Tensor:
        """[k, k, prompts]: m(−i−j) − m(−i) − m(−j) + m, zero on the diagonal.

        Zero if the two effects add up. For two latents that support the metric, above zero is an
        AND (the loss of either is the loss of both), below zero an OR (each stands in for the
        other).
        """
        differences = self.pairs - self.alone[:, None] - self.alone[None] + self.clean
        off = ~torch.eye(len(self.alone), dtype=torch.bool)
        return torch.where(off[..., None], differences, 0.0)

    @property
    def values(self) -> Tensor:
        """[k, k]: the mean over prompts."""
        return self.by_prompt.mean(-1)

    def top(self, n: int) -> tuple[tuple[Latents, float], ...]:
        """The n pairs with the largest |interaction|, each once, with its value."""
        whole("Interactions.top", "n", n, 0)
        row, column = torch.triu_indices(len(self.alone), len(self.alone), 1)
        values = self.values[row, column]
        one = self.latents.singles()
        order = values.abs().argsort(descending=True, stable=True)[:n].tolist()
        return tuple((one[row[p]] | one[column[p]], float(values[p])) for p in order)

    def to_pandas(self) -> pandas.DataFrame:
        """A square DataFrame of the means (needs the pandas extra)."""
        names = [f"{site} {index}" for site, index in self.latents]
        columns = dict(zip(names, self.values.T.tolist(), strict=True))
        return frame(columns, "Interactions.to_pandas").set_axis(names)

    def __repr__(self) -> str:
        effects = (self.alone - self.clean).mean(1)
        lines = [
            f"Interactions of {len(self.latents)} latents over {len(self.clean)} prompts: mean "
            f"|effect| alone {effects.abs().mean():.3f}, largest interactions"
        ]
        lines += [f"  {value:+.3f}  {pair!r}" for pair, value in self.top(5)]
        return "\n".join(lines) + self.origin


@checked(own=("batch_size",))
def interactions(
    model: TransformersModel,
    prompts: Prompts,
    latents: Latents | Dictionary | Dictionaries,
    metric: Metric,
    *,
    where: Tokens | None = None,
    baseline: Intervention | None = None,
    batch_size: int = 32,
    checkpoint: Folder = None,
    progress: bool = False,
) -> Interactions:
    """Ablate latents one by one and two by two: m(−i−j) − m(−i) − m(−j) + m.

    Every (set, prompt) is a row of a batch: k(k + 1)/2 · prompts rows for k latents. At sites in a
    row the later latent of a pair is read after the earlier one's ablation.

    Args:
        model: an nnsight ``TransformersModel``.
        prompts: strings, chats or token ids.
        latents: at least two.
        metric: what is differenced; any that ``Attribute`` takes. It needs no gradient.
        where: which tokens; every real token by default, a continuation's too.
        baseline: the run that ``BASELINE_TOP`` and ``kl("baseline")`` refer to.
        batch_size: the most rows a forward pass; fewer where prompts are long.
        checkpoint: a folder for finished batches: an interrupted call, made again, goes on from
            there.
        progress: show a progress bar.

    Returns:
        An ``Interactions``.

    Raises:
        LatentError: for fewer than two latents.
        SaefeatError: for a metric that refers to a baseline, without one.
        SiteError: for a metric of a site that comes before the latents.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> chosen = saes.latents({2: [42, 352], 3: [29]})
        >>> sf.validation.interactions(model, ["hello"], chosen, sf.metrics.logit(5)).values.shape
        torch.Size([3, 3])
    """
    chosen = as_latents(latents, "interactions")
    if len(chosen) < 2:
        raise LatentError(
            f"interactions: `latents` is {chosen!r}, wanted at least 2. Likely cause: a search that"
            " found too few. Try: scores.top(20)"
        )
    require_upstream_of(metric, model, chosen, "interactions")
    experiment = Experiment.of_metric(
        model, prompts, metric, function="interactions", batch_size=batch_size, baseline=baseline,
        checkpoint=checkpoint, latents=chosen, tokens=where,
    )  # fmt: skip
    one, k = chosen.singles(), len(chosen)
    row, column = torch.triu_indices(k, k, 1).tolist()
    sets = [*one, *(one[i] | one[j] for i, j in zip(row, column, strict=True))]
    measured = experiment.without(sets, where, progress=progress)  # [k + pairs, prompts]
    alone = measured[:k]
    pairs = torch.diag_embed(alone.T).permute(1, 2, 0).clone()
    pairs[row, column] = pairs[column, row] = measured[k:]
    settings = told(metric=metric, where=where, baseline=baseline)
    origin = provenance(model, chosen.parts, settings=settings)
    return Interactions(chosen, experiment.under(), alone, pairs, provenance=origin)
