"""What a case gives: every prompt on its own, unpadded, without a cache, by plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cases import Case, Patch, Step
from .hand import Pass, hooks
from .weights import model

UNNAMED = ("hooked", "right", "loop", "again", "uncached")
"""Ways with a module alone, which has no tokenizer."""

SPECIAL = {True: (0, 1, 2, 3), False: (2, 1, 0)}
"""Special ids of the tokenizer, and those that the models' configuration names."""


@dataclass(frozen=True)
class Answer:
    """One prompt's: its completion, logits [t, v] at every token fed, and the last pass."""

    completion: list[int]
    logits: Tensor
    seen: Pass


def answers(case: Case, drawn: Callable[[int, int, int, int], int]) -> list[Answer]:
    """The case's prompts, one by one."""
    return [_answer(case, number, drawn) for number in range(len(case.prompts))]


def _answer(case: Case, number: int, drawn: Callable[[int, int, int, int], int]) -> Answer:
    bare = model(case.family, case.dtype, "oracle")
    prompt = list(case.prompts[number])
    pinned = {
        n: _pinned(case, number, step) for n, step in enumerate(case.steps)
        if isinstance(step.value, Patch)
    }  # fmt: skip
    special = SPECIAL[case.way not in UNNAMED]

    def fed(ids: list[list[int]]) -> tuple[Tensor, Pass]:
        given = torch.tensor(ids)
        now = Pass(given, len(prompt), number, special, pinned, drawn)
        with torch.no_grad(), hooks(bare, case, now):
            return bare(input_ids=given, use_cache=False).logits, now

    if case.way == "beams":
        return _beams(case, bare, prompt, lambda ids: Pass(
            ids, len(prompt), number, special, pinned, drawn))  # fmt: skip
    ids, near = list(prompt), float("inf")
    while True:
        logits, now = fed([ids])
        best = logits[0, -1].topk(2).values
        near = min(near, now.near)
        if case.new:
            near = min(near, float(best[0] - best[1]))
        now.near = near
        more = [*ids[len(prompt) :], int(logits[0, -1].argmax())]
        if len(more) >= case.new or more[-1] in case.stops:
            return Answer(more if case.new else [], logits[0], now)
        ids = [*prompt, *more]


def _beams(case: Case, bare: torch.nn.Module, prompt: list[int], begin: Callable) -> Answer:
    """transformers' own search without a cache: each pass shows every beam's whole text."""
    entered = []

    def enter(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        now = begin(kwargs["input_ids"])
        context = hooks(bare, case, now)
        context.__enter__()
        entered.append((context, now))

    def leave(*_: object) -> None:
        entered[-1][0].__exit__(None, None, None)

    handles = [
        bare.register_forward_pre_hook(enter, with_kwargs=True),
        bare.register_forward_hook(leave),
    ]
    stops = list(case.stops) or 100
    try:
        found = bare.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=3, do_sample=False, use_cache=False, max_new_tokens=case.new,
            eos_token_id=stops, pad_token_id=0,
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    row = found[0, len(prompt) :].tolist()
    end = next((n + 1 for n, token in enumerate(row) if token in case.stops), len(row))
    first = entered[0][1]
    first.near = min(now.near for _, now in entered)
    return Answer(row[:end], torch.zeros(0), first)


def _pinned(case: Case, number: int, step: Step) -> tuple[Tensor, Tensor]:
    """[s, k]: what the bare model has at the prompt and behind it, where the rule selects."""
    assert isinstance(step.value, Patch)
    probe = Step("probe", step.parts, where=step.value.where)
    way = "run"
    clean = replace(case, groups=((probe,),), new=step.value.new, way=way, stops=case.stops)
    seen = _answer(clean, number, lambda *_: 0).seen
    values, masks = [], []
    for _, (f, mask) in sorted(seen.readings[0].items()):
        values.append(f[0])
        masks.append(mask[0, :, None].expand_as(f[0]))
    return torch.cat(values, -1), torch.cat(masks, -1)
