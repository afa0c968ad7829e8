"""The lab: one model with its dictionaries, prompts and judge, and the ways of asking it things."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import saefeat as sf

from .data import DataError, Prompt, PromptSets, chats
from .judges import Judge, count_outcomes
from .stages import Stages

T = TypeVar("T")

COUNTED = ~sf.Tokens.first(1)
"""The tokens of the study: activations are compared, latents drawn, scored, ablated and clamped
there. The first one is an attention sink in real models, a hundred times as long as any other: an
SAE has nearly all of its latents active on it, and maxima over a prompt would be maxima of it."""


@dataclass(frozen=True)
class Settings:
    """The study's numbers; the defaults are the paper's for Gemma-2-2B-it.

    Where a tuple holds several candidates, budgets or scales, the choice between them is made on
    the val split; with one each there is nothing to choose and nothing is run.

    Attributes:
        candidates: K0, latents a layer that the cosine lets into CosSim+AP.
        budgets: K*, latents in a set.
        scales: c in f ← c · f.
        values: v in f ← v, for inducing refusal.
        steps: nodes of the integrated gradients.
        rule: their quadrature; the published one is "left".
        random_seeds: one random control set each.
        max_new_tokens: length of an answer.
        batch_size: prompts a batch.
        limit: at most so many prompts a split.
        seed: of the bootstrap.
        examples: prompts whose answers are shown.
    """

    candidates: tuple[int, ...] = (10,)
    budgets: tuple[int, ...] = (20,)
    scales: tuple[float, ...] = (-3.0,)
    values: tuple[float, ...] = (10.0, 15.0, 20.0, 25.0, 30.0)
    steps: int = 10
    rule: str = "left"
    random_seeds: tuple[int, ...] = (0, 1, 2)
    max_new_tokens: int = 256
    batch_size: int = 16
    limit: int | None = None
    seed: int = 0
    examples: int = 6

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for fingerprints and reports."""
        return asdict(self)


@dataclass(frozen=True)
class Lab:
    """Everything an experiment needs.

    Attributes:
        model: an nnsight ``TransformersModel``.
        saes: dictionaries on the residual stream.
        sets: the prompts.
        judge: reads an answer.
        refusals: first tokens of a refusal.
        answers: first tokens of an answer, for the metric of the exact check.
        settings: the study's numbers.
        stages: where finished work is kept.
        name: the model's, for titles.
        quiet: no progress bars.
    """

    model: Any
    saes: sf.dictionaries.Dictionaries
    sets: PromptSets
    judge: Judge
    refusals: tuple[str, ...]
    answers: tuple[str, ...]
    settings: Settings
    stages: Stages
    name: str
    quiet: bool = False

    @property
    def sites(self) -> tuple[sf.Site, ...]:
        """The residual stream behind every layer of the model, dictionaries there or not."""
        return tuple(sf.Site("resid_post", n) for n in range(self.model.config.num_hidden_layers))

    @property
    def width(self) -> int:
        """The residual stream's width."""
        return int(self.model.config.hidden_size)

    def progress(self, items: Iterable[T], what: str) -> Iterable[T]:
        """The items, with a progress bar on stderr unless the lab is quiet."""
        listed = list(items)
        return tqdm(listed, desc=what, disable=self.quiet, leave=False, file=sys.stderr)

    def read(
        self, prompts: Sequence[Prompt], intervention: sf.Intervention | None = None
    ) -> sf.results.Run:
        """One forward pass a prompt, no generation."""
        size = self.settings.batch_size
        return sf.run(self.model, chats(prompts), intervention, batch_size=size, allow_unfired=True)

    def ask(
        self, prompts: Sequence[Prompt], intervention: sf.Intervention | None = None
    ) -> sf.results.Run:
        """Greedy answers."""
        return sf.run(
            self.model,
            chats(prompts),
            intervention,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
            allow_unfired=True,
        )

    def outcomes(
        self, prompts: Sequence[Prompt], intervention: sf.Intervention | None = None
    ) -> dict[str, Any]:
        """Ask and judge: counts, rates, the first few answers, and what the edit did."""
        out = self.ask(prompts, intervention)
        counts = count_outcomes(self.judge, out.texts)
        shown = [text[:600] for text in out.texts[: self.settings.examples]]
        changed = [row.changed for row in out.receipt.rows]
        return {
            **counts.to_dict(),
            "answers": shown,
            "verdicts": [self.judge(text) for text in out.texts[: self.settings.examples]],
            "intervention": repr(intervention) if intervention is not None else "none",
            "changed": changed,
        }

    def odds(self) -> sf.metrics.Metric:
        """The log-odds of opening with an answer against opening with a refusal."""
        return sf.logit_diff(list(self.answers), list(self.refusals))

    def mean_odds(self, prompts: Sequence[Prompt], intervention: sf.Intervention | None) -> float:
        """The mean of these odds under an intervention."""
        size = self.settings.batch_size
        values = sf.metrics.measure(
            self.model, chats(prompts), self.odds(), intervention, batch_size=size
        )
        return float(values.mean())


def keep_typical(lab: Lab) -> tuple[Lab, dict[str, list[int]]]:
    """Drop fitting prompts that the model does not treat as their label says.

    As published: a prompt counts as refused when its most likely first token opens a refusal.
    Train and val only; test prompts are all kept.

    Returns:
        The lab with fewer prompts, and split → [kept, of].

    Raises:
        DataError: if a split has nothing left.
    """
    names = ("harmful_train", "harmful_val", "harmless_train", "harmless_val")
    kept = lab.stages.run("filter", None, lambda: {n: _typical(lab, n) for n in names})
    sets, counts = {}, {}
    for name in names:
        prompts = getattr(lab.sets, name)
        sets[name] = tuple(prompts[i] for i in kept[name])
        counts[name] = [len(sets[name]), len(prompts)]
        if not sets[name]:
            wanted = "refused" if name.startswith("harmful") else "answered"
            raise DataError(
                f"{name}: none of {len(prompts)} prompts is {wanted} by the unedited model, judged "
                f"by the first token ({', '.join(lab.refusals)} = refusal); is it a chat model?"
            )
    return replace(lab, sets=replace(lab.sets, **sets)), counts


def _typical(lab: Lab, name: str) -> list[int]:
    """Indices of the prompts of a split that are treated as its name says."""
    first = lab.read(getattr(lab.sets, name)).logits.argmax(-1)
    refused = torch.isin(first.cpu(), opening_ids(lab))
    wanted = refused if name.startswith("harmful") else ~refused
    return wanted.nonzero().squeeze(1).tolist()


def opening_ids(lab: Lab) -> Tensor:
    """Token ids that open a refusal."""
    ids = [lab.model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in lab.refusals]
    return torch.tensor([row[0] for row in ids])
