"""Cases of attribution and of what is said about scores: audits, controls, sets, edges."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import freeze_names as lib
import torch
from freeze_models import OTHERS, RAGGED, D, batch_of, build, generator, tokenizer, vector
from freeze_record import Record
from freeze_runs import dictionary, latents_of
from torch import Tensor

# ---------------------------------------------------------------- what is attributed


@cache
def _random(family: str) -> Any:
    return lib.wrap(build(family), tokenizer())


@cache
def _chats(split: str = "harmful_val", count: int = 4) -> list[Any]:
    return lib.chat_prompts(split, count)


@cache
def _refusal() -> Any:
    """A direction between harmful and harmless prompts, ablated at every layer."""
    model, width = lib.chat_model(), 64
    means = []
    for split in ("harmful_train", "harmless_train"):
        look = lib.probe(lib.neurons("resid_post.2", width), "last", at=lib.last(1))
        reading = lib.run(model, _chats(split, 16), look).readings[0]
        means.append(lib.reading_summaries(reading)["last"].mean(0))
    sites = [f"resid_post.{layer}" for layer in range(4)]
    return lib.ablate(lib.direction_at(means[0] - means[1], sites))


def _comply() -> Any:
    return lib.logit_diff(*lib.openings())


def _few() -> Any:
    return lib.pick(lib.chat_saes(), {0: [362, 484], 2: [42, 352, 373], 3: [29, 123]})


@cache
def _chat_means() -> Any:
    latents = lib.pick(lib.chat_saes(), {2: range(64), 3: range(32)})
    reading = lib.run(lib.chat_model(), _chats("harmless_val"), lib.probe(latents)).readings[0]
    return lib.fixed(latents, lib.mean_of(reading))


def _square(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask[..., None]).square().sum((1, 2))


def _all_logits(logits: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, logits.log_softmax(-1)[..., 7], 0.0).sum(1)


def _push(site: str = "resid_post.0") -> Any:
    return lib.ablate(lib.one_direction(vector(8), site))


Asked = dict[str, Any]
CHAT: dict[str, Callable[[], Asked]] = {
    # name → target, metric and options, on the shipped chat model
    "one gradient, openings": lambda: {"metric": _comply(), "views": True},
    "path left, under a direction": lambda: {
        "metric": _comply(), "baseline": _refusal(), "method": lib.path(3)
    },
    "path midpoint, harmful answer": lambda: {
        "metric": lib.log_prob("of course , you can"), "method": lib.path(2, "midpoint")
    },
    "path gauss, one site": lambda: {
        "metric": lib.logit(5), "method": lib.path(3, "gauss"), "one_site": True
    },
    "path as published, baseline top": lambda: {
        "metric": lib.logit_diff(lib.baseline_top(), lib.openings()[1]),
        "baseline": _refusal(), "method": lib.path(3, published=True),
    },
    "path one site, under a direction": lambda: {
        "metric": _comply(), "baseline": _refusal(), "one_site": True,
        "method": lib.path(2, "midpoint"),
    },
    "through the dictionaries": lambda: {"metric": _comply(), "semantics": "through_sae"},
    "relevance": lambda: {"metric": _comply(), "backward": lib.relevance()},
    "dropped layers": lambda: {"metric": _comply(), "backward": lib.dropped_layers()},
    "kept, user's tokens": lambda: {"metric": _comply(), "keep": 3, "at": lib.role("user")},
    "exact few": lambda: {"target": _few(), "metric": _comply(), "method": lib.exact()},
    "exact by token, under a direction": lambda: {
        "target": _few(), "metric": _comply(), "method": lib.exact("token"),
        "baseline": _refusal(), "at": lib.last(3),
    },
    "small steps": lambda: {
        "target": _few(), "metric": _comply(), "method": lib.small_steps(0.1)
    },
    "to means": lambda: {
        "target": lib.pick(lib.chat_saes(), {2: range(64), 3: range(32)}),
        "metric": _comply(), "baseline": _chat_means(), "method": lib.path(2, "midpoint"),
    },
    "other prompts, from the end": lambda: {
        "metric": _comply(), "baseline": lib.paired(_chats("harmless_val"), "end"),
        "at": lib.last(3), "method": lib.path(2),
    },
    "divergence from clean": lambda: {"metric": lib.kl(), "method": lib.path(3, "gauss")},
    "divergence from the baseline": lambda: {
        "metric": lib.kl("baseline"), "baseline": _refusal()
    },
    "a later latent": lambda: {
        "target": lib.pick(lib.chat_saes(), {0: range(64), 1: range(64)}),
        "metric": lib.activation(lib.pick(lib.chat_saes()[2], [42, 373])),
    },
    "transcoder": lambda: {"target": lib.chat_sae("transcoder_2"), "metric": _comply()},
    "locally requested": lambda: {"metric": _comply(), "on": "local", "method": lib.path(2)},
}  # fmt: skip

RANDOM: dict[str, Callable[[], Asked]] = {
    # name → family, target, metric and options, on tiny random models
    "transcoder, one gradient": lambda: {
        "family": "gemma2", "target": dictionary("transcoder"), "metric": lib.logit_diff(5, 6)
    },
    "skip transcoder, path": lambda: {
        "family": "llama", "target": dictionary("skip transcoder"),
        "metric": lib.logit_diff([5, 7], 6), "method": lib.path(3, "gauss"), "baseline": _push(),
    },
    "jumprelu transcoder, locally": lambda: {
        "family": "gpt2", "metric": lib.logit(9), "on": "local",
        "target": lib.together([dictionary("jumprelu transcoder"), dictionary("jumprelu")]),
    },
    "transcoder, through": lambda: {
        "family": "qwen3", "metric": lib.logit(9), "semantics": "through_sae",
        "target": lib.together([dictionary("transcoder"), dictionary("jumprelu")]),
    },
    "gated, answers by prompt": lambda: {
        "family": "gpt_neox", "target": dictionary("gated"),
        "metric": lib.log_prob(lib.per_prompt([[5, 9], [7], [8, 6, 4]])),
    },
    "topk, tokens by prompt": lambda: {
        "family": "gemma3", "target": dictionary("topk"),
        "metric": lib.logit_diff(lib.per_prompt([5, [6, 7], 8]), 9), "method": lib.path(2),
    },
    "abstopk, fixed number": lambda: {
        "family": "llama", "target": dictionary("abstopk"), "metric": lib.logit(4),
        "baseline": lib.fixed(dictionary("abstopk"), 0.5), "method": lib.path(2, "midpoint"),
    },
    "other prompts": lambda: {
        "family": "gpt2", "target": dictionary("two sites"), "metric": lib.logit_diff(5, 6),
        "baseline": lib.paired(OTHERS), "method": lib.path(4, "midpoint"),
    },
    "other prompts, mapped": lambda: {
        "family": "qwen3", "target": dictionary("jumprelu"), "metric": lib.logit_diff(5, 6),
        "baseline": lib.paired(
            [OTHERS[1], OTHERS[0], OTHERS[2]],
            [[1, 2, 5], [0, 0, 1, None, None, 2], [0, 1, 2, 3]],
        ),
    },
    "layer norm, square of a site": lambda: {
        "family": "gpt2", "target": dictionary("layer norm"),
        "metric": lib.site_metric("resid_post.2", _square),
    },
    "constant norm, all logits": lambda: {
        "family": "gemma2", "target": dictionary("constant norm"),
        "metric": lib.metric(_all_logits, "all"), "method": lib.path(2),
    },
    "function, entropy": lambda: {
        "family": "llama", "target": dictionary("function"), "metric": lib.metric(_entropy),
        "at": lib.last(2),
    },
    "error term, to given logits": lambda: {
        "family": "gemma2", "target": dictionary("error"),
        "metric": lib.kl(torch.randn(3, 100, generator=generator(80))),
    },
    "mlp's own coordinates, small steps": lambda: {
        "family": "qwen3", "target": latents_of("subspace of mlp"), "metric": lib.logit(7),
        "method": lib.small_steps(0.05, "token"), "on": "local",
    },
    "exact, under a push, locally": lambda: {
        "family": "gemma2", "target": latents_of("two sites"), "metric": lib.logit_diff(5, 6),
        "method": lib.exact(), "baseline": _push(), "on": "local",
    },
    "published, locally": lambda: {
        "family": "llama", "target": dictionary("standard"), "metric": lib.logit_diff(5, 6),
        "method": lib.path(2, published=True), "baseline": _push("resid_post.1"), "on": "local",
    },
    "relevance in gpt2": lambda: {
        "family": "gpt2", "target": dictionary("two sites"), "metric": lib.logit(5),
        "backward": lib.relevance(),
    },
    "relevance in gpt_neox": lambda: {
        "family": "gpt_neox", "target": dictionary("standard"), "metric": lib.logit(5),
        "backward": lib.relevance(), "method": lib.path(2, "midpoint"), "baseline": _push(),
    },
    "dropped layers, kept": lambda: {
        "family": "qwen3", "target": dictionary("two sites"), "metric": lib.logit_diff(5, 6),
        "backward": lib.dropped_layers(), "keep": 4,
    },
    "neurons, baseline's token": lambda: {
        "family": "gemma3", "target": dictionary("neurons"), "baseline": _push(),
        "metric": lib.logit(lib.baseline_top()), "method": lib.path(2),
    },
    "later direction": lambda: {
        "family": "gpt_neox", "target": dictionary("jumprelu"),
        "metric": lib.activation(lib.one_direction(vector(9), "resid_post.2"), lib.last(2)),
    },
}  # fmt: skip


def _entropy(logits: Tensor) -> Tensor:
    last = logits.log_softmax(-1)
    return -(last.exp() * last).sum(-1)


def _attribution(make: Callable[[], Asked]) -> Callable[[Record], None]:
    def case(record: Record) -> None:
        asked = make()
        family = asked.pop("family", None)
        views, on = asked.pop("views", False), asked.pop("on", None)
        model = lib.chat_model() if family is None else _random(family)
        prompts = _chats() if family is None else RAGGED
        target = asked.pop("target", None)
        target = lib.chat_saes() if target is None else target
        verb = lib.attribute(target, asked.pop("metric"), **asked)
        found = lib.scores(verb, model, prompts, batch=3, on=on)
        values = lib.attribution_values(found)
        record.put("", values)
        # a gap is the small difference of large numbers, and as exact as they are
        record.put("", lib.attribution_gaps(found), scale=float(values["clean"].abs().max()))
        if views:
            record.put("view", lib.attribution_views(found, _few(), ~lib.special()))

    return case


CASES: dict[str, Callable[[Record], None]] = {
    **{f"attribution: chat, {name}": _attribution(make) for name, make in CHAT.items()},
    **{f"attribution: random, {name}": _attribution(make) for name, make in RANDOM.items()},
}


def _watched(record: Record) -> None:
    """Scores inside a trace of the user's own."""
    chat, batch = lib.chat_model(), lib.encode_prompts(lib.chat_model(), _chats())
    verb = lib.attribute(lib.chat_saes(), _comply(), keep=40)
    record.put("logits", lib.attribution_values(lib.scores_in_trace(verb, chat, batch)))
    ablated = lib.scores_in_trace(verb, chat, batch, lib.ablate(_few()))
    record.put("under an edit", lib.attribution_values(ablated))
    model, verb = _random("llama"), lib.attribute(dictionary("transcoder"), lib.logit(5))
    entropy = lib.entropy_scores_in_trace(verb, model, batch_of(RAGGED))
    record.put("entropy", lib.attribution_values(entropy))
    to = lib.fixed(dictionary("standard"), 0.25)
    verb = lib.attribute(dictionary("standard"), lib.logit(5), baseline=to)
    found = lib.scores_in_trace(verb, model, batch_of(RAGGED))
    record.put("fixed", lib.attribution_values(found))


