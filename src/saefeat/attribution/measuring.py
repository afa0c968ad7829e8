"""Metrics that look further than the last logits: continuations, distributions, sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dictionaries.base import Dictionary, cast
from ..errors import LatentError, PromptError, SaefeatError, explain
from ..kernel.encode import encode
from ..kernel.tokens import select
from ..latents import Latents, as_latents, index_tensor
from ..sites import Site
from ..tokens import Tokens
from ..verbs.lower import plain
from .metrics import Metric, PerPrompt, Reader, Seen, real


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
        >>> sf.log_prob([5, 9, 4])
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
    )


def kl(to: str | Tensor = "clean") -> Metric:
    """KL(reference ‖ this run) of the next token's distribution: how far a run has gone from it.

    Against the clean run it is zero there and so is its gradient: use IG, or exact ablations. AtP,
    which looks at that one point, is refused.

    Args:
        to: ``"clean"``, ``"baseline"``, or logits or log-probabilities [vocabulary] or
            [prompts, vocabulary].

    Returns:
        A metric, in nats.

    Raises:
        SaefeatError: for another ``to``.

    Examples:
        >>> sf.kl()
        kl('clean')
    """
    if isinstance(to, Tensor):
        given: Tensor = to.detach()
        shaped = given.is_floating_point() and given.ndim in (1, 2)
        name = f"kl({list(given.shape)})"
    else:
        given, shaped, name = torch.zeros(0), to in ("clean", "baseline"), f"kl({to!r})"
    if not shaped:
        raise SaefeatError(
            explain(
                "kl",
                "to",
                got=f"of shape {tuple(to.shape)}" if isinstance(to, Tensor) else repr(to),
                wanted='"clean", "baseline", or logits [vocabulary] or [prompts, vocabulary]',
                cause="a token id, or logits of every position",
                call='kl("clean")',
            )
        )

    def read(seen: Seen) -> Tensor:
        reference = seen.clean if isinstance(to, str) and to == "clean" else seen.base
        if isinstance(to, Tensor):
            reference = given if given.ndim == 1 else given[seen.numbers]
        assert reference is not None
        return _divergence(reference, seen.logits[:, -1])

    count = len(to) if isinstance(to, Tensor) and to.ndim == 2 else None
    return Metric(
        name, lambda _: read, prompts=count, reference=to if isinstance(to, str) else None
    )


def site_metric(
    site: Site | str, function: Callable[[Tensor, Tensor], Tensor], name: str | None = None
) -> Metric:
    """Any differentiable function of a site's value, one number a prompt.

    Gradients reach what lies before the site, so every watched site must: others are refused.

    Args:
        site: where to look.
        function: value [b, t, d] in at least float32, and the mask of real tokens [b, t], padding
            on the left → [b].
        name: how it prints.

    Examples:
        >>> sf.site_metric("resid_post.3", lambda x, mask: x[:, -1].norm(dim=-1))
        site_metric('resid_post.3', <lambda>)
    """
    place = Site.parse(site)
    label = getattr(function, "__name__", "function") if name is None else name
    shown = f"site_metric('{place}', {label})" if name is None else name

    def read(seen: Seen) -> Tensor:
        assert seen.value is not None
        return function(seen.value, real(seen))

    return Metric(shown, lambda _: read, site=place)


def activation(latents: Any, where: Tokens | None = None) -> Metric:
    """The activations of downstream latents, summed over them and over tokens.

    So attribution runs from latents to a latent, or to a direction's projection. A latent that is
    off has no gradient: such prompts score nothing.

    Args:
        latents: ``Latents`` of one dictionary, or a dictionary (all its latents).
        where: which tokens; the prompt's last by default.

    Returns:
        A metric.

    Raises:
        LatentError: for latents of several dictionaries, or that depend on earlier tokens.

    Examples:
        >>> sf.activation(sf.Direction(torch.ones(8), site="resid_post.1"))
        activation(Latents(1: resid_post.1 [0]), Tokens.last(1))
    """
    chosen, rule = as_latents(latents, "activation"), where or Tokens.last(1)
    if len(chosen.parts) != 1:
        raise LatentError(
            explain(
                "activation",
                "latents",
                got=f"of {len(chosen.parts)} dictionaries",
                wanted="latents of one dictionary",
                cause="a selection over several sites",
                call="one attribution a site: activation(latents.at(site))",
            )
        )
    dictionary: Dictionary = chosen.parts[0][0]  # type: ignore[assignment]
    _require_tokenwise(dictionary)

    def reader(tokenizer: Any) -> Reader:
        bound = plain(rule.rule, _Known(tokenizer))
        return lambda seen: _summed_latents(seen, chosen, bound)

    return Metric(f"activation({chosen!r}, {rule!r})", reader, site=dictionary.site)


def _require_tokenwise(dictionary: Dictionary) -> None:
    """Refuse latents that depend on earlier tokens: padding would be among them."""
    if dictionary.prefix:
        raise LatentError(
            explain(
                "activation",
                "latents",
                got=f"of {dictionary!r}, which look back over the text",
                wanted="latents that depend on their own token's value alone",
                cause="a temporal SAE, or a function with prefix=True",
                call="run(model, prompts, Probe(latents)), which reads each row without padding",
            )
        )


class _Known:
    """What lowering a token rule asks of a model: its tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


