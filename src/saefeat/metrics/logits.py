"""Metrics of logits: of the last token, of what follows a prompt, and any function of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked, fits, got
from ..errors import PromptError, SaefeatError
from .base import (
    BaselineTop,
    Metric,
    PerPrompt,
    Reader,
    Seen,
    TokenSpec,
    real,
    require_takes,
    same_count,
)


@checked
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
        PromptError: for no token at all; when bound, for a string that is not one token, and for a
            token that is in a group twice, or on both sides.

    Examples:
        >>> sf.logit_diff([0, 1], 2)
        logit_diff([0, 1], 2)
    """
    positive = _spec("logit_diff", "positive", positive)
    negative = _spec("logit_diff", "negative", negative)
    name = f"logit_diff({positive!r}, {negative!r})"

    def reader(tokenizer: Any) -> Reader:
        up, down = _group(tokenizer, positive), _group(tokenizer, negative)
        _require_two_sides(up, down)
        return lambda seen: _joined(seen, up) - _joined(seen, down)

    count, top = same_count("logit_diff", positive, negative), _has_top(positive, negative)
    return Metric(name, reader, prompts=count, baseline_top=top, apart=True)


@checked
def logit(token: TokenSpec) -> Metric:
    """The logit of a token (or the log-sum-exp of several) at each prompt's last token.

    Args:
        token: as in ``logit_diff``.

    Raises:
        PromptError: as ``logit_diff``.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> logits = sf.run(tiny.model("chat"), ["hello"]).logits
        >>> value = sf.metrics.measure(tiny.model("chat"), ["hello"], sf.metrics.logit(5))
        >>> torch.allclose(value, logits[:, 5], atol=1e-4)
        True
    """
    token = _spec("logit", "token", token)

    def reader(tokenizer: Any) -> Reader:
        group = _group(tokenizer, token)
        return lambda seen: _joined(seen, group)

    count = same_count("logit", token)
    name, top = f"logit({token!r})", _has_top(token)
    return Metric(name, reader, prompts=count, baseline_top=top, apart=True)


@checked
def custom(
    function: Callable[..., Tensor], name: str = "metric", *, tokens: str = "last"
) -> Metric:
    """Any function of the logits, one number a prompt, each prompt's own.

    Args:
        function: [b, vocabulary] → [b]; with ``tokens="all"`` it is given logits
            [b, t, vocabulary] and the mask of real tokens [b, t], padding on the left. Rows are
            prompts, in batches, or one prompt many times: what mixes them is refused, also for one
            prompt alone. Differentiable, unless the method takes no gradient. Truths count 0 and 1.
        name: how it prints.
        tokens: ``"last"``, so that no other logits are computed, or ``"all"``.

    Raises:
        SaefeatError: for other ``tokens``, or a function of other arguments; when it is read, for
            anything but one number a prompt, or numbers that depend on other prompts.

    Examples:
        >>> sf.metrics.custom(lambda logits: logits.logsumexp(-1), "mass")
        mass
    """
    if tokens not in ("last", "all"):
        raise SaefeatError(
            f'metrics.custom: `tokens` is {tokens!r}, wanted "last" or "all". Try:'
            ' metrics.custom(lambda logits, mask: ..., tokens="all")'
        )
    given = ("logits", "mask") if tokens == "all" else ("logits",)
    require_takes("metrics.custom", function, given)
    if tokens == "all":
        return Metric(name, lambda _: lambda seen: function(seen.logits, real(seen)), "all")
    return Metric(name, lambda _: lambda seen: function(seen.logits[:, -1]))


