"""interactions: what two latents do together beyond what each does alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import whole
from ..dictionaries.latents import Latents
from ..metrics.base import Metric
from ..results.table import frame
from ..text.prompts import Prompts
from ..text.tokens import Tokens
from ..verbs.base import Intervention
from .experiment import Experiment, Folder
from .require import require_several, require_upstream_of

if TYPE_CHECKING:
    import pandas
    from nnsight import TransformersModel


@dataclass(frozen=True, eq=False, repr=False)
class Interactions:
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
        return "\n".join(lines)


def interactions(
    model: TransformersModel,
    prompts: Prompts,
    latents: Latents,
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
    chosen = require_several(latents, "interactions", 2)
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
    return Interactions(chosen, experiment.under(), alone, pairs)
