"""What a file may hold: a list of classes, and the kinds of value their fields may have.

Nothing outside ``FORMS`` is ever constructed from a file. The kinds are read off the fields'
annotations, so a new argument of a verb is written down in its class and nowhere else. Kinds are
``none``, ``bool``, ``int``, ``number``, ``text``, ``tensor``, ``latents``, ``tokens``, or the name
of another form; a site and a function have none. Constructors check the rest, so a file cannot
make what a call could not.
"""

from __future__ import annotations

from dataclasses import fields
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from torch import Tensor

from ..dictionaries.latents import Latents
from ..results.readings import Readings
from ..text.tokens import Tokens
from ..values.base import Value
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

FACTS = ("family", "d_model", "layers", "vocab")
"""What a file says of the model it was made on, beside its name and revision."""

MAX_STEPS = 65_536
MAX_DICTIONARIES = 65_536
MAX_LATENTS = 2**20
MAX_NAMED = 2**22
"""Latents that all steps name together: a file of a few bytes a step must not take hours."""
MAX_TEXT = 4_096
MAX_SITE = 256
MAX_WIDTH = 2**31

STEPS = ("Ablate", "Clamp", "Probe")
"""Forms that are steps; the others are values of a step's fields."""

_CLASSES: tuple[type, ...] = (Ablate, Clamp, Probe, When, Schedule, Patch, Resample, Readings)
_KINDS: dict[object, tuple[str, ...]] = {
    float: ("number",),
    Tensor: ("tensor",),
    str: ("text",),
    bool: ("bool",),
    int: ("int",),
    Latents: ("latents",),
    Tokens: ("tokens",),
    When: ("When",),
    Value: ("Schedule", "Patch", "Resample"),
    Readings: ("Readings",),
    NoneType: ("none",),
}
"""Type in an annotation → what it is called in a file."""


class Form(NamedTuple):
    """A class that a file may name, and the kinds of each of its fields."""

    cls: type
    kinds: dict[str, tuple[str, ...]]

    def defaults(self) -> dict[str, Any]:
        """Field → its default; fields at their default are not written."""
        return {field.name: field.default for field in fields(self.cls)}


def _form(cls: type) -> Form:
    hints = get_type_hints(cls, localns={"Latents": Latents})  # ``Readings`` imports it for types
    kinds = {}
    for field in fields(cls):
        hint = hints[field.name]
        types = get_args(hint) or (hint,)
        kinds[field.name] = tuple(kind for one in types for kind in _KINDS.get(one, ()))
    return Form(cls, kinds)


FORMS = {cls.__name__: _form(cls) for cls in _CLASSES}

RULES = {
    "all": (),
    "prompt": (),
    "special": (),
    "first": ("count",),
    "last": ("count",),
    "positions": ("start", "stop"),
    "generated": ("start", "stop"),
    "ids": ("ids",),
    "role": ("text",),
    "not": ("rule",),
    "and": ("rule", "rule"),
    "or": ("rule", "rule"),
}
"""Token rules: name → what follows it. ``where`` is a Python function and has no place here."""
