"""stability: would other prompts of the same kind have given the same top set?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments import checked
from ..attribution.scores import Attribution
from ..checks import wholes
from ..dictionaries.latents import Dictionary, Latents
from ..errors import LatentError, SaefeatError
from ..results.formats import frame
from ..results.provenance import Sourced, added
from .ranking import by_prompt, ranking, selection, singles
from .stats import quantiles, resample

if TYPE_CHECKING:
    import pandas


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Stability(Sourced):
    """How the top set of an attribution holds when the prompts are drawn again.

    Attributes:
        dictionaries: what ``keys`` indexes.
        keys: [k, 2] long, (dictionary, latent), the top set, best first.
        mean: [k], the mean score over the data set, as ``Attribution.totals`` has it.
        low: [k], the lower end of its 95 % percentile bootstrap interval.
        high: [k], the upper end.
        inclusion: [k], in which share of the samples the latent is in the top set.
        overlap: [samples], Jaccard overlap of the sample's top set with the top set: the latents
            in both, as a share of those in either.
        outsiders: keys [j, 2] of latents that were in the top set of at least half of the samples
            and are not in the top set itself.

    Examples:
        >>> v = sf.Neurons("resid_post.0", 4)
        >>> half, none = torch.tensor([0.5]), torch.zeros(0, 2)
        >>> pairs = torch.tensor([[0, 2]])
        >>> sf.validation.Stability((v,), pairs, half, half, half, half, half, none)
        Stability of the top 1: overlap 0.50 [0.50, 0.50] over 1 samples
          1 of 1 latents in at least half of the samples, 0 in at least 95 %; none from outside
    """

    dictionaries: tuple[Dictionary, ...]
    keys: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor
    inclusion: Tensor
    overlap: Tensor
    outsiders: Tensor

    @property
    def latents(self) -> tuple[Latents, ...]:
        """[k]: each latent as a selection of its own, best first."""
        return singles(self.dictionaries, self.keys)

    def core(self, share: float = 0.95) -> Latents:
        """The latents of the top set that are in at least this share of the samples' top sets."""
        return selection(self.dictionaries, self.keys[self.inclusion >= share])

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame, one row a latent (needs the pandas extra)."""
        columns = {name: getattr(self, name).tolist() for name in ("mean", "low", "high")}
        sites = [str(self.dictionaries[n].site) for n in self.keys[:, 0].tolist()]
        names = {"site": sites, "latent": self.keys[:, 1].tolist()}
        table = {**names, **columns, "inclusion": self.inclusion.tolist()}
        return frame(table, "Stability.to_pandas")

    def __repr__(self) -> str:
        low, high = quantiles(self.overlap)
        half, most = (int((self.inclusion >= share).sum()) for share in (0.5, 0.95))
        outside = len(self.outsiders) or "none"
        return (
            f"Stability of the top {len(self.keys)}: overlap {self.overlap.mean():.2f} "
            f"[{low:.2f}, {high:.2f}] over {len(self.overlap)} samples\n"
            f"  {half} of {len(self.keys)} latents in at least half of the samples, {most} in at "
            f"least 95 %; {outside} from outside{self.origin}"
        )


@checked
def stability(scores: Attribution, k: int, *, samples: int = 1000, seed: int = 0) -> Stability:
    """Bootstrap the top set over prompts.

    Prompts are drawn anew, with replacement; in each sample the k latents with the highest
    positive mean score are taken, as ``scores.top(k)`` takes them. It says how far the choice of
    prompts alone moves the set, for prompts that were a random draw; it says nothing about whether
    the scores are right.

    Args:
        scores: an attribution over at least two prompts.
        k: the size of the top set; smaller if fewer latents have a positive score.
        samples: bootstrap samples.
        seed: of the draws.

    Returns:
        A ``Stability``. Memory follows prompts x latents that moved.

    Raises:
        SaefeatError: for one prompt, or scores with nothing in them.
        LatentError: if no latent has a positive score.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> prompts = ["hello", "how do i bake bread", "tell me a story"]
        >>> scores = sf.Attribute(saes, sf.logit_diff(5, 6))(model, prompts)
        >>> sf.validation.stability(scores, 5, samples=20).inclusion.shape
        torch.Size([5])
    """
    wholes("stability", k=(k, 1), samples=(samples, 1), seed=(seed, 0))
    prompts = len(scores.tokens)
    if prompts < 2:
        raise SaefeatError(
            "stability: `scores` is of one prompt, wanted at least two prompts. Likely cause: one"
            " drawn again is the same. Try: attribute(model, prompts) over a data set"
        )
    ranked = ranking(scores, "stability")
    share = scores.score.double() / scores.tokens.clamp(min=1)[scores.prompt]
    table = by_prompt(scores, ranked.number, share, len(ranked.keys))  # [m, prompts]
    whole = table.mean(1)
    best = _top(whole[None], k)[0]  # [m] bool
    if not bool(best.any()):
        raise LatentError(
            "stability: `scores` is without a positive score, wanted one latent whose move raises"
            " the metric. Likely cause: the wrong sign. Try: logit_diff(negative, positive)"
        )
    order = whole.argsort(descending=True, stable=True)[: int(best.sum())]
    means, included, overlap = _bootstrap(table, best, order, k, resample(prompts, samples, seed))
    often = (included >= 0.5) & ~best
    low, high = quantiles(means)
    keys = ranked.keys
    return Stability(
        scores.dictionaries, keys[order], whole[order], low, high, included[order], overlap,
        keys[often], provenance=added(scores.provenance, k=k, samples=samples, seed=seed),
    )  # fmt: skip


def _bootstrap(
    table: Tensor, best: Tensor, order: Tensor, k: int, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample means of the top set [samples, k], inclusion of all [m], overlaps [samples]."""
    means, overlaps = [], []
    included = torch.zeros(len(table), dtype=torch.float64)
    for some in weights.split(max(1, (1 << 22) // len(table))):  # 32 MiB of means at a time
        sampled = some @ table.T  # [s, m]
        member = _top(sampled, k)
        included += member.sum(0)
        both, either = (member & best).sum(1), (member | best).sum(1)
        overlaps.append(both / either)
        means.append(sampled[:, order])
    return torch.cat(means), included / len(weights), torch.cat(overlaps)


def _top(values: Tensor, k: int) -> Tensor:
    """[s, m] bool: the k highest positive values of each row."""
    index = values.topk(min(k, values.shape[1]), dim=1).indices
    member = torch.zeros_like(values, dtype=torch.bool).scatter_(1, index, True)
    return member & (values > 0)
