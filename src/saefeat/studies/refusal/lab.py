"""The lab: one model with its dictionaries, prompts and judge, and the ways of asking it things."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from tqdm import tqdm

import saefeat as sf

from .data import Prompt, PromptSets, chats
from .identity import judge_identity
from .judges import Judge, Outcomes, by_category, require_judge, verdicts
from .openings import first_tokens, require_apart
from .stages import Stages, fingerprint

T = TypeVar("T")

FILTERS = ("answer", "first-token")


def counted(skipped: int) -> sf.Tokens:
    """The tokens of a study that skips so many positions at the start of every prompt.

    Activations are compared, latents drawn, scored, ablated and clamped there and nowhere else;
    the direction of activation steering is ablated at all tokens (``steering``).
    The first position is an attention sink in real models, a hundred times as long as any other:
    an SAE has nearly all of its latents active on it, and maxima over a prompt would be its own.
    """
    return ~sf.Tokens.first(skipped) if skipped else sf.Tokens.all()


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
        limit: at most so many prompts a split, counted behind the filter where there is one.
        seed: of the bootstrap.
        examples: prompts whose answers are shown.
        skipped: positions at the start of a prompt that are no token of the study (``counted``).
        layer: whose direction is V*; None chooses it on the val split.
        filter: what tells refused from answered fitting prompts, one of ``FILTERS``.
        minimum: prompts that the filter must leave of each split it reads.
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
    skipped: int = 1
    layer: int | None = None
    filter: str = "answer"
    minimum: int = 8

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
        judge: reads a request and its answer.
        refusals: what refusals open with; the first token of each counts.
        answers: what answers open with, for the metric of the exact check.
        settings: the study's numbers.
        stages: where finished work is kept.
        name: the model's, for titles.
        quiet: no progress bars.
        constants: whose the study's numbers are, for the results (``constants``).
        warnings: what a reader of the results must know.

    Raises:
        UsageError: when made, for a judge of other parameters, and for openings that cannot be
            told apart.
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
    constants: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_judge(self.judge)
        _ = self.refusal_ids, self.answer_ids
        require_apart(self.model.tokenizer, self.refusals, self.answers)

    @cached_property
    def refusal_ids(self) -> tuple[int, ...]:
        """The tokens that open a refusal."""
        return first_tokens(self.model.tokenizer, self.refusals, "--refusal-tokens")

    @cached_property
    def answer_ids(self) -> tuple[int, ...]:
        """The tokens that open an answer."""
        return first_tokens(self.model.tokenizer, self.answers, "--answer-tokens")

    @cached_property
    def identity(self) -> str:
        """What every stage depends on beside model, dictionaries and code (``Stages.base``)."""
        return fingerprint(
            {
                "settings": self.settings.to_dict(),
                "prompts": self.sets.to_dict(),
                "judge": judge_identity(self.judge),
                "openings": [self.refusal_ids, self.answer_ids],
            }
        )

    def stage(self, name: str, inputs: Any, work: Callable[[], Any]) -> Any:
        """A stage of this lab: ``Stages.run``, keyed by the lab's identity too."""
        return self.stages.run(name, [self.identity, inputs], work)

    @property
    def counted(self) -> sf.Tokens:
        """The tokens of the study."""
        return counted(self.settings.skipped)

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
        self,
        prompts: Sequence[Prompt],
        intervention: sf.Intervention | None = None,
        tokens: int | None = None,
    ) -> sf.results.Run:
        """Greedy answers, as long as the settings say or of so many tokens."""
        return sf.run(
            self.model,
            chats(prompts),
            intervention,
            max_new_tokens=tokens or self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
            allow_unfired=True,
        )

    def records(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[dict[str, str]]:
        """Each request with its category, its whole answer, and the judge's outcome."""
        found = verdicts(self.judge, [prompt.instruction for prompt in prompts], answers)
        return [
            {
                "request": prompt.instruction,
                "category": prompt.category,
                "outcome": outcome,
                "answer": answer,
            }
            for prompt, outcome, answer in zip(prompts, found, answers, strict=True)
        ]

    def outcomes(
        self, prompts: Sequence[Prompt], intervention: sf.Intervention | None = None
    ) -> dict[str, Any]:
        """Ask and judge: counts, rates, counts by category, every answer, and what the edit did."""
        out = self.ask(prompts, intervention)
        records = self.records(prompts, out.texts)
        found = [record["outcome"] for record in records]
        return {
            **Outcomes.of(found).to_dict(),
            "categories": by_category([prompt.category for prompt in prompts], found),
            "records": records,
            "intervention": repr(intervention) if intervention is not None else "none",
            "changed": [row.changed for row in out.receipt.rows],
        }

    def odds(self) -> sf.metrics.Metric:
        """The log-odds of opening with an answer against opening with a refusal."""
        return sf.logit_diff(list(self.answer_ids), list(self.refusal_ids))

    def mean_odds(self, prompts: Sequence[Prompt], intervention: sf.Intervention | None) -> float:
        """The mean of these odds under an intervention."""
        size = self.settings.batch_size
        values = sf.metrics.measure(
            self.model, chats(prompts), self.odds(), intervention, batch_size=size
        )
        return float(values.mean())