def _at_once(record: Record) -> None:
    """However many nodes share a pass, and in whatever batches, and from a folder, and a file."""
    model, prompts = _random("gemma2"), RAGGED
    saes = dictionary("two sites")
    verb = lib.attribute(saes, lib.logit_diff(5, 6), method=lib.path(4), baseline=_push())
    for count in (1, 3):
        found = lib.scores(verb, model, prompts, batch=2, at_once=count)
        record.put(f"{count} at once", lib.attribution_values(found))
    with tempfile.TemporaryDirectory() as name:
        for _ in range(2):  # the second is read back
            found = lib.scores(verb, model, prompts, batch=1, folder=Path(name) / "job")
        record.put("resumed", lib.attribution_values(found))
        back = lib.attribution_saved(found, Path(name) / "scores.safetensors", saes)
        record.put("saved", lib.attribution_values(back))
        record.size("bytes", (Path(name) / "scores.safetensors").stat().st_size)


def _measured(record: Record) -> None:
    """Metrics read off runs, and the loss of a model's own completions."""
    chat = lib.chat_model()
    verbs = {"bare": None, "few": lib.ablate(_few()), "direction": _refusal()}
    metrics = {
        "openings": _comply(),
        "answer": lib.log_prob("of course , you can"),
        "divergence": lib.kl(),
        "latents": lib.activation(lib.pick(lib.chat_saes()[3], [29, 123])),
        "own top": lib.logit(lib.baseline_top()),
        "square": lib.site_metric("resid_post.3", _square),
    }
    for metric, what in metrics.items():
        for name, verb in verbs.items():
            found = lib.measure(chat, _chats(), what, verb, batch=3)
            # the clean run's divergence from itself is rounding
            record.put(f"{metric}, {name}", found, scale=1.0)
    for family in ("gpt2", "gemma3"):
        model = _random(family)
        verb = lib.clamp(latents_of("standard"), add=1.5, at=lib.last(1) | lib.generated())
        _losses(record, family, model, RAGGED, {"bare": None, "add": verb})
    _losses(record, "chat", chat, _chats("harmless_val"), verbs)


