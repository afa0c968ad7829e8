"""Answers: every one that was judged, whole, as JSON lines beside the results.

A row of the results that counts outcomes holds ``records`` while the study runs. They are written
to ``answers.jsonl``, where each line says what it answers, and leave the results themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

FILE = "answers.jsonl"

_NAMED = ("method", "value", "layer", "budget", "candidates", "scale")
"""What tells one row of a section from another."""
_CONTAINERS = {"rows", "reference", "outcomes"}


def answer_lines(data: dict[str, Any]) -> Iterator[str]:
    """A JSON object for each answer: ``section``, what names its row, and the record.

    A record is ``request``, ``category``, ``outcome`` and ``answer``.
    """
    for section, found in data.items():
        for line in _lines(found, {"section": section}):
            yield json.dumps(line, ensure_ascii=False)


def _lines(value: Any, context: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for one in value:
            yield from _lines(one, context)
    if not isinstance(value, dict):
        return
    named = {name: value[name] for name in _NAMED if _plain(value.get(name))}
    here = {**context, **named}
    for number, record in enumerate(value.get("records", ())):
        yield {**here, "number": number, **record}
    for name, inner in value.items():
        if name == "records" or not isinstance(inner, dict | list):
            continue
        place = "" if name in _CONTAINERS else f"/{name}"
        yield from _lines(inner, {**here, "section": context["section"] + place})


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def shortened(value: Any, examples: int) -> Any:
    """The data with the first few records of each row as ``examples`` in place of all."""
    if isinstance(value, list):
        return [shortened(one, examples) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {k: shortened(v, examples) for k, v in value.items() if k != "records"}
    if "records" in value:
        kept["examples"] = value["records"][:examples]
    return kept
