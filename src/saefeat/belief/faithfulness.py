"""faithfulness: how much of the behavior a set of latents carries, as the set grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..attribution.attribute import Attribute
from ..attribution.record import Attribution
from ..errors import LatentError, SaefeatError, explain
from ..execution.run import run
from ..latents import Latents, as_latents
from ..prompts import Prompts
from ..verbs.edits import Ablate
from ..verbs.probe import Probe
from .bench import Bench, bench_of, require, require_same
from .controls import matched_sets, random_sets, require_pool
from .curves import Faithfulness
from .ranking import Ranking, ranking, selection


def faithfulness(
    attribute: Attribute,
    model: Any,
    prompts: Prompts,
    scores: Attribution,
    *,
    sizes: Sequence[int] | None = None,
    controls: int = 2,
    to: str = "zero",
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> Faithfulness:
    """Keep the top latents and ablate all others; ablate the top and keep all others.

    Sets grow by rank of |estimate| (sums over scored tokens, as in ``audit``). "All others" are
    all other latents of ``attribute.target``, active or not in the clean run, since ablating some
    wakes others. They are ablated at the scored tokens; the error term stays.

    Controls draw as many latents from those that moved and are in no top set: ``random`` at
    random; ``matched`` one for each member, of the same dictionary and with the nearest mass
    (Σ |activation| · ‖direction‖).

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
            prompts' scored tokens (each prompt counts alike).
        seed: of the controls.
        batch_size: prompts a forward pass.
        progress: show a progress bar.

    Returns:
        A ``Faithfulness``.

    Raises:
        PromptError: if the metric of these prompts is not the one in ``scores``.
        SaefeatError: for scores with nothing in them, sizes without controls, or a metric that
            does not move when every latent is ablated.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> model = sf.wrap(*tiny.load("chat"))
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> attribute = sf.Attribute(saes[3], sf.logit_diff(5, 6))
        >>> scores = attribute(model, ["hello", "how do i bake bread"])
        >>> found = sf.faithfulness(
        ...     attribute, model, ["hello", "how do i bake bread"], scores, sizes=[2], controls=1
        ... )
        >>> len(found.curve("faithfulness", "matched"))
        1
    """
    require("faithfulness", controls=(controls, 0), seed=(seed, 0))
    ranked = ranking(scores, "faithfulness")
    ladder = _sizes(sizes, ranked, controls)
    bench = bench_of(attribute, model, prompts, where="faithfulness", batch_size=batch_size)
    clean = bench.under(None)
    require_same("faithfulness", clean, scores.clean)
    sets = {"top": ranked.keys[None, : ladder[-1]]}
    if controls:
        sets["random"] = random_sets(ranked, ladder[-1], controls, seed)
        sets["matched"] = matched_sets(scores, ranked, ladder[-1], controls, seed)
    whole = _Whole(bench, attribute, _values(attribute, bench, to))
    empty = whole.without(whole.latents)
    _require_effect(clean, empty)
    chosen = {
        name: [[selection(scores.dictionaries, keys[:k]) for keys in drawn] for k in ladder]
        for name, drawn in sets.items()
    }
    _require_inside(whole.latents, chosen["top"][-1][0])
    count = 2 * len(ladder) * sum(map(len, sets.values())) + sum(ladder)
    with tqdm(total=count, disable=not progress, desc="faithfulness", unit="set") as bar:
        kept = {name: whole.table(drawn, True, bar) for name, drawn in chosen.items()}
        removed = {name: whole.table(drawn, False, bar) for name, drawn in chosen.items()}
        members = [[top[0] - one for one in top[0].singles()] for top in chosen["top"]]
        marginals = [whole.table([left], True, bar)[0] for left in members]
    return Faithfulness(
        scores.dictionaries, ladder, sets, clean, empty, kept, removed, tuple(marginals)
    )


class _Whole:
    """All latents, to keep or to ablate some of."""

    def __init__(self, bench: Bench, attribute: Attribute, values: dict[int, Tensor]) -> None:
        self.latents = as_latents(attribute.target, "faithfulness")
        self._bench, self._where, self._to = bench, attribute.where, values

    def without(self, ablated: Latents) -> Tensor:
        """[prompts]: the metric with these latents ablated."""
        if not len(ablated):
            return self._bench.under(None)
        values = [
            self._to[id(basis)][torch.tensor(indices)] if self._to else torch.zeros(len(indices))
            for basis, indices in ablated.parts
        ]
        return self._bench.under(Ablate(ablated, to=torch.cat(values), where=self._where))

    def table(self, sets: Sequence[Sequence[Latents]], keep: bool, bar: Any) -> Tensor:
        """[n, draws, prompts]: the metric with each set kept, or with each ablated."""
        rows = []
        for drawn in sets:
            for chosen in drawn:
                rows.append(self.without(self.latents - chosen if keep else chosen))
                bar.update()
        return torch.stack(rows).reshape(len(sets), len(sets[0]), -1)


def _values(attribute: Attribute, bench: Bench, to: str) -> dict[int, Tensor]:
    """id(dictionary) → what each of its latents is set to [d_sae]; empty for zero."""
    if to not in ("zero", "mean"):
        raise SaefeatError(
            explain(
                "faithfulness",
                "to",
                got=repr(to),
                wanted='"zero" or "mean"',
                cause="a typing error",
                call='faithfulness(..., to="mean")',
            )
        )
    latents = as_latents(attribute.target, "faithfulness")
    if to == "zero":
        return {}
    look = Probe(latents, where=attribute.where, reduce="mean")
    reading = run(bench.model, bench.batch, look, batch_size=bench.batch_size).readings[0]
    means, start, found = reading.values[:, 0].mean(0), 0, {}
    for basis, indices in latents.parts:
        own = torch.zeros(basis.d_sae)
        own[torch.tensor(indices)] = means[start : start + len(indices)].float().cpu()
        found[id(basis)], start = own, start + len(indices)
    return found


def _sizes(sizes: Sequence[int] | None, ranked: Ranking, controls: int) -> tuple[int, ...]:
    """Ascending set sizes for which there are latents and controls."""
    moved = len(ranked.keys)
    most = moved // 2 if controls else moved
    if sizes is None:
        sizes = [2**n for n in range(6) if 2**n <= most]
    found = tuple(sizes)
    whole = all(type(size) is int and 1 <= size <= moved for size in found)
    if not found or not whole or list(found) != sorted(set(found)):
        raise SaefeatError(
            explain(
                "faithfulness",
                "sizes",
                got=repr(found),
                wanted=f"ascending integers in 1..{moved}, the latents that moved",
                cause="sizes beyond the latents found, or out of order",
                call="faithfulness(..., sizes=(1, 2, 4, 8))",
            )
        )
    if controls:
        require_pool(ranked, found[-1], "faithfulness")
    return found


def _require_effect(clean: Tensor, empty: Tensor) -> None:
    whole = float((clean - empty).mean())
    if abs(whole) > 1e-6 * (1 + float(clean.abs().max())):
        return
    raise SaefeatError(
        explain(
            "faithfulness",
            "attribute",
            got=f"a metric that moves by {whole:.1e} when every latent is ablated",
            wanted="a metric that the latents carry",
            cause="a metric that these sites do not reach, or that the error term carries",
            call="another site, or another metric",
        )
    )


def _require_inside(whole: Latents, top: Latents) -> None:
    if len(whole & top) == len(top):
        return
    raise LatentError(
        explain(
            "faithfulness",
            "scores",
            got="of other latents than attribute.target",
            wanted="the scores that this attribute made",
            cause="the dictionaries were loaded again, and are other objects",
            call="scores = attribute(model, prompts)",
        )
    )