def _losses(record: Record, name: str, model: Any, prompts: Any, verbs: dict[str, Any]) -> None:
    """Nats a token of the bare model's completions, by two roads."""
    plain = lib.run(model, prompts, new=6)
    counts = torch.tensor([len(row) for row in plain.completions])
    what = lib.log_prob(lib.per_prompt(plain.completions))
    for verb, edit in verbs.items():
        measured = -lib.measure(model, plain.prompts, what, edit, batch=3) / counts
        record.put(f"{name} measured loss, {verb}", measured)
        record.put(f"{name} loss, {verb}", lib.continuation_loss(model, plain, edit, batch=3))


def _controls(record: Record) -> None:
    """Matched latents, random directions, and what they do."""
    chat, harmless = lib.chat_model(), _chats("harmless_val", 12)
    latents = lib.pick(lib.chat_saes(), {2: [42, 373], 3: [29]})
    reading = lib.run(chat, harmless, lib.probe(lib.chat_saes())).readings[0]
    for seed in (0, 1):
        found = lib.matched(latents, reading, seed=seed, within=8.0)
        record.put(f"matched {seed}", lib.members(found))
        moved = lib.random_directions(latents, seed=seed)
        record.put(f"random {seed}", lib.intervention_values(lib.ablate(moved)))
        for name, control in (("matched", found), ("random", moved)):
            result = lib.run(chat, _chats(), lib.ablate(control), new=8)
            record.put(f"{name} {seed} run", lib.run_values(result))
    some = lib.matched(latents_of("two sites"), (), seed=3, within=2.0)
    record.put("by length", lib.members(some))


