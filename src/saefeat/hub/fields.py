"""What a file may hold: classes by name, and which kinds of value each of their fields may have.

Nothing outside this table is ever constructed from a file. A new verb or value is one line here:
its class and, for every constructor argument, the kinds it may have. Kinds are ``none``, ``bool``,
``int``, ``number``, ``text``, ``tensor``, ``latents``, ``tokens``, or the name of another form.
Constructors check the rest, so a file cannot make what a call could not.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, NamedTuple

from ..results.readings import Readings
from ..values.patch import Patch
from ..values.resample import Resample
from ..values.schedule import Schedule
from ..verbs.edits import Ablate, Clamp
from ..verbs.probe import Probe
from ..verbs.when import When

FORMAT = "saefeat.intervention"
VERSION = 1
"""Raised when an older reader would misunderstand a file. Every later reader reads every version.

What an older reader only does not know (a new verb, a new field) needs no new number: it meets the
name, refuses, and says that the file is newer.
"""

MAX_STEPS = 65_536
MAX_DICTIONARIES = 65_536
MAX_LATENTS = 2**20
MAX_NAMED = 2**22
"""Latents that all steps name together: a file of a few bytes a step must not take hours."""
MAX_TEXT = 4_096
MAX_SITE = 256
MAX_WIDTH = 2**31


ARGUMENTS = {("When", "latents"): "subject"}
"""(Form, field) → the constructor's argument, where it has another name than the field."""


class Form(NamedTuple):
    """A class that a file may name."""

    cls: type
    kinds: dict[str, tuple[str, ...]]

    def argument(self, name: str) -> str:
        """The constructor's name for a field."""
        return ARGUMENTS.get((self.cls.__name__, name), name)

    def default(self, name: str) -> Any:
        """The constructor's default of a field; fields at their default are not written."""
        found = inspect.signature(self.cls).parameters.get(self.argument(name))
        return None if found is None else found.default


def _form(cls: type, **kinds: str) -> Form:
    return Form(cls, {name: tuple(text.split(" | ")) for name, text in kinds.items()})


_MOVING = "Schedule | Patch | Resample"
_VALUE = f"number | tensor | none | {_MOVING}"
_WHERE = "tokens | none"

FORMS = {
    form.cls.__name__: form
    for form in (
        _form(
            Ablate,
            latents="latents",
            to=f"number | tensor | text | {_MOVING}",
            where=_WHERE,
            when="When | none",
            support="text",
        ),
        _form(
            Clamp,
            latents="latents",
            **dict.fromkeys(("value", "scale", "add", "low", "high"), _VALUE),
            active_only="bool",
            where=_WHERE,
            when="When | none",
            support="text",
        ),
        _form(Probe, latents="latents", where=_WHERE, reduce="text | none"),
        _form(
            When,
            latents="latents",
            scorer="none",  # a Python function is code
            site="none",
            above="number | none",
            below="number | none",
            match="text",
            hold="bool",
        ),
        _form(Schedule, values="tensor", prompt="tensor | none"),
        _form(Patch, readings="Readings"),
        _form(Resample, activations="Readings | tensor", seed="int"),
        _form(
            Readings,
            latents="latents",
            values="tensor",
            mask="tensor",
            **dict.fromkeys(("starts", "counts"), "tensor | none"),
        ),
    )
}
STEPS = ("Ablate", "Clamp", "Probe")
"""Forms that are steps of their own; the others are values of a step's fields."""


def unlisted() -> dict[str, set[str]]:
    """Form → dataclass fields the table forgets: they would be lost without a word."""
    found = {n: {f.name for f in fields(form.cls)} - set(form.kinds) for n, form in FORMS.items()}
    return {name: missing for name, missing in found.items() if missing}


RULES = {
    "all": (),
    "prompt": (),
    "special": (),
    "first": ("count",),
    "last": ("count",),
    "generated": ("start", "stop"),
    "ids": ("ids",),
    "role": ("text",),
    "not": ("rule",),
    "and": ("rule", "rule"),
    "or": ("rule", "rule"),
}
"""Token rules: name → what follows it. ``where`` is a Python function and has no place here."""
