"""An intervention as a JSON document with tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..dictionaries.direction import Direction, Neurons
from ..dictionaries.excerpt import WHOLE, Excerpt, shapes
from ..dictionaries.latents import Dictionary, Latents
from ..errors import FileError
from ..files.container import MAX_DEPTH, depth, refuse
from ..text.tokens import Tokens
from ..values.declared import same
from ..verbs.base import Chain, Intervention
from .fields import FORMS, MAX_LATENTS, MAX_NAMED, MAX_SITE, MAX_TEXT, RULES, STEPS


def cannot(got: str, wanted: str, cause: str, call: str) -> FileError:
    """The error for what a file cannot hold."""
    return refuse("save", got, wanted, cause, call, "intervention")


class Writer:
    """Collects dictionaries, selections and tensors while steps are written, in order."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._dictionaries: dict[int, tuple[int, Dictionary]] = {}
        self._selections: list[dict[tuple[int, ...], int]] = []
        self._named = 0

    def intervention(self, intervention: Intervention) -> dict[str, Any]:
        """The part of the document that says what is done, tensors aside."""
        steps = [self.form(step, STEPS, repr(type(step).__name__)) for step in intervention.parts()]
        dictionaries = [
            self._dictionary(number, dictionary)
            for number, dictionary in self._dictionaries.values()
        ]
        chain = isinstance(intervention, Chain)
        spec = {"chain": chain, "steps": steps, "dictionaries": dictionaries}
        sizes = [len(group) for group in intervention.groups()]
        # an older reader refuses a name that it does not know, and says that the file is newer
        return spec | ({"joint": sizes} if any(size > 1 for size in sizes) else {})

    def form(self, value: object, allowed: tuple[str, ...], what: str) -> dict[str, Any]:
        """An instance of a listed class: its name, and its fields that differ from the default."""
        name = type(value).__name__
        form = FORMS.get(name)
        if form is None or form.cls is not type(value) or name not in allowed:
            raise cannot(
                f"one with {what}: a {type(value).__module__}.{name}",
                "one of " + ", ".join(n for n in allowed if n in FORMS),
                "a class that a file has no name for",
                "save the steps that have one, and make the others in code",
            )
        defaults, written = form.defaults(), {}
        for field, kinds in form.kinds.items():
            given = getattr(value, field)
            if not same(given, defaults[field]):
                written[field] = self.value(given, kinds, f"{name}({field}=...)")
        return {"form": name, "fields": written}

    def value(self, value: Any, kinds: tuple[str, ...], what: str) -> Any:
        """A field's value in JSON, if it is of a kind the field may have."""
        kind = kind_of(value)
        if kind == "int" and "int" not in kinds:
            kind = "number"
        if kind not in kinds:
            wanted = "one of " + ", ".join(kinds)
            raise cannot(f"one with {what}: {kind}", wanted, "a value made in code", "a plain one")
        if kind == "tensor":
            name = f"values.{sum(n.startswith('values.') for n in self.tensors)}"
            self.tensors[name] = sound(value, name, what)
            return {"tensor": name}
        if kind == "latents":
            return {"span" if value.written == "span" else "latents": self._latents(value)}
        if kind == "tokens":
            if depth(value.rule) > MAX_DEPTH - 10:  # what stands around it nests too
                most, call = f"at most {MAX_DEPTH} levels", "Tokens.ids(*ids), not a | b | c"
                got = f"one with {what}: a rule nested too deeply"
                raise cannot(got, most, "a rule built in a loop", call)
            return {"tokens": rule(value.rule, what)}
        if kind == "number":
            return number(value, what)
        if kind == "text" and len(value) > MAX_TEXT:
            most = f"at most {MAX_TEXT} characters"
            raise cannot(f"one with {what}: a long text", most, "no mere name", "cut it")
        return self.form(value, kinds, what) if kind in FORMS else value

    def _latents(self, latents: Latents) -> list[list[int]]:
        """[dictionary, selection] for each part; equal selections are written once."""
        if latents.written == "reselect":
            cause = "which latents enter the selection depends on all of the dictionary"
            call = "make the edit in code, with the dictionary"
            raise cannot(f"one of {latents!r}", "latents without reselect()", cause, call)
        found = []
        for basis, indices in latents.parts:
            self._named += len(indices)
            if len(indices) > MAX_LATENTS or self._named > MAX_NAMED:
                most = f"at most {MAX_LATENTS:,} of one dictionary, {MAX_NAMED:,} in all steps"
                call = "save the steps in files of their own"
                raise cannot(f"one of {self._named:,} latents", most, "whole dictionaries", call)
            if id(basis) not in self._dictionaries:
                entry = (len(self._dictionaries), basis)
                self._dictionaries[id(basis)] = entry
                self._selections.append({})
            place = self._dictionaries[id(basis)][0]
            selections = self._selections[place]
            found.append([place, selections.setdefault(tuple(indices), len(selections))])
        return found

    def _dictionary(self, number: int, dictionary: Dictionary) -> dict[str, Any]:
        """A dictionary's entry, its tensors put aside."""
        selections = list(self._selections[number])
        longest = max(len(str(dictionary.site)), len(str(dictionary.write_site)))
        if longest > MAX_SITE:
            most = f"at most {MAX_SITE} characters"
            raise cannot(f"one at {dictionary.site}", most, "a deeply nested module", "rename it")
        entry = {
            "site": str(dictionary.site),
            "name": label(dictionary.name),
            "selections": [{"latents": list(indices)} for indices in selections],
        }
        bare = not dictionary.excluded and dictionary.origin is None
        if bare and type(dictionary) is Neurons:
            return {"kind": "neurons", "width": dictionary.d_in, **entry}
        if bare and type(dictionary) is Direction:
            rows = dictionary.vectors
            self.tensors[f"dictionaries.{number}.rows"] = sound(rows, "rows", repr(dictionary))
            return {"kind": "direction", "fingerprint": dictionary.fingerprint(), **entry}
        excerpt = cut(dictionary, selections)
        columns = [excerpt._selections[indices] for indices in selections]
        self._columns(number, columns, repr(dictionary))
        skips = excerpt.excluded
        excluded = {"tokens": rule(skips.rule, "excluded")} if isinstance(skips, Tokens) else skips
        return {
            **entry,
            **{k: v for k, v in columns[0].items() if not isinstance(v, Tensor)},
            "kind": "excerpt",
            "write_site": str(excerpt.write_site),
            "d_in": excerpt.d_in,
            "d_out": excerpt.d_out,
            "d_sae": excerpt.d_sae,
            "excluded": list(excluded) if isinstance(excluded, tuple) else excluded,
            "origin": source(excerpt.origin),
            "fingerprint": label(excerpt.fingerprint()),
            **({"centered": True} if excerpt.centered else {}),
        }

    def _columns(self, number: int, selections: list[dict[str, Any]], what: str) -> None:
        """Each selection's tensors; those that hold every latent once for all selections."""
        for n, columns in enumerate(selections):
            for name, shape in shapes(columns).items():
                shared = columns["activation"] in WHOLE and "k" not in shape
                key = (
                    f"dictionaries.{number}.{name}"
                    if shared
                    else f"dictionaries.{number}.{n}.{name}"
                )
                self.tensors[key] = sound(columns[name], name, what)