@cache
def _judged() -> tuple[Any, Any]:
    verb = lib.attribute(lib.chat_saes(), _comply(), method=lib.path(2, "midpoint"))
    return verb, lib.scores(verb, lib.chat_model(), _chats())


def _audit(record: Record) -> None:
    """Estimates beside exact effects: on the chat model, under a baseline, site by site."""
    verb, found = _judged()
    audited = lib.audit(verb, lib.chat_model(), _chats(), found, budget=24, seed=1)
    record.put("chat", audited)
    one = {"method": lib.path(2, "gauss"), "one_site": True, "baseline": _push()}
    cases = {
        "two sites": ("gemma2", lib.attribute(dictionary("two sites"), lib.logit(5), **one)),
        "transcoder": ("llama", lib.attribute(dictionary("transcoder"), lib.logit_diff(5, 6))),
        "kept": ("gpt2", lib.attribute(dictionary("standard"), lib.log_prob([5, 9]), keep=4)),
    }
    for name, (family, verb) in cases.items():
        found = lib.scores(verb, _random(family), RAGGED)
        record.put(name, lib.audit(verb, _random(family), RAGGED, found, k=4, budget=10, seed=2))


def _stability(record: Record) -> None:
    """Top sets under prompts drawn again."""
    record.put("chat", lib.stability(_judged()[1], 6, samples=60, seed=3))
    verb = lib.attribute(dictionary("two sites"), lib.logit(5))
    found = lib.scores(verb, _random("qwen3"), RAGGED)
    record.put("random", lib.stability(found, 5, samples=40))


