"""faithfulness: how much of the behavior a set of latents carries, as the set grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..attribution.attribute import Attribute
from ..attribution.passes import Job
from ..attribution.scores import Attribution
from ..checks import one_of, wholes
from ..dictionaries.latents import Dictionary, Latents
from ..errors import LatentError, SaefeatError
from ..results.formats import frame, new_figure
from ..results.provenance import Sourced, added
from ..text.prompts import Prompts
from ..text.tokens import Tokens
from ..verbs.edits import Ablate
from ..verbs.probe import Probe
from .experiment import Experiment, Folder
from .made import require_made
from .ranking import Ranking, matched_sets, members_mass, random_sets, ranking, selection
from .stats import Estimate, cancelled, quantiles, resample

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from nnsight import TransformersModel


MEASURES = ("faithfulness", "completeness", "minimality")
SAMPLES = 1000


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(Sourced):
    """Faithfulness, completeness and minimality of the first k latents, for growing k.

    With m(S) the mean metric over prompts when only S is kept and all other latents are ablated
    (the error term is always kept), ∅ the empty set and M all latents, so that m(M) is clean:

    * faithfulness(S) = (m(S) − m(∅)) / (m(M) − m(∅))
    * completeness(S) = (m(M∖S) − m(∅)) / (m(M) − m(∅)), the faithfulness of what is left: low if
      nothing outside S can do the work (both as in Marks et al. 2024, section 4)
    * minimality(S) = min over v ∈ S of |m(S) − m(S∖v)| / |m(M) − m(∅)|: what the most dispensable
      member adds. Wang et al. 2022 allow more of S to be removed with v; this is the bound from
      removing v alone.

    Attributes:
        dictionaries: what the keys index.
        sizes: [n], ascending.
        sets: ``"top"``, ``"random"``, ``"matched"`` → keys [draws, largest size, 2]; the set of
            size k is the first k.
        clean: [prompts], m(M).
        empty: [prompts], m(∅).
        kept: for each of ``sets``, [n, draws, prompts], m(S).
        removed: for each of ``sets``, [n, draws, prompts], m(M∖S).
        marginals: for each size k, [k, prompts], m(S∖v) for the members v of the top set, in the
            order of ``latents(k)``.
        mass: for each of ``sets``, [draws, largest size], how much each member writes on these
            prompts, Σ |activation| · ‖direction‖.

    Examples:
        >>> v, one = sf.Neurons("resid_post.0", 4), torch.ones(1, 1, 2)
        >>> sets = {"top": torch.zeros(1, 1, 2).long()}
        >>> found = sf.validation.Faithfulness(
        ...     (v,), (1,), sets, 4 * torch.ones(2), torch.zeros(2),
        ...     {"top": 3 * one}, {"top": one}, (torch.zeros(1, 2),)
        ... )
        >>> found.curve("faithfulness")[0].value, found.curve("completeness")[0].value
        (0.75, 0.25)
    """

    dictionaries: tuple[Dictionary, ...]
    sizes: tuple[int, ...]
    sets: dict[str, Tensor]
    clean: Tensor
    empty: Tensor
    kept: dict[str, Tensor]
    removed: dict[str, Tensor]
    marginals: tuple[Tensor, ...]
    mass: dict[str, Tensor] = field(default_factory=dict)

    def latents(self, size: int) -> Latents:
        """The top set of this size, one of ``sizes`` or any below the largest.

        Raises:
            SaefeatError: for a size that was not reached.
        """
        if type(size) is not int or not 0 < size <= self.sizes[-1]:
            raise SaefeatError(
                f"Faithfulness.latents: `size` is {size!r}, wanted an integer in"
                f" 1..{self.sizes[-1]}, the largest size. Likely cause: a set larger than any that"
                f" was run. Try: faithfulness(..., sizes=(..., {size!r}))"
            )
        return selection(self.dictionaries, self.sets["top"][0, :size])

    def balance(self, of: str) -> tuple[float, ...]:
        """[n]: how much a control writes for each size, as a share of what the top writes.

        A matched control far below 1 is no match: no other latents write as much.

        Args:
            of: ``"random"`` or ``"matched"`` (means over draws).
        """
        self._require("mass", of, tuple(self.mass))
        return tuple(
            float(self.mass[of][:, :k].sum(1).mean() / self.mass["top"][:, :k].sum())
            for k in self.sizes
        )

    def curve(self, measure: str, of: str = "top", *, seed: int = 0) -> tuple[Estimate, ...]:
        """[n] values, each with the ends of its 95 % percentile bootstrap interval over prompts.

        Args:
            measure: ``"faithfulness"``, ``"completeness"`` or ``"minimality"``.
            of: ``"top"``, ``"random"`` or ``"matched"`` (means over draws). Minimality is known of
                the top alone.
            seed: of the bootstrap. With one prompt the ends are NaN.
        """
        known = ("top",) if measure == "minimality" else tuple(self.sets)
        self._require(measure, of, known)
        prompts = len(self.clean)
        weights = resample(prompts, SAMPLES, seed)
        every = torch.full((1, prompts), 1 / prompts, dtype=torch.float64)
        points = []
        for n in range(len(self.sizes)):
            value = float(self._value(measure, of, n, every))
            low, high = quantiles(self._value(measure, of, n, weights))
            ends = (float(low), float(high)) if prompts > 1 else (math.nan, math.nan)
            points.append(Estimate(value, *ends))
        return tuple(points)

    def _require(self, measure: str, of: str, known: tuple[str, ...]) -> None:
        if measure in (*MEASURES, "mass") and of in known:
            return
        function = "Faithfulness.balance" if measure == "mass" else "Faithfulness.curve"
        raise SaefeatError(
            f"{function}: `measure and of` is {measure!r} of {of!r}, wanted one of"
            f" {', '.join(MEASURES)}, of {' or '.join(known)}. Likely cause: a typing error, or"
            ' controls that were not run. Try: curve("completeness", "matched")'
        )

    def _value(self, measure: str, of: str, n: int, weights: Tensor) -> Tensor:
        """[samples]: one measure of one size, for weights [samples, prompts] of the prompts."""
        empty = weights @ self.empty.double()
        whole = weights @ self.clean.double() - empty
        if measure == "minimality":
            steps = self.kept["top"][n] - self.marginals[n]  # [k, prompts]
            return (weights @ steps.double().T).abs().amin(1) / whole.abs()
        table = self.kept if measure == "faithfulness" else self.removed
        return (weights @ table[of][n].double().mean(0) - empty) / whole

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame in long form, one row a point of a curve (needs the pandas extra)."""
        rows = [
            {"size": size, "measure": measure, "of": of, **point._asdict()}
            for measure, of in self._curves()
            for size, point in zip(self.sizes, self.curve(measure, of), strict=True)
        ]
        return frame(rows, "Faithfulness.to_pandas")

    def plot(self) -> Figure:
        """A matplotlib figure, one panel a measure (needs the plots extra)."""
        figure = new_figure("Faithfulness.plot", (10, 3.2))
        panels: dict[str, Any] = dict(zip(MEASURES, figure.subplots(1, 3), strict=True))
        styles = {"top": "-o", "matched": "--s", "random": ":^"}
        for measure, of in self._curves():
            points = self.curve(measure, of)
            axes = panels[measure]
            (line,) = axes.plot(self.sizes, [p.value for p in points], styles[of], label=of)
            ends = [[p.low for p in points], [p.high for p in points]]
            axes.fill_between(self.sizes, *ends, color=line.get_color(), alpha=0.15)
        for measure, axes in panels.items():
            axes.set_xscale("log", base=2)
            axes.set(title=measure, xlabel="latents in the set")
            axes.axhline(0, color="#999999", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        panels["faithfulness"].legend(frameon=False)
        return figure

    def _curves(self) -> list[tuple[str, str]]:
        both = [(measure, of) for measure in MEASURES[:2] for of in self.sets]
        return [*both, ("minimality", "top")]

    def __repr__(self) -> str:
        names = [f"{m[:5]}. {of}" for m, of in self._curves()]
        lines = [
            f"Faithfulness: the metric is {self.clean.mean():.3f} clean and "
            f"{self.empty.mean():.3f} with all latents ablated, over {len(self.clean)} prompts",
            *cancelled(self.clean - self.empty),
            "   size" + "".join(f"{name:>15}" for name in names),
        ]
        curves = [self.curve(measure, of) for measure, of in self._curves()]
        for size, *points in zip(self.sizes, *curves, strict=True):
            lines.append(f"{size:7}" + "".join(f"{point.value:15.2f}" for point in points))
        shares = [f"{of} {self.balance(of)[-1]:.2f}" for of in self.mass if of != "top"]
        if shares:
            told = f"the controls write, as a share of what the top writes: {', '.join(shares)}"
            lines.append(f"  at size {self.sizes[-1]} {told}")
        return "\n".join(lines) + self.origin


@checked(own=("batch_size",))
def faithfulness(
    attribute: Attribute,
    model: TransformersModel,
    prompts: Prompts,
    scores: Attribution,
    *,
    sizes: Sequence[int] | None = None,
    controls: int = 2,
    to: str = "zero",
    seed: int = 0,
    batch_size: int = 32,
    checkpoint: Folder = None,
    progress: bool = False,
) -> Faithfulness:
    """Keep the top latents and ablate all others; ablate the top and keep all others.

    Sets grow by rank of |estimate| (sums over scored tokens, as in ``audit``). "All others" are
    all other latents of ``attribute.target``, active or not in the clean run, since ablating some
    wakes others. They are ablated at the scored tokens; the error term stays.

    Controls draw as many latents from those that moved and are in no top set: ``random`` at
    random; ``matched`` one for each member, of the same dictionary and with the nearest mass
    (Σ |activation| · ‖direction‖). The top may write more than anything else does; how nearly
    the controls match is in ``Faithfulness.balance``, and printed.

    The cost: Σ over sizes of 2 + 4 · controls + size passes over the prompts. About half of them
    ablate nearly every latent, which encodes and decodes with the whole dictionaries: for wide
    ones, pass an ``Attribute`` on ``Latents`` (then those alone are "all latents").

    Args:
        attribute: the verb that made the scores.
        model: an nnsight ``TransformersModel``.
        prompts: the prompts that were attributed, in the same order.
        scores: what ``attribute(model, prompts)`` gave.
        sizes: set sizes; by default powers of two up to 32 or half of the latents that moved.
        controls: draws of each kind of control; 0 for none.
        to: what ablated latents are set to: ``"zero"``, or ``"mean"``, their mean over the
            prompts' scored tokens (each prompt that has any counts alike).
        seed: of the controls.
        batch_size: the most prompts a forward pass; fewer where prompts are long.
        checkpoint: a folder for finished sets: an interrupted call, made again, goes on from there.
        progress: show a progress bar.

    Returns:
        A ``Faithfulness``.

    Raises:
        PromptError: as in ``audit``.
        SaefeatError: for scores with nothing in them, sizes without controls, or a metric that
            does not move when every latent is ablated.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = tiny.model("chat")
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> attribute = sf.Attribute(saes[3], sf.logit_diff(5, 6))
        >>> scores = attribute(model, ["hello", "how do i bake bread"])
        >>> found = sf.validation.faithfulness(
        ...     attribute, model, ["hello", "how do i bake bread"], scores, sizes=[2], controls=1
        ... )
        >>> len(found.curve("faithfulness", "matched"))
        1
    """
    wholes("faithfulness", controls=(controls, 0), seed=(seed, 0))
    one_of("faithfulness", "to", to, ("zero", "mean"))
    ranked = ranking(scores, "faithfulness")
    ladder = _sizes(sizes, ranked, controls)
    scored = selection(scores.dictionaries, ranked.keys)
    if len(attribute.job.target & scored) < len(scored):
        raise LatentError(
            "faithfulness: `scores` is of other latents than attribute.target, wanted the scores"
            " this attribute made. Likely cause: the dictionaries were loaded again, and are other"
            " objects. Try: scores = attribute(model, prompts)"
        )
    experiment = Experiment.of_attribute(
        attribute, model, prompts, function="faithfulness", batch_size=batch_size,
        checkpoint=checkpoint, scores=scores, sizes=ladder, controls=controls, to=to, seed=seed,
    )  # fmt: skip
    clean = experiment.under()
    source = require_made(experiment, attribute.job, clean, scores)
    sets = {"top": ranked.keys[None, : ladder[-1]]}
    if controls:
        sets["random"] = random_sets(ranked, ladder[-1], controls, seed)
        sets["matched"] = matched_sets(scores, ranked, ladder[-1], controls, seed)
    circuit = _Circuit(experiment, attribute.job, to)
    empty = circuit.without(circuit.latents)
    _require_effect(clean, empty)
    chosen = {
        name: [[selection(scores.dictionaries, keys[:k]) for keys in drawn] for k in ladder]
        for name, drawn in sets.items()
    }
    tables = (*_run(circuit, chosen, progress), members_mass(scores, ranked, sets))
    origin = added(source, controls=controls, to=to, seed=seed)
    return Faithfulness(scores.dictionaries, ladder, sets, clean, empty, *tables, provenance=origin)


def _run(
    circuit: _Circuit, chosen: dict[str, list[list[Latents]]], progress: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[Tensor, ...]]:
    """Every set kept, every set removed, and the top sets kept but for one member."""
    tops = [drawn[0] for drawn in chosen["top"]]
    sets = sum(len(drawn) for by_size in chosen.values() for drawn in by_size)
    count = 2 * sets + sum(map(len, tops))
    with tqdm(total=count, disable=not progress, desc="faithfulness", unit="set") as bar:
        kept = {name: circuit.table(drawn, True, bar) for name, drawn in chosen.items()}
        removed = {name: circuit.table(drawn, False, bar) for name, drawn in chosen.items()}
        members = [[top - one for one in top.singles()] for top in tops]
        marginals = tuple(circuit.table([left], True, bar)[0] for left in members)
    return kept, removed, marginals


class _Circuit:
    """All latents, to keep or to ablate some of."""

    def __init__(self, experiment: Experiment, job: Job, to: str) -> None:
        self.latents = job.target
        self._experiment, self._where = experiment, job.where
        if self._where is None and experiment.data.lengths is not None:
            self._where = Tokens.prompt()  # a continuation is not scored, unless asked for
        self._to = {} if to == "zero" else _means(experiment, self.latents, self._where)

    def without(self, ablated: Latents) -> Tensor:
        """[prompts]: the metric with these latents ablated."""
        if not len(ablated):
            return self._experiment.under(None)
        values = [
            self._to[id(basis)][torch.tensor(indices)]
            if self._to
            else torch.zeros(len(indices), dtype=torch.float32)
            for basis, indices in ablated.parts
        ]
        return self._experiment.under(Ablate(ablated, to=torch.cat(values), where=self._where))

    def table(self, sets: Sequence[Sequence[Latents]], keep: bool, bar: Any) -> Tensor:
        """[n, draws, prompts]: the metric with each set kept, or with each ablated."""
        rows = []
        for drawn in sets:
            for chosen in drawn:
                rows.append(self.without(self.latents - chosen if keep else chosen))
                bar.update()
        return torch.stack(rows).reshape(len(sets), len(sets[0]), -1)


def _means(experiment: Experiment, latents: Latents, where: Tokens | None) -> dict[int, Tensor]:
    """id(dictionary) → the mean of each of its latents [d_sae] over prompts that have a token."""
    readings = experiment.readings(Probe(latents, where=where, reduce="mean"))
    sums = [torch.where(r.mask, r.values, 0.0).sum((0, 1)).double() for r in readings]
    total = sum(sums[1:], sums[0])
    counts = torch.stack([r.mask.sum((0, 1)) for r in readings]).sum(0)
    means, start, by_dictionary = total / counts.clamp(min=1), 0, {}
    for basis, indices in latents.parts:
        row = torch.zeros(basis.d_sae, dtype=torch.float32)
        row[torch.tensor(indices)] = means[start : start + len(indices)].float().cpu()
        by_dictionary[id(basis)], start = row, start + len(indices)
    return by_dictionary


def _sizes(sizes: Sequence[int] | None, ranked: Ranking, controls: int) -> tuple[int, ...]:
    """Ascending set sizes for which there are latents and controls."""
    moved = len(ranked.keys)
    most = moved // 2 if controls else moved
    if sizes is None:
        sizes = [2**n for n in range(6) if 2**n <= most]
    ladder = tuple(sizes)
    fit = all(type(size) is int and 1 <= size <= moved for size in ladder)
    if not ladder or not fit or list(ladder) != sorted(set(ladder)):
        raise SaefeatError(
            f"faithfulness: `sizes` is {ladder!r}, wanted ascending integers in 1..{moved}, the"
            " latents that moved. Likely cause: more than were found, or out of order. Try:"
            " faithfulness(..., sizes=(1, 2, 4, 8))"
        )
    if controls and moved < 2 * ladder[-1]:
        raise SaefeatError(
            f"faithfulness: `sizes` is up to {ladder[-1]}, wanted at most {most}, half of the"
            f" {moved} latents that moved: as many are left for a control. Likely cause: few are"
            f" active on these prompts. Try: sizes=(1, {max(1, most)}), or controls=0"
        )
    return ladder


def _require_effect(clean: Tensor, empty: Tensor) -> None:
    change = float((clean - empty).mean())
    if abs(change) <= 1e-6 * (1 + float(clean.abs().max())):
        raise SaefeatError(
            f"faithfulness: `attribute` is a metric that moves by {change:.1e} when every latent is"
            " ablated, wanted one that the latents carry. Likely cause: these sites do not reach"
            " it, or the error term carries it. Try: another site, or another metric"
        )
