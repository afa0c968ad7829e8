"""The case of the refusal study: every number of its results, on the shipped model."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import freeze_names as lib
import torch
from freeze_record import Record

LIMIT = 4
"""Prompts a split: enough for every stage to have something to do."""


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and None of plain data, with its path."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from leaves(value[key], f"{path}/{key}")
    elif isinstance(value, list):
        for n, one in enumerate(value):
            yield from leaves(one, f"{path}/{n}")
    else:
        yield path, value


def summary(value: Any) -> dict[str, Any]:
    """Plain data's numbers as one tensor, its texts as a hash, and how many there are of each."""
    found = list(leaves(value))
    texts = [f"{path} {one}" for path, one in found if isinstance(one, str)]
    # what an intervention prints as is no result
    texts = [text for text in texts if "/intervention " not in text]
    numbers = [math.nan if one is None else float(one) for _, one in found if type(one) is not str]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    tensor = torch.tensor(numbers, dtype=torch.float64)
    return {"numbers": tensor, "texts": digest, "counts": [len(numbers), len(texts)]}


def _study(record: Record) -> None:
    """All sections of the data, and the choices made on the way."""
    with tempfile.TemporaryDirectory() as folder:
        results = lib.study_results(Path(folder), LIMIT)
    data = results["data"]
    for name, section in data.items():
        if isinstance(section, dict):
            for part, value in section.items():
                record.put(f"{name} {part}", summary(value))
        else:
            record.put(name, summary(section))
    cells = [[one["rows"] for one in tables] for tables in results["tables"].values()]
    record.put("tables", summary(cells))  # titles and captions are prose, and may be reworded
    record.put("prompts", results["prompts"])
    record.put("best layer", data["layers"]["best"])
    record.put("methods", data["sets"]["methods"])
    record.put("random", data["sets"]["random"])
    record.put("direction", results["provenance"]["direction"])
    record.put("dictionaries", results["provenance"]["dictionaries"])


CASES: dict[str, Callable[[Record], None]] = {"study": _study}