def _faithfulness(record: Record) -> None:
    """Sets kept and removed, to zero and to means."""
    target = lib.pick(lib.chat_saes(), {2: range(512), 3: range(512)})
    verb = lib.attribute(target, _comply(), at=lib.last(4))
    found = lib.scores(verb, lib.chat_model(), _chats())
    options: dict[str, Any] = {"sizes": [1, 3], "controls": 1, "seed": 4}
    record.put("chat", lib.faithfulness(verb, lib.chat_model(), _chats(), found, **options))
    verb = lib.attribute(dictionary("two sites"), lib.logit_diff(5, 6))
    found = lib.scores(verb, _random("gpt_neox"), RAGGED)
    options = {"sizes": [2, 4], "controls": 2, "to": "mean"}
    record.put("means", lib.faithfulness(verb, _random("gpt_neox"), RAGGED, found, **options))


def _minimal(record: Record) -> None:
    """Sets from which nothing can be dropped, ablated and kept."""
    chat, top = lib.chat_model(), lib.top(_judged()[1], 6)
    record.put("chat", lib.minimal_set(chat, _chats(), top, _comply(), holds=-2.0))
    model, some, what = _random("llama"), latents_of("standard"), lib.logit_diff(6, 5)

    def halfway(*verbs: Any) -> float:
        ends = [float(lib.measure(model, RAGGED, what, verb).mean()) for verb in verbs]
        return sum(ends) / len(ends)

    floor = halfway(None, lib.ablate(some))
    record.put("random", lib.minimal_set(model, RAGGED, some, what, holds=floor))
    every = lib.pick(dictionary("two sites"), {1: range(12), 2: range(12)})
    part = lib.pick(dictionary("two sites"), {1: range(4)})
    floor = halfway(lib.ablate(every), lib.ablate(every - part))
    record.put("kept", lib.minimal_set(model, RAGGED, part, what, holds=floor, within=every))


def _pairs(record: Record) -> None:
    """Second differences of ablations."""
    found = lib.interactions(lib.chat_model(), _chats(), _few(), _comply())
    record.put("chat", found)
    some, model = latents_of("two sites"), _random("gemma3")
    what = lib.logit(lib.baseline_top())
    record.put("random", lib.interactions(model, RAGGED, some, what, baseline=_push()))
    some = latents_of("transcoder")
    what, at = lib.log_prob([5, 9]), lib.last(2)
    record.put("transcoder", lib.interactions(model, RAGGED, some, what, where=at))


def _edges(record: Record) -> None:
    """Which latents drive which, and checks of the strongest."""
    up, down = (lib.pick(lib.chat_saes(), at) for at in ({0: [362, 484], 1: [359]}, {2: [42, 373]}))
    record.put("chat", lib.edges(lib.chat_model(), _chats(), up, down, check=3))
    up, down = latents_of("transcoder"), lib.pick(dictionary("two sites"), {2: [17, 8, 22]})
    record.put("random", lib.edges(_random("gpt2"), RAGGED, up, down, where=lib.last(2), check=4))
    up = lib.pick(dictionary("neurons"), range(6))
    down = lib.pick(lib.neurons("resid_post.2", D), range(4))
    record.put("neurons", lib.edges(_random("gemma2"), RAGGED, up, down, check=2, batch_size=2))


def _verified(record: Record) -> None:
    """Whether dictionaries are where they should be, and one that is not."""
    chat, prompts = lib.chat_model(), _chats("harmless_train", 12)
    kinds: dict[str, Any] = {
        "resid_post": lib.chat_saes(),
        "mlp_out": lib.chat_sae("mlp_out_2"),
        "transcoder": lib.chat_sae("transcoder_2"),
        "wrong layer": lib.chat_sae("resid_post_3", "resid_post.1"),
    }
    for name, dictionaries in kinds.items():
        record.put(name, lib.verified(chat, dictionaries, prompts))
    for family in ("gpt2", "qwen3"):
        record.put(family, lib.verified(_random(family), dictionary("standard"), RAGGED))


CASES |= {
    "attribution: in a trace": _watched,
    "attribution: batches, folders, files": _at_once,
    "measured metrics": _measured,
    "controls": _controls,
    "validation: audit": _audit,
    "validation: stability": _stability,
    "validation: faithfulness": _faithfulness,
    "validation: minimal sets": _minimal,
    "validation: interactions": _pairs,
    "validation: edges": _edges,
    "verification": _verified,
}