def _summed_latents(seen: Seen, chosen: Latents, rule: tuple) -> Tensor:
    """[b]: activations summed over latents and selected tokens."""
    assert seen.value is not None
    x, (dictionary, indices) = seen.value, chosen.parts[0]
    columns = cast(dictionary.columns(index_tensor(indices)), x.dtype, x.device)  # type: ignore[attr-defined]
    f = encode(columns, x)[0].sum(-1)
    return torch.where(select(rule, seen.view).to(f.device), f, 0.0).sum(1)


def _ids(tokenizer: Any, text: Any) -> tuple[int, ...]:
    """A continuation's ids."""
    if isinstance(text, str) and tokenizer is not None:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        found = [] if isinstance(text, (str, int)) else list(text)
    if found and all(type(token) is int for token in found):
        return tuple(found)
    raise PromptError(
        explain(
            "log_prob",
            "continuation",
            got=f"{text!r:.80}, which is not a sequence of tokens",
            wanted="text, or token ids",
            cause="an empty text, a single id, or text for a model without its tokenizer",
            call='log_prob(" I cannot"), or PerPrompt([...]) for one a prompt',
        )
    )


def _summed(seen: Seen, table: tuple[tuple[int, ...], ...]) -> Tensor:
    """[b]: a row ends with its continuation, less the last token, so targets count from the end."""
    logits = seen.logits.to(torch.promote_types(seen.logits.dtype, torch.float32))
    rows = []
    for row, number in enumerate(seen.numbers.tolist()):
        ids = torch.tensor(table[number if len(table) > 1 else 0], device=logits.device)
        if not 0 <= int(ids.min()) <= int(ids.max()) < logits.shape[-1]:
            raise PromptError(
                explain(
                    "log_prob",
                    "continuation",
                    got=f"{ids.tolist()}",
                    wanted=f"ids in 0..{logits.shape[-1] - 1}",
                    cause="ids of another model's vocabulary",
                    call="log_prob(tokenizer(text, add_special_tokens=False)['input_ids'])",
                )
            )
        log_probs = logits[row, -len(ids) :].log_softmax(-1)  # [c, vocabulary]
        rows.append(log_probs.gather(1, ids[:, None]).sum())
    return torch.stack(rows)


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """[b]: KL of the first distribution from the second, in at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wanted = reference.detach().to(logits.device, dtype).log_softmax(-1)
    found = logits.to(dtype).log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1)
