"""What a metric is: one number a prompt, from what a forward pass shows.

A metric never mixes prompts, so that one backward pass gives every prompt's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..errors import PromptError, SaefeatError
from ..kernel.view import Memory, View, window
from ..model.sites import Site


@final
@dataclass(frozen=True, repr=False)
class BaselineTop:
    """Each prompt's most likely next token under the baseline run, in place of a token.

    The refusal paper's metric: the logit of what the steered run would say, minus that of the
    refusal it replaces. Where both are one token the metric is zero for that prompt, which
    ``Attribution.degenerate`` reports.

    Examples:
        >>> sf.logit_diff(sf.metrics.BASELINE_TOP, 7)
        logit_diff(BASELINE_TOP, 7)
    """

    def __repr__(self) -> str:
        return "BASELINE_TOP"


BASELINE_TOP = BaselineTop()


@final
@dataclass(frozen=True, init=False)
class PerPrompt:
    """One value for each prompt, in place of one for all: targets that differ by example.

    A plain list already means a group (``logit_diff``) or one continuation (``log_prob``).

    Args:
        values: one a prompt, in the prompts' order; each as the metric takes it.

    Raises:
        PromptError: for none; when attributing, for another number of prompts.

    Examples:
        >>> sf.logit_diff(sf.metrics.PerPrompt([5, [6, 7]]), 9)
        logit_diff(PerPrompt([5, [6, 7]]), 9)
    """

    values: tuple[Any, ...]

    def __init__(self, values: Sequence[Any]) -> None:
        listed = tuple(values.tolist() if isinstance(values, Tensor) else values)
        if not listed or isinstance(values, str):
            raise PromptError(
                f"PerPrompt: `values` is {values!r}, wanted one value a prompt. Likely cause: an"
                ' empty list, or one string. Try: PerPrompt([" Paris", " Rome"])'
            )
        object.__setattr__(self, "values", listed)

    def __repr__(self) -> str:
        return f"PerPrompt({list(self.values)!r})"


class Seen(NamedTuple):
    """What a metric may look at: some prompts in one forward pass.

    Attributes:
        logits: [b, n, vocabulary], the last n columns; n = 1 unless the metric reads more.
        top: [b] long, the baseline run's most likely next token; None without such a run.
        numbers: [b] long, which prompt of the data set each row is.
        view: the pass's positions, ids and mask (``kernel.view``).
        clean: [b, vocabulary], the last logits of the clean run, without graph.
        base: [b, vocabulary], those of the baseline run.
        value: [b, t, d] at the metric's own site.
    """

    logits: Tensor
    top: Any
    numbers: Tensor
    view: View
    clean: Tensor | None = None
    base: Tensor | None = None
    value: Tensor | None = None


TokenSpec = str | int | BaselineTop | PerPrompt | Sequence[str | int]


Reader = Callable[[Seen], Tensor]
"""``reader(seen) -> [b]``, differentiable."""


Scorer = Callable[[Tensor, Tensor], Tensor]
"""``scorer(logits [b, vocabulary], top [b]) -> [b]``; ``top`` is the baseline run's argmax."""


@final
@dataclass(frozen=True)
class Metric:
    """A named scalar per prompt, resolved for one tokenizer when it is used.

    Build one with ``logit_diff``, ``logit``, ``log_prob``, ``kl``, ``metric``, ``activation`` or
    ``at_site``.

    Attributes:
        name: how it prints.
        reader: tokenizer → function of what a pass shows.
        columns: which logits it reads: ``last``, ``continuation`` or ``all``.
        continuation: tokenizer → the ids that follow each prompt, a list a prompt or one for all.
        site: the site whose value it reads, if any.
        prompts: how many prompts it is made for; None if any.
        reference: the run it compares with, ``clean`` or ``baseline``, if any.
        baseline_top: whether ``BASELINE_TOP`` stands in it, so that it needs a baseline run.

    Examples:
        >>> sf.logit_diff(5, 7)
        logit_diff(5, 7)
    """

    name: str
    reader: Callable[[Any], Reader]
    columns: str = "last"
    continuation: Callable[[Any], tuple[tuple[int, ...], ...]] | None = None
    site: Site | None = None
    prompts: int | None = None
    reference: str | None = None
    baseline_top: bool = False

    def bind(self, tokenizer: Any) -> Scorer:
        """The metric as a function of last logits [b, vocabulary] and the baseline's argmax [b].

        Raises:
            SaefeatError: for a metric that reads more than the last logits; when called, for
                ``PerPrompt`` values and another number of rows than there are values.
        """
        if self.columns != "last" or self.site is not None or self.reference:
            raise SaefeatError(
                f"Metric.bind: `metric` is {self!r}, which reads more than the last token's logits,"
                " wanted logit, logit_diff or metric of last logits. Likely cause: logits of one"
                " position do not hold what it looks at. Try: measure(model, prompts, metric)"
            )
        read = self.reader(tokenizer)

        def scorer(logits: Tensor, top: Tensor) -> Tensor:
            require_prompts("metric", self, len(logits))
            view = window(None, None, (len(logits), 1), 0, Memory(), None)
            return read(Seen(logits.unsqueeze(1), top, torch.arange(len(logits)), view))

        return scorer

    @property
    def needs_baseline(self) -> bool:
        """Whether it says nothing without a baseline run."""
        return self.baseline_top or self.reference == "baseline"

    @property
    def flat(self) -> bool:
        """Whether its gradient is zero at the clean run, whatever the latents do."""
        return self.reference == "clean"

    def __repr__(self) -> str:
        return self.name


def real(seen: Seen) -> Tensor:
    """[b, t] bool: real tokens, on the device of what the metric reads."""
    read = seen.logits if seen.value is None else seen.value
    return seen.view.real.to(read.device)


def require_prompts(where: str, metric: Metric, prompts: int) -> None:
    """Refuse values made for another number of prompts: they would meet the wrong ones.

    Raises:
        PromptError: naming both numbers.
    """
    if metric.prompts in (None, prompts):
        return
    raise PromptError(
        f"{where}: `metric` is made for {metric.prompts} prompts, wanted values for the {prompts}"
        " prompts given. Likely cause: the prompts were filtered, repeated or batched after the"
        " values were made. Try: PerPrompt values from the same prompts, in the same order"
    )


def same_count(where: str, *values: Any) -> int | None:
    """How many prompts ``PerPrompt`` values are for; None if there are none.

    Raises:
        PromptError: for values made for different numbers of prompts.
    """
    counts = {len(value.values) for value in values if isinstance(value, PerPrompt)}
    if len(counts) > 1:
        raise PromptError(
            f"{where}: `PerPrompt` is {' and '.join(map(str, sorted(counts)))} values, wanted one"
            " value a prompt in each. Likely cause: lists made from different prompts. Try:"
            f" {where}(PerPrompt(correct), PerPrompt(wrong))"
        )
    return counts.pop() if counts else None
