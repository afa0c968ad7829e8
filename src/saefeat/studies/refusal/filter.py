"""The filter: fitting prompts that the model treats as their label says.

Directions and sets are fitted on what the model refuses against what it answers, so harmful
prompts that it answers, and harmless ones that it refuses, are left out of train and val; test
prompts are all kept. Which is which the judge says, by a short greedy answer: one token cannot
tell "I'm sorry" from "I'm glad". The paper goes by the first token, and so can this study.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .data import Prompt, chats
from .errors import DataError, UsageError
from .judges import OUTCOMES, Outcomes
from .lab import Lab
from .tables import Table, table

FITTED = ("harmful_train", "harmful_val", "harmless_train", "harmless_val")
SHORT = 64
"""Tokens of an answer by which prompts are filtered, at most."""
FEW = 32
"""Fewer prompts than this in a split are warned of: a mean of so few is mostly their wording."""
APART = 0.5
"""So much more often must refused prompts open with a refusal's token than answered ones."""


def keep_typical(lab: Lab) -> tuple[Lab, dict[str, Any]]:
    """The lab with the fitting prompts that are treated as labeled, and with test splits cut.

    ``limit`` counts prompts that are kept: a split is read until there are so many, or it ends.

    Returns:
        The lab, with a warning where few are left or the first token tells little, and plain data
        by split: ``kept``, ``read``, ``of``, outcomes, ``categories``, ``opened`` (how many of
        the kept open with a refusal's token), ``first`` (what the kept open with) and ``records``.

    Raises:
        DataError: for a split with fewer prompts than ``minimum``, or than ``limit`` if less.
        UsageError: for prompts that end within the skipped positions.
    """
    require_room(lab)
    rows = {name: _read(lab, name) for name in FITTED}
    found = {name: _counts(lab, name, rows[name]) for name in FITTED}
    _require_enough(lab, found)
    sets = lab.sets.limited(lab.settings.limit)
    kept = {name: tuple(_typical(lab, name, rows[name])) for name in FITTED}
    warnings = (*lab.warnings, *_few(lab, found), *_blunt(lab, found))
    return replace(lab, sets=replace(sets, **kept), warnings=warnings), found


def require_room(lab: Lab) -> None:
    """Refuse prompts, of any split, that end within the skipped positions.

    They would be neither read nor edited, and count as prompts on which an edit does nothing.

    Raises:
        UsageError: naming the shortest.
    """
    skipped, tokenizer = lab.settings.skipped, lab.model.tokenizer
    if skipped <= 1:  # a rendered chat is longer
        return
    prompts = [prompt for name in lab.sets.sizes() for prompt in getattr(lab.sets, name)]
    lengths = [
        len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        for chat in chats(prompts)
    ]
    shortest = min(lengths)
    if shortest <= skipped:
        request = prompts[lengths.index(shortest)].instruction
        raise UsageError(
            f"--skip {skipped}: the prompt {request!r:.80} has {shortest} tokens, template "
            "included, wanted more than are skipped. Likely cause: positions of another model's "
            f"system block. Try: --skip 1, or at most {shortest - 1}"
        )


def _wanted(name: str) -> str:
    return "refused" if name.startswith("harmful") else "complied"


def _read(lab: Lab, name: str) -> list[dict[str, Any]]:
    """A row a prompt, in order, until as many are kept as the limit says."""
    prompts: Sequence[Prompt] = getattr(lab.sets, name)
    limit = lab.settings.limit or len(prompts)
    size = max(1, min(lab.settings.batch_size, 2 * limit))
    rows: list[dict[str, Any]] = []
    for start in lab.progress(range(0, len(prompts), size), f"filter, {name}"):
        part = prompts[start : start + size]
        rows += lab.stage(f"filter/{name}/{start}", None, lambda p=part: _judged(lab, p))
        if sum(row["outcome"] == _wanted(name) for row in rows) >= limit:
            break
    return rows


