"""What a metric is: one number a prompt, from what a forward pass shows.

A metric never mixes prompts, so that one backward pass gives every prompt's own gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from torch import Tensor

from ..arguments import checked, got
from ..dictionaries.latents import Dictionary
from ..errors import LatentError, PromptError, SaefeatError
from ..kernel.state import View
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


@checked(own=("values",))
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

    def __init__(self, values: Sequence[Any] | Tensor) -> None:
        given: Any = values.tolist() if isinstance(values, Tensor) else values
        listed = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
        if not listed:
            raise PromptError(
                f"PerPrompt: `values` is {got(values)}, wanted one value a prompt. Likely cause: an"
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
        view: the pass's positions, ids and mask (``kernel.state``).
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


@checked
@final
@dataclass(frozen=True)
class Metric:
    """A named scalar per prompt, resolved for one tokenizer when it is used.

    Build one with ``logit_diff``, ``logit``, ``log_prob``, ``kl``, ``custom``, ``activation`` or
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
        apart: whether each row's number is known to be its own; otherwise that is checked.

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
    apart: bool = False

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


def same_count(function: str, *values: Any) -> int | None:
    """How many prompts ``PerPrompt`` values are for; None if there are none."""
    counts = {len(value.values) for value in values if isinstance(value, PerPrompt)}
    if len(counts) > 1:
        raise PromptError(
            f"{function}: `PerPrompt` is {' and '.join(map(str, sorted(counts)))} values, wanted"
            " one value a prompt in each. Likely cause: lists made from different prompts. Try:"
            f" {function}(PerPrompt(correct), PerPrompt(wrong))"
        )
    return counts.pop() if counts else None


def require_takes(function: str, given: Callable[..., Any], names: Sequence[str]) -> None:
    """Refuse a function that cannot be called with so many values, where that can be told."""
    try:
        takes = inspect.signature(given)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        takes.bind(*names)
    except TypeError as error:
        raise SaefeatError(
            f"{function}: `function` is of {takes}, wanted one that is called with"
            f" ({', '.join(names)}). Likely cause: another number of arguments: {error}. Try:"
            f" {function}(..., lambda {', '.join(names)}: ...)"
        ) from error


def require_tokenwise(
    function: str,
    parameter: str,
    dictionary: Dictionary,
    error: type[SaefeatError] = LatentError,
) -> None:
    """Refuse latents that depend on earlier tokens: padding would be among them.

    Their change reaches later tokens' latents, so that scores of single tokens mean nothing either.
    """
    if dictionary.prefix:
        raise error(
            f"{function}: `{parameter}` is of {dictionary!r}, which look back over the text, wanted"
            " latents of their own token's value alone. Likely cause: a temporal SAE, or a function"
            " with prefix=True. Try: run(model, prompts, Probe(latents)), which pads no row"
        )
