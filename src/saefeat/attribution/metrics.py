"""What to attribute: one number a prompt, from what a forward pass shows.

A metric never mixes prompts, so that one backward pass gives every prompt's own gradient. It reads
``Seen``; ``measuring`` holds the metrics that look at more than the last token's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..errors import PromptError, SaefeatError, explain
from ..sites import Site


@final
@dataclass(frozen=True, repr=False)
class BaselineTop:
    """Each prompt's most likely next token under the baseline run, in place of a token.

    The refusal paper's metric: the logit of what the steered run would say, minus that of the
    refusal it replaces. Where both are one token the metric is zero for that prompt, which
    ``Attribution.degenerate`` reports.

    Examples:
        >>> sf.logit_diff(sf.BASELINE_TOP, 7)
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
        >>> sf.logit_diff(sf.PerPrompt([5, [6, 7]]), 9)
        logit_diff(PerPrompt([5, [6, 7]]), 9)
    """

    values: tuple[Any, ...]

    def __init__(self, values: Sequence[Any]) -> None:
        listed = tuple(values.tolist() if isinstance(values, Tensor) else values)
        if not listed or isinstance(values, str):
            raise PromptError(
                explain(
                    "PerPrompt",
                    "values",
                    got=repr(values),
                    wanted="one value a prompt",
                    cause="an empty list, or one string",
                    call='PerPrompt([" Paris", " Rome"])',
                )
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
        view: the pass's positions, ids and mask (``kernel.tokens.window``).
        clean: [b, vocabulary], the last logits of the clean run, without graph.
        base: [b, vocabulary], those of the baseline run.
        value: [b, t, d] at the metric's own site.
    """

    logits: Tensor
    top: Any
    numbers: Tensor
    view: dict[str, Any]
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
    ``site_metric``.

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
                explain(
                    "Metric.bind",
                    "metric",
                    got=f"{self!r}, which reads more than the last token's logits",
                    wanted="logit, logit_diff or metric of last logits",
                    cause="logits of one position do not hold what it looks at",
                    call="measure(model, prompts, metric)",
                )
            )
        read = self.reader(tokenizer)

        def scorer(logits: Tensor, top: Tensor) -> Tensor:
            require_prompts("metric", self, len(logits))
            return read(Seen(logits.unsqueeze(1), top, torch.arange(len(logits)), {}))

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


def logit_diff(positive: TokenSpec, negative: TokenSpec) -> Metric:
    """logit(positive) − logit(negative) at each prompt's last token.

    A list stands for a group: its logits are joined by log-sum-exp, so that the difference is the
    log-odds of one group against the other, which is the plain difference for single tokens.

    Args:
        positive: a token id, a string that is one token, a list of these, ``PerPrompt`` of any
            of these, or ``BASELINE_TOP``.
        negative: likewise.

    Returns:
        A metric.

    Raises:
        PromptError: when bound, for a string that is not one token.

    Examples:
        >>> scorer = sf.logit_diff([0, 1], 2).bind(None)
        >>> scorer(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
        tensor([0.6931, 0.6931])
    """
    name = f"logit_diff({positive!r}, {negative!r})"

    def reader(tokenizer: Any) -> Reader:
        up, down = _group(tokenizer, positive), _group(tokenizer, negative)
        return lambda seen: _joined(seen, up) - _joined(seen, down)

    count = same_count("logit_diff", positive, negative)
    return Metric(name, reader, prompts=count, baseline_top=_has_top(positive, negative))


def logit(token: TokenSpec) -> Metric:
    """The logit of a token (or the log-sum-exp of several) at each prompt's last token.

    Args:
        token: as in ``logit_diff``.

    Examples:
        >>> sf.logit(2).bind(None)(torch.arange(4.0)[None], torch.zeros(1, dtype=torch.long))
        tensor([2.])
    """

    def reader(tokenizer: Any) -> Reader:
        group = _group(tokenizer, token)
        return lambda seen: _joined(seen, group)

    count = same_count("logit", token)
    return Metric(f"logit({token!r})", reader, prompts=count, baseline_top=_has_top(token))