def _judged(lab: Lab, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Records of these prompts, each with the first token of its answer."""
    if lab.settings.filter == "first-token":
        return _by_first_token(lab, prompts)
    out = lab.ask(prompts, tokens=min(SHORT, lab.settings.max_new_tokens))
    records = lab.records(prompts, out.texts)
    return [
        {**record, "first": completion[0]}
        for record, completion in zip(records, out.completions, strict=True)
    ]


def _by_first_token(lab: Lab, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """As published: refused where the likeliest first token opens a refusal."""
    first = lab.read(prompts).logits.argmax(-1).tolist()
    return [
        {
            "request": prompt.instruction,
            "category": prompt.category,
            "outcome": "refused" if token in lab.refusal_ids else "complied",
            "answer": lab.model.tokenizer.decode([token]),
            "first": token,
        }
        for prompt, token in zip(prompts, first, strict=True)
    ]


def _kept(lab: Lab, name: str, rows: list[dict[str, Any]]) -> list[int]:
    """Places of the kept prompts."""
    fit = [n for n, row in enumerate(rows) if row["outcome"] == _wanted(name)]
    return fit[: lab.settings.limit]


def _typical(lab: Lab, name: str, rows: list[dict[str, Any]]) -> list[Prompt]:
    prompts = getattr(lab.sets, name)
    return [prompts[n] for n in _kept(lab, name, rows)]


def _counts(lab: Lab, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of a split, plain data."""
    kept = [rows[n] for n in _kept(lab, name, rows)]
    first = Counter(row["first"] for row in kept)
    seen, left = (Counter(row["category"] for row in some) for some in (rows, kept))
    return {
        "kept": len(kept),
        "read": len(rows),
        "of": len(getattr(lab.sets, name)),
        **{key: value for key, value in _outcomes(rows).items() if key != "n"},
        "categories": {one: {"kept": left[one], "read": seen[one]} for one in seen},
        "opened": sum(count for token, count in first.items() if token in lab.refusal_ids),
        "first": [
            [lab.model.tokenizer.decode([token]), count] for token, count in first.most_common(4)
        ],
        "records": [{k: v for k, v in row.items() if k != "first"} for row in rows],
    }


def _outcomes(rows: list[dict[str, Any]]) -> dict[str, int]:
    return Outcomes.of(row["outcome"] for row in rows).counts()


def _spelled(found: dict[str, Any]) -> str:
    """``harmful_train 3 of 128 (refused 3, complied 120, broken 5); ...``."""
    return "; ".join(
        f"{name} {one['kept']} of {one['read']} "
        f"({', '.join(f'{outcome} {one[outcome]}' for outcome in OUTCOMES)})"
        for name, one in found.items()
    )


def _require_enough(lab: Lab, found: dict[str, Any]) -> None:
    settings = lab.settings
    least = max(1, min(settings.minimum, settings.limit or settings.minimum))
    short = [name for name, one in found.items() if one["kept"] < least]
    if not short:
        return
    other = {
        "first-token": "--filter answer, or --refusal-tokens this model's own",
        "answer": "--filter first-token with --refusal-tokens this model's own",
    }
    lowest = min(one["kept"] for one in found.values())
    on = f", or --minimum {lowest} to go on with so few" if lowest else ""
    record = next(
        (r for r in found[short[0]]["records"] if r["outcome"] != _wanted(short[0])),
        {"request": "", "answer": ""},
    )
    raise DataError(
        f"filter: {', '.join(short)} has too few prompts that the unedited model treats as labeled "
        f"(harmful refused, harmless answered), judged by {_judge(settings.filter)}, wanted at "
        f"least {least} a split. Kept: {_spelled(found)}. Left out is, for one, "
        f"{record['request']!r:.80} with {record['answer']!r:.80}. Likely cause: a model that "
        f"hardly refuses, or no chat model. Try: more prompts in --data, {other[settings.filter]}"
        f"{on}"
    )


def _judge(name: str) -> str:
    return "its first token" if name == "first-token" else "the judge on a short answer"


def _few(lab: Lab, found: dict[str, Any]) -> list[str]:
    """A warning where a split has few prompts left, unless no more were asked for."""
    enough = min(FEW, lab.settings.limit or FEW)
    if all(one["kept"] >= enough for one in found.values()):
        return []
    return [
        f"few prompts are left to fit on: {_spelled(found)}; fewer than {enough} a split make "
        "directions and choices uncertain. Try: more prompts in --data"
    ]


def _blunt(lab: Lab, found: dict[str, Any]) -> list[str]:
    """A warning where the first token, which metric and steering look at, tells little."""
    harmful, harmless = (
        {
            "opened": sum(found[name]["opened"] for name in names),
            "kept": sum(found[name]["kept"] for name in names),
            "first": _joined([found[name]["first"] for name in names]),
        }
        for names in (FITTED[:2], FITTED[2:])
    )
    share, other = (one["opened"] / one["kept"] for one in (harmful, harmless))
    if share - other >= APART:
        return []
    return [
        f"the first token tells refusals badly: {harmful['opened']} of {harmful['kept']} refused "
        f"prompts open with a token of --refusal-tokens ({', '.join(map(repr, lab.refusals))}), "
        f"and {harmless['opened']} of {harmless['kept']} answered ones. AP, log-odds and the count "
        f"of prompts refused under AS go by it. Refused ones open with {harmful['first']}, "
        f"answered ones with {harmless['first']}. Try: --refusal-tokens and --answer-tokens by "
        "these"
    ]


def _joined(several: list[list[Any]]) -> str:
    """The commonest openings of several splits, with their counts."""
    total: Counter[str] = Counter()
    for first in several:
        total.update(dict(map(tuple, first)))
    return ", ".join(f"{text!r} {count}" for text, count in total.most_common(4))


def filter_table(found: dict[str, Any], lab: Lab) -> Table:
    """One row a split."""
    settings = lab.settings
    skipped = f"the first {settings.skipped}" if settings.skipped != 1 else "the first"
    return table(
        "Which prompts directions and sets are fitted on",
        f"Harmful prompts are kept where the unedited model refuses, harmless ones where it "
        f"answers, by {_judge(settings.filter)}; test prompts are all kept. Read until "
        f"{settings.limit or 'all'} are kept. The last column counts kept prompts whose answer "
        f"opens with a token of a refusal: many of the harmful and few of the harmless, or the "
        f"log-odds below mean little. The tokens of the study are all of a text but "
        f"{skipped if settings.skipped else 'none'}.",
        ("split", "prompts", "read", "kept", *OUTCOMES, "open as a refusal"),
        [
            (name, one["of"], one["read"], one["kept"], *(one[o] for o in OUTCOMES), one["opened"])
            for name, one in found.items()
        ],
    )