def kind_of(value: object) -> str:
    """The kind of a value, as ``fields`` names kinds."""
    plain = {bool: "bool", int: "int", float: "number", str: "text", type(None): "none"}
    if type(value) in plain:
        return plain[type(value)]
    classes: tuple[tuple[type, str], ...] = (
        (Tensor, "tensor"),
        (Latents, "latents"),
        (Tokens, "tokens"),
    )
    return next((name for cls, name in classes if isinstance(value, cls)), type(value).__name__)


def number(value: float, what: str) -> Any:
    """A float as JSON has it, which has no infinity."""
    if math.isnan(value):
        raise cannot(f"one with {what}: NaN", "a number", "a threshold from no data", "measure it")
    return value if math.isfinite(value) else {"infinite": 1 if value > 0 else -1}


def rule(found: tuple, what: str) -> list[Any]:
    """A token rule as a list: its name, then its arguments."""
    kind, *rest = found
    if kind not in RULES:
        function = getattr(rest[0], "__name__", "a function") if rest else kind
        got = f"one with {what}: Tokens.{kind}({function})"
        call = "Tokens.ids, .role, .first, .last, .generated and their combinations"
        raise cannot(got, "a rule that is data", "a Python function is code", call)
    if kind == "role" and len(rest[0]) > MAX_TEXT:
        most = f"at most {MAX_TEXT} characters"
        raise cannot(f"one with {what}: a long role", most, "a text, not its role", "cut it")
    return [
        kind,
        *(
            rule(part, what)
            if isinstance(part, tuple) and kind != "ids"
            else list(part)
            if isinstance(part, tuple)
            else part
            for part in rest
        ),
    ]


def cut(dictionary: Dictionary, selections: list[tuple[int, ...]]) -> Excerpt:
    """The excerpt of a dictionary that these selections need."""
    activation = dictionary.columns(torch.tensor(selections[0][:1]))["activation"]
    if isinstance(activation, str):
        return Excerpt.of(dictionary, selections)
    raise cannot(
        f"one with {dictionary!r}, whose encoder is a Python function",
        "a dictionary made of tensors",
        "a file holds no code",
        "an SAE, Direction or Neurons; or save the directions alone, as a Direction",
    )


def sound(tensor: Tensor, name: str, what: str) -> Tensor:
    """A tensor without NaN, infinite at most where a threshold is."""
    bad = tensor.isnan() if name == "threshold" else ~tensor.isfinite()
    if bool(bad.any()):
        got = f"one with {what}: {name} with a NaN or infinity"
        raise cannot(got, "finite values", "a broken download or training run", "check it")
    return tensor


def label(text: str) -> str:
    """A name, cut to the length a file may hold."""
    return str(text)[:MAX_TEXT]


def source(origin: Any) -> str | None:
    """Where a dictionary came from, without the folders of the machine it was loaded on."""
    if origin is None or isinstance(origin, str):
        return origin
    if getattr(origin, "repo", None) is None and hasattr(origin, "layout"):
        return label(f"{origin.id} ({origin.layout})")
    return label(str(origin))
