"""Prompt sets: what the model is asked, split into fitting, choosing and testing.

The layout on disk is that of ``andyrdt/refusal_direction``: one JSON file a split, a list of
objects with ``instruction`` and, where there is one, ``category``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import DataError


@dataclass(frozen=True)
class Prompt:
    """One request and its category ("" where none is given)."""

    instruction: str
    category: str = ""


@dataclass(frozen=True)
class PromptSets:
    """The splits of a study: train fits directions and sets, val chooses, test is reported.

    ``sensitive_test`` holds harmless requests with harmful-looking words; it may be empty.
    """

    harmful_train: tuple[Prompt, ...]
    harmful_val: tuple[Prompt, ...]
    harmful_test: tuple[Prompt, ...]
    harmless_train: tuple[Prompt, ...]
    harmless_val: tuple[Prompt, ...]
    harmless_test: tuple[Prompt, ...]
    sensitive_test: tuple[Prompt, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Split → number of prompts."""
        return {field.name: len(getattr(self, field.name)) for field in fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for fingerprints."""
        return asdict(self)

    def limited(self, limit: int | None) -> PromptSets:
        """The first ``limit`` prompts of every split; None keeps all."""
        kept = {name: getattr(self, name)[:limit] for name in self.sizes()}
        return replace(self, **kept)


SPLITS = tuple(field.name for field in fields(PromptSets))
OPTIONAL = {"sensitive_test"}


def load_folder(folder: str | Path) -> PromptSets:
    """All splits of a folder in the layout of ``andyrdt/refusal_direction``.

    Raises:
        DataError: for a folder or split that is not there, is empty, or has another layout.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"--data: {folder} is no folder; wanted one that holds {_wanted()}")
    missing = [name for name in SPLITS if not (folder / f"{name}.json").is_file()]
    if set(missing) - OPTIONAL:
        absent = ", ".join(f"{name}.json" for name in missing if name not in OPTIONAL)
        raise DataError(f"--data: {folder} has no {absent}; wanted {_wanted()}")
    found = {n: load_split(folder / f"{n}.json") for n in SPLITS if n not in missing}
    return PromptSets(**found)


def load_split(path: Path) -> tuple[Prompt, ...]:
    """One split's prompts, in the file's order.

    Raises:
        DataError: if the file is not a list of objects with a text ``instruction``, or is empty.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON ({error}); wanted a list of objects") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}; wanted a list of objects")
    if not rows:
        raise DataError(f"{path} is empty; wanted at least one prompt")
    return tuple(_prompt(path, number, row) for number, row in enumerate(rows))


def _prompt(path: Path, number: int, row: Any) -> Prompt:
    instruction = row.get("instruction") if isinstance(row, dict) else None
    if not isinstance(instruction, str) or not instruction.strip():
        raise DataError(
            f'{path}, entry {number}: {str(row)[:80]!r} has no "instruction" text; '
            'wanted {"instruction": "...", "category": "..."}'
        )
    return Prompt(instruction, str(row.get("category") or ""))


def _wanted() -> str:
    return ", ".join(f"{name}.json" for name in SPLITS if name not in OPTIONAL)


def chats(prompts: Sequence[Prompt]) -> list[list[dict[str, str]]]:
    """Each prompt as a chat of one user message."""
    return [[{"role": "user", "content": prompt.instruction}] for prompt in prompts]
