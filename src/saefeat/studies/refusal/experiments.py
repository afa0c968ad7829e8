"""The study: all experiments in order, their tables as they finish, and the results as data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

import saefeat as sf

from .answers import FILE, answer_lines, shortened
from .check import check_completeness, check_latents, check_tables
from .dictionaries import check_dictionaries, dictionary_table
from .direction import layer_table, sweep_layers
from .filter import filter_table, keep_typical
from .induction import induce, induction_table
from .lab import Lab
from .side_effects import side_effect_table, side_effects
from .stages import Say, Stages, write_atomically
from .suppression import (
    POPULATIONS,
    category_table,
    global_edits,
    suppress,
    suppression_table,
)
from .tables import Table, render
from .tuning import sets_table, tune, tuning_table

NOTES = (
    "Held-out prompts are added to the fitted ones, and global sets beside local ones: the paper "
    "compares per-prompt sets of its own method with shared sets of others, on prompts it fitted.",
    "Local sets are aligned with their prompts and attributions masked to real tokens.",
    "Fitting prompts are filtered by the judge on a short answer; --filter first-token goes by the "
    "first token, as published.",
    "The corrupt end of the path is the activation after steering, not before it.",
    "Broken answers are counted apart; every rate has an interval; random sets match in number, "
    "layer and being active.",
    "Where there is a choice, each method gets its own clamp on val, all at one common budget.",
)


@dataclass
class Notebook:
    """What a study has found so far.

    Attributes:
        stages: where finished work is kept.
        say: takes each table's text as soon as it is finished.
        tables: section → tables.
        data: section → plain data.
        timing: section → seconds in this run.
    """

    stages: Stages
    say: Say
    tables: dict[str, list[Table]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)

    def section(
        self, name: str, work: Callable[[], Any], show: Callable[[Any], list[Table | None]]
    ) -> Any:
        """Do a section's work, keep it, and show its tables."""
        start, before = time.perf_counter(), len(self.stages.reused)
        found = self.data[name] = work()
        self.timing[name] = round(time.perf_counter() - start, 2)
        self.tables[name] = [one for one in show(found) if one is not None]
        if len(self.stages.reused) > before:
            self.say(f"{name}: reused from disk: {len(self.stages.reused) - before} stages\n")
        for one in self.tables[name]:
            self.say(render(one))
        whole = [render(one) for tables in self.tables.values() for one in tables]
        folder = self.stages.folder.parent
        write_atomically(folder / "tables.txt", "\n".join(whole))
        write_atomically(folder / FILE, "".join(f"{line}\n" for line in answer_lines(self.data)))
        return found


def study(lab: Lab, say: Say) -> dict[str, Any]:
    """Run everything; a table is shown, and kept on disk, as soon as it is finished.

    Returns:
        The results, plain data: title, tables, data, prompts, provenance, settings, timing.
    """
    begun = time.perf_counter()
    book = Notebook(lab.stages, say)
    lab = _filtered(lab, book)
    book.section("dictionaries", lambda: check_dictionaries(lab), lambda f: [dictionary_table(f)])
    layers = book.section("layers", lambda: sweep_layers(lab), lambda f: [layer_table(f)])
    vector = torch.tensor(layers["directions"][layers["best"]])
    tuned = book.section(
        "sets", lambda: tune(lab, vector), lambda f: [tuning_table(f), sets_table(f)]
    )
    _effects(lab, book, vector, layers["best"], tuned)
    book.timing["total"] = round(time.perf_counter() - begun, 2)
    return {
        "title": f"Refusal in {lab.name}: a few latents that carry it",
        "tables": {name: [t.to_dict() for t in found] for name, found in book.tables.items()},
        "data": shortened(book.data, lab.settings.examples),
        "answers": FILE,
        "prompts": {"sizes": lab.sets.sizes(), "filter": lab.settings.filter},
        "constants": lab.constants,
        "warnings": list(lab.warnings),
        "provenance": provenance(lab, vector, tuned),
        "settings": lab.settings.to_dict(),
        "timing": {
            "seconds in this run": book.timing,
            "stages computed": len(lab.stages.made),
            "stages reused": len(lab.stages.reused),
        },
        "stages": {"computed": lab.stages.made, "reused": lab.stages.reused},
        "notes": list(NOTES),
    }


def _filtered(lab: Lab, book: Notebook) -> Lab:
    """The lab with its fitting prompts filtered; its warnings are said."""
    found: list[Lab] = []

    def work() -> dict[str, Any]:
        kept, counts = keep_typical(lab)
        found.append(kept)
        return counts

    book.section("prompts", work, lambda f: [filter_table(f, lab)])
    for line in found[0].warnings:
        book.say(f"warning: {line}\n")
    return found[0]


def _effects(lab: Lab, book: Notebook, vector: Tensor, best: int, tuned: dict[str, Any]) -> None:
    """What the chosen sets do: suppression, induction, side effects, and the exact check."""
    book.section(
        "suppression",
        lambda: suppress(lab, vector, tuned),
        lambda f: [
            one
            for n, name in enumerate(POPULATIONS)
            for one in (
                suppression_table(f, name, 4 + n, tuned["budget"]),
                category_table(f, name, 4 + n),
            )
        ],
    )
    book.section(
        "induction", lambda: induce(lab, vector, best, tuned), lambda f: [induction_table(f, 6)]
    )
    book.section(
        "side effects",
        lambda: side_effects(lab, vector, tuned),
        lambda f: [side_effect_table(f, 7)],
    )
    book.section(
        "check",
        lambda: {
            "latents": check_latents(lab, vector, tuned),
            "completeness": check_completeness(lab, vector),
        },
        lambda f: [*check_tables(f["latents"], f["completeness"], 8)],
    )


def provenance(lab: Lab, vector: Tensor, tuned: dict[str, Any]) -> dict[str, Any]:
    """Versions, model, dictionary fingerprints, and every edit as it prints."""
    edits = global_edits(lab, vector, tuned)
    one = lab.sets.harmless_test[:1]
    run = lab.read(one, edits["AS"]).provenance.to_dict()
    return {
        **{name: run[name] for name in ("model", "dtype", "device", "versions")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "direction": sf.Direction(vector, site=lab.sites[0]).fingerprint(),
        "dictionaries": {str(s): f"{d.name} {d.fingerprint()}" for s, d in lab.saes.items()},
        "interventions": {name: repr(edit) for name, edit in edits.items()},
    }