@checked(own=("continuation",))
def log_prob(continuation: str | Sequence[int] | PerPrompt) -> Metric:
    """The log-probability that the prompt goes on with these tokens, summed over them.

    The model is given the prompt and the continuation behind it (but for its last token, which
    predicts nothing that is wanted). Token rules see it as generated text: ``Tokens.prompt()`` and
    ``last(n)`` mean the prompt. Unless ``where=`` says otherwise only prompt tokens are scored,
    since latents at the continuation's own tokens answer what was already given.

    Args:
        continuation: text, tokenized without special tokens; token ids; or ``PerPrompt`` of
            either, of any lengths. Where a tokenizer treats the start of a text specially, pass
            ids.

    Returns:
        A metric, in nats.

    Raises:
        PromptError: when bound, for a continuation without tokens.

    Examples:
        >>> sf.metrics.log_prob([5, 9, 4])
        log_prob([5, 9, 4])
    """
    each = continuation.values if isinstance(continuation, PerPrompt) else (continuation,)

    def ids(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
        return tuple(_ids(tokenizer, one) for one in each)

    def reader(tokenizer: Any) -> Reader:
        table = ids(tokenizer)
        return lambda seen: _summed(seen, table)

    return Metric(
        f"log_prob({continuation!r})",
        reader,
        columns="continuation",
        continuation=ids,
        prompts=len(each) if isinstance(continuation, PerPrompt) else None,
        apart=True,
    )


def _spec(function: str, parameter: str, spec: Any) -> Any:
    """Tokens as they were meant, numpy's integers as plain ones; at least one for each prompt."""
    if isinstance(spec, PerPrompt):
        each = [_spec(function, parameter, one) for one in spec.values]
        return PerPrompt(each)
    if isinstance(spec, (str, BaselineTop)):
        return spec
    if fits(spec, int) and int(spec) >= 0:
        return int(spec)
    listed = list(spec) if isinstance(spec, Sequence) else []
    if listed and all(isinstance(one, (str, Integral, BaselineTop)) for one in listed):
        return [_spec(function, parameter, one) for one in listed]
    raise PromptError(
        f"{function}: `{parameter}` is {got(spec)}, wanted a token id from 0, a string that is one"
        " token, or a list of at least one of these. Likely cause: an empty list, a tensor, or"
        f" values by prompt as plain lists. Try: {function}([5, 7]), or {function}(PerPrompt(...))"
    )


def _has_top(*specs: Any) -> bool:
    """Whether ``BASELINE_TOP`` is among these, or among their values by prompt."""
    listed = [one for s in specs for one in (s.values if isinstance(s, PerPrompt) else (s,))]
    return any(isinstance(one, BaselineTop) for one in listed)


def _group(tokenizer: Any, spec: Any) -> Any:
    """Ids [n]; None for the baseline's own token; a list for values that differ by prompt."""
    if isinstance(spec, BaselineTop):
        return None
    if isinstance(spec, PerPrompt):
        return [_group(tokenizer, value) for value in spec.values]
    listed = [spec] if isinstance(spec, (str, int)) else list(spec)
    ids = [_token(tokenizer, one) for one in listed]
    twice = next((n for n, token in enumerate(ids) if token in ids[:n]), None)
    if twice is not None:
        first = listed[ids.index(ids[twice])]
        raise PromptError(
            f"metric: `token` is a group with token {ids[twice]} twice, as {first!r} and"
            f" {listed[twice]!r}, wanted each token once. Likely cause: a list with repeats, or a"
            " string beside its own id: the token would count twice. Try: logit(sorted(set(ids)))"
        )
    return torch.tensor(ids)


def _require_two_sides(up: Any, down: Any) -> None:
    """Refuse one token on both sides of a difference, in which it would say nothing."""
    count = max(len(side) if isinstance(side, list) else 1 for side in (up, down))
    for number in range(count):
        a, b = (side[number] if isinstance(side, list) else side for side in (up, down))
        if a is None and b is None:
            both: Any = "BASELINE_TOP"
        elif a is None or b is None:
            continue  # known when the baseline is run, and reported as ``degenerate``
        else:
            shared = [token for token in a.tolist() if token in b.tolist()]
            if not shared:
                continue
            both = f"token {shared[0]}"
        raise PromptError(
            f"logit_diff: `positive` is a group with {both}, which `negative` has as well, wanted"
            " each token on one side. Likely cause: two lists with a word in common, or two words"
            " that begin alike. Try: logit_diff([5, 7], 9)"
        )


def _token(tokenizer: Any, token: str | int) -> int:
    if isinstance(token, int):
        return token
    if tokenizer is None:
        raise PromptError(
            f"metric: `token` is {token!r}, on a model without a tokenizer, wanted a token id, or a"
            " model with its tokenizer. Likely cause: a module in memory, wrapped without"
            " tokenizer=. Try: ids, as in logit_diff(5, 7)"
        )
    ids = _one(tokenizer, token)
    if _known(tokenizer, ids):
        return ids[0]
    others = (f" {token.strip()}", token.strip(), tokenizer.decode(ids[:1]))
    fits = (other for other in others if _known(tokenizer, _one(tokenizer, other)))
    found = next(fits, None)  # only what is one token itself helps
    call = "an id, as in logit_diff(5, 7)" if found is None else f"logit_diff({found!r}, ...)"
    raise PromptError(
        f"metric: `token` is {token!r}, which is {len(ids)} tokens, wanted one known token. Likely"
        " cause: a leading space is part of many tokens, and long words are several. Try:"
        f" {call}"
    )


def _one(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _known(tokenizer: Any, ids: list[int]) -> bool:
    """Whether ids are one token that the tokenizer knows."""
    return len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None)


def _joined(seen: Seen, group: Any) -> Tensor:
    """[b]: log-sum-exp over the group at the last token, in at least float32."""
    if isinstance(group, list):  # values that differ by prompt: row by row
        tops = [None] * len(seen.logits) if seen.top is None else seen.top.split(1)
        rows = zip(seen.logits.split(1), tops, seen.numbers.tolist(), strict=True)
        return torch.cat([_joined(seen._replace(logits=x, top=t), group[n]) for x, t, n in rows])
    logits = seen.logits[:, -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if group is None and seen.top is None:
        raise SaefeatError(
            "metric: `token` is BASELINE_TOP, wanted a token, where no baseline is run. Likely"
            " cause: a trace, which is one run. Try: attribute(model, prompts), outside the trace"
        )
    if group is None:
        return logits.gather(1, seen.top[:, None].to(logits.device)).squeeze(1)
    outside = [int(token) for token in group if not 0 <= token < logits.shape[1]]
    if outside:
        raise PromptError(
            f"metric: `token` is {outside[0]}, wanted an id in 0..{logits.shape[1] - 1}. Likely"
            ' cause: another model\'s id, or one counted from the end. Try: logit_diff("Here", "I")'
        )
    chosen = logits[:, group.to(logits.device)]
    return chosen.squeeze(1) if chosen.shape[1] == 1 else chosen.logsumexp(1)


def _ids(tokenizer: Any, text: Any) -> tuple[int, ...]:
    if isinstance(text, str) and tokenizer is not None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = list(text) if isinstance(text, Sequence) and not isinstance(text, str) else []
    if ids and all(fits(token, int) for token in ids):
        return tuple(int(token) for token in ids)
    raise PromptError(
        f"log_prob: `continuation` is {text!r:.80}, wanted text, or token ids. Likely cause: an"
        " empty text, a single id, or text for a model without its tokenizer. Try:"
        ' log_prob(" I cannot"), or PerPrompt([...]) for one a prompt'
    )


def _summed(seen: Seen, table: tuple[tuple[int, ...], ...]) -> Tensor:
    """[b]: a row ends with its continuation, less the last token, so targets count from the end."""
    logits = seen.logits.to(torch.promote_types(seen.logits.dtype, torch.float32))
    rows = []
    for row, number in enumerate(seen.numbers.tolist()):
        ids = torch.tensor(table[number if len(table) > 1 else 0], device=logits.device)
        if not 0 <= int(ids.min()) <= int(ids.max()) < logits.shape[-1]:
            raise PromptError(
                f"log_prob: `continuation` is {ids.tolist()}, wanted ids in"
                f" 0..{logits.shape[-1] - 1}. Likely cause: ids of another model's vocabulary. Try:"
                " log_prob(tokenizer(text, add_special_tokens=False)['input_ids'])"
            )
        log_probs = logits[row, -len(ids) :].log_softmax(-1)  # [c, vocabulary]
        rows.append(log_probs.gather(1, ids[:, None]).sum())
    return torch.stack(rows)