def metric(
    function: Callable[..., Tensor], name: str = "metric", *, tokens: str = "last"
) -> Metric:
    """Any differentiable function of the logits, one number a prompt.

    Args:
        function: [b, vocabulary] → [b]; with ``tokens="all"`` it is given logits
            [b, t, vocabulary] and the mask of real tokens [b, t], padding on the left. A sum over
            prompts would mix them.
        name: how it prints.
        tokens: ``"last"``, so that no other logits are computed, or ``"all"``.

    Raises:
        SaefeatError: for other ``tokens``.

    Examples:
        >>> sf.metric(lambda logits: logits.logsumexp(-1), "mass")
        mass
    """
    if tokens not in ("last", "all"):
        raise SaefeatError(
            explain(
                "metric",
                "tokens",
                got=repr(tokens),
                wanted='"last" or "all"',
                cause="a typing error",
                call='metric(lambda logits, mask: ..., tokens="all")',
            )
        )
    if tokens == "all":
        return Metric(name, lambda _: lambda seen: function(seen.logits, seen.view["real"]), "all")
    return Metric(name, lambda _: lambda seen: function(seen.logits[:, -1]))


def require_prompts(where: str, metric: Metric, prompts: int) -> None:
    """Refuse values made for another number of prompts: they would meet the wrong ones.

    Raises:
        PromptError: naming both numbers.
    """
    if metric.prompts in (None, prompts):
        return
    raise PromptError(
        explain(
            where,
            "metric",
            got=f"made for {metric.prompts} prompts",
            wanted=f"values for the {prompts} prompts given",
            cause="the prompts were filtered, repeated or batched after the values were made",
            call="PerPrompt values from the same prompts, in the same order",
        )
    )


def same_count(where: str, *values: Any) -> int | None:
    """How many prompts ``PerPrompt`` values are for; None if there are none.

    Raises:
        PromptError: for values made for different numbers of prompts.
    """
    counts = {len(value.values) for value in values if isinstance(value, PerPrompt)}
    if len(counts) > 1:
        raise PromptError(
            explain(
                where,
                "PerPrompt",
                got=" and ".join(map(str, sorted(counts))) + " values",
                wanted="one value a prompt in each",
                cause="lists made from different prompts",
                call=f"{where}(PerPrompt(correct), PerPrompt(wrong))",
            )
        )
    return counts.pop() if counts else None


def _has_top(*specs: Any) -> bool:
    """Whether ``BASELINE_TOP`` is among these, or among their values by prompt."""
    listed = [one for s in specs for one in (s.values if isinstance(s, PerPrompt) else (s,))]
    return any(isinstance(one, BaselineTop) for one in listed)


def _group(tokenizer: Any, spec: Any) -> Tensor | list[Tensor | None] | None:
    """Ids [n]; None for the baseline's own token; a list for values that differ by prompt."""
    if isinstance(spec, BaselineTop):
        return None
    if isinstance(spec, PerPrompt):
        return [_group(tokenizer, value) for value in spec.values]  # type: ignore[misc]
    listed = [spec] if isinstance(spec, (str, int)) else list(spec)
    return torch.tensor([_token(tokenizer, one) for one in listed])


def _token(tokenizer: Any, token: str | int) -> int:
    if isinstance(token, int):
        return token
    ids = [] if tokenizer is None else tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None):
        return ids[0]
    raise PromptError(
        explain(
            "metric",
            "token",
            got=f"{token!r}, which is {len(ids)} tokens",
            wanted="one known token",
            cause="a leading space is part of many tokens, and long words are several",
            call=f"logit_diff({' ' + token!r}, ...), or pass ids",
        )
    )


def _joined(seen: Seen, group: Any) -> Tensor:
    """[b]: log-sum-exp over the group at the last token, in at least float32."""
    logits = seen.logits[:, -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if isinstance(group, list):  # values that differ by prompt: row by row
        chosen = [group[number] for number in seen.numbers.tolist()]
        rows = [
            _chosen(logits[n : n + 1], None if seen.top is None else seen.top[n : n + 1], one)
            for n, one in enumerate(chosen)
        ]
        return torch.cat(rows)
    return _chosen(logits, seen.top, group)


def _chosen(logits: Tensor, top: Any, group: Tensor | None) -> Tensor:
    if group is None and top is None:
        raise SaefeatError(
            explain(
                "metric",
                "token",
                got="BASELINE_TOP",
                wanted="a token, where no baseline is run",
                cause="a metric of the baseline's own token inside a trace",
                call="attribute(model, prompts), outside the trace",
            )
        )
    if group is None:
        return logits.gather(1, top[:, None].to(logits.device)).squeeze(1)
    outside = [int(token) for token in group if not 0 <= token < logits.shape[1]]
    if outside:
        raise PromptError(
            explain(
                "metric",
                "token",
                got=outside[0],
                wanted=f"an id in 0..{logits.shape[1] - 1}",
                cause="an id of another model's vocabulary, or one counted from the end",
                call='logit_diff("Here", "I") with strings',
            )
        )
    chosen = logits[:, group.to(logits.device)]
    return chosen.squeeze(1) if chosen.shape[1] == 1 else chosen.logsumexp(1)
