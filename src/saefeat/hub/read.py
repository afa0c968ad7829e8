"""A document with tensors as an intervention; nothing is built that ``fields`` does not list."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..dictionaries.direction import Direction, Neurons
from ..dictionaries.excerpt import PLAIN, WHOLE, Excerpt, shapes
from ..dictionaries.latents import Dictionary, Latents
from ..errors import FileError, SaefeatError
from ..files.container import brief, broken, later, natural, only
from ..model.sites import Site
from ..results.readings import Readings
from ..text.tokens import Tokens
from ..verbs.base import Chain, Intervention, Joint
from . import fields
from .fields import FORMS, RULES, STEPS
from .write import kind_of

EVERY = ("kind", "site", "name", "selections")
ENTRIES = {
    "neurons": ("width",),
    "direction": ("fingerprint",),
    "excerpt": (
        *("write_site", "d_in", "d_out", "d_sae", "excluded", "origin", "fingerprint"),
        *PLAIN,
    ),
}
"""What an entry of ``dictionaries`` has: of any kind, and of each."""


class Reader:
    """Builds dictionaries first, then the steps that select from them."""

    def __init__(self, spec: dict[str, Any], tensors: Mapping[str, Tensor], function: str) -> None:
        self.spec, self.function = spec, function
        self._tensors, self._used = tensors, set[str]()
        self._named = 0
        only(spec, ("chain", "steps", "dictionaries", "model", "joint"), function, "a spec")
        entries = self._listed(spec.get("dictionaries"), "dictionaries", fields.MAX_DICTIONARIES)
        self._selections: list[list[tuple[int, ...]]] = []
        self._dictionaries = [self._dictionary(n, e) for n, e in enumerate(entries)]

    def intervention(self) -> Intervention:
        """The intervention itself; anything the format does not allow is refused."""
        entries = self._listed(self.spec.get("steps"), "steps", fields.MAX_STEPS)
        steps: list[Any] = [self.form(entry, STEPS) for entry in entries]
        unused = sorted(set(self._tensors) - self._used)
        if unused:
            raise self._broken(f"a tensor {brief(unused[0])} nothing names", "only those used")
        links = self._joined(steps)
        if not isinstance(self.spec.get("chain"), bool) or not (
            self.spec["chain"] or len(links) == 1
        ):
            raise self._broken(f"{len(steps)} steps without a chain", "one step, or a chain")
        return Chain(tuple(links)) if self.spec["chain"] else links[0]

    def _joined(self, steps: list[Any]) -> list[Any]:
        """The steps, those that act at once as one."""
        sizes = self.spec.get("joint", [1] * len(steps))
        whole = isinstance(sizes, list) and all(type(n) is int and n >= 1 for n in sizes)
        if not whole or sum(sizes) != len(steps):
            wanted = f"how many of the {len(steps)} steps act at once, in order"
            raise self._broken(f"joint {brief(sizes)}", wanted)
        rest = iter(steps)
        groups = [tuple(islice(rest, size)) for size in sizes]
        return [g[0] if len(g) == 1 else self._build(Joint, {"steps": g}, "Joint") for g in groups]

    def made_on(self) -> dict[str, Any] | None:
        """What the file says of the model it was made on."""
        if self.spec.get("model") is None:
            return None
        found = self._record(self.spec["model"], "model")
        texts = (found.get("family"), found.get("name"), found.get("revision") or "")
        short = all(isinstance(value, str) and len(value) <= fields.MAX_TEXT for value in texts)
        whole = all(type(found.get(name)) is int for name in fields.FACTS[1:])
        if set(found) != {*fields.FACTS, "name", "revision"} or not whole or not short:
            raise self._broken(f"a model {brief(found)}", "family, shape, name and revision")
        return found

    def form(self, entry: object, allowed: tuple[str, ...]) -> Any:
        """One listed class, built by its constructor."""
        entry = self._record(entry, "a form")
        only(entry, ("form", "fields"), self.function, "a form")
        name, given = entry.get("form"), self._record(entry.get("fields"), "fields")
        form = FORMS.get(name) if isinstance(name, str) and name in allowed else None
        unknown = [] if form is None else sorted(set(given) - set(form.kinds))
        if form is None or unknown:
            got = f"{brief(name)} with {brief(unknown[0])}" if unknown else f"a {brief(name)}"
            known = ", ".join(n for n in allowed if n in FORMS)
            raise later(self.function, got, f"one of {known} and their arguments")
        values = {
            field: self.value(value, form.kinds[field], f"{name}({field}=...)")
            for field, value in given.items()
        }
        built = self._build(form.cls, values, form.cls.__name__)
        if isinstance(built, Readings):
            self._sound(built)
        return built

    def _sound(self, found: Readings) -> None:
        """Refuse readings whose tensors do not fit each other; ``Readings`` itself checks none."""
        values, mask, starts, counts = found.values, found.mask, found.starts, found.counts
        fits = values.ndim == 3 and values.shape[-1] == len(found.latents)
        fits = fits and mask.shape == values.shape and mask.dtype == torch.bool
        if starts is not None:
            fits = fits and starts.shape == values.shape[:1] and starts.dtype == torch.int64
            fits = fits and bool(((starts >= 0) & (starts <= values.shape[1])).all())
        if counts is not None:
            fits = fits and counts.shape == values.shape and values.shape[1] == 1
            fits = fits and not counts.is_complex() and bool((counts >= 0).all())
        if not fits or not values.is_floating_point():
            sizes = [list(t.shape) for t in (values, mask, starts, counts) if t is not None]
            wanted = (
                "values and mask [prompts, tokens, latents], starts [prompts] within them,"
                " counts as values"
            )
            raise self._broken(f"readings of shapes {sizes}", wanted)

    def value(self, value: object, kinds: tuple[str, ...], what: str) -> Any:
        """A field's value, of a kind the field may have."""
        kind, found = self._value(value, kinds)
        if kind not in kinds and not (kind == "int" and "number" in kinds):
            raise self._broken(f"{kind} {brief(value)} for {what}", "one of " + ", ".join(kinds))
        return found

    def _value(self, value: object, kinds: tuple[str, ...]) -> tuple[str, Any]:
        if not isinstance(value, dict):
            return kind_of(value), value
        if set(value) == {"form", "fields"}:
            found = self.form(value, kinds)
            return type(found).__name__, found
        kind, inner = next(iter(value.items())) if len(value) == 1 else ("object", None)
        if kind == "tensor":
            return kind, self._tensor(inner)
        if kind in ("latents", "span"):
            return "latents", self._latents(inner, "span" if kind == "span" else "frozen")
        if kind == "tokens":
            return kind, Tokens(self._rule(inner))
        if kind == "infinite" and type(inner) is int and abs(inner) == 1:
            return "number", inner * math.inf
        return brief(kind), None

    def _rule(self, given: object) -> tuple:
        """A token rule, as the methods of ``Tokens`` would have made it."""
        rule = given if isinstance(given, list) else []
        kind = rule[0] if rule else None
        wanted = RULES.get(kind) if isinstance(kind, str) else None
        if wanted is None or len(rule) != 1 + len(wanted):
            known = ", ".join(RULES)
            raise self._broken(f"a token rule {brief(given)}", f"one of {known}")
        checks = {
            "count": lambda n: natural(n) and n >= 1,
            "start": natural,
            "stop": lambda n: n is None or natural(n),
            "ids": lambda ids: isinstance(ids, list) and all(map(natural, ids)),
            "text": lambda text: isinstance(text, str) and len(text) <= fields.MAX_TEXT,
            "rule": lambda rule: isinstance(rule, list),
        }
        for need, part in zip(wanted, rule[1:], strict=True):
            if not checks[need](part):
                raise self._broken(f"{brief(part)} in Tokens.{kind}", need)
        if kind == "positions":
            self._build(Tokens.positions, dict(zip(wanted, rule[1:], strict=True)), "a token rule")
        inner = {"rule": self._rule, "ids": tuple}
        parts = zip(wanted, rule[1:], strict=True)
        return (kind, *(inner[need](part) if need in inner else part for need, part in parts))

    def _latents(self, found: object, written: str) -> Latents:
        """The selections that [dictionary, selection] pairs name."""
        parts, seen = [], set()
        for pair in self._listed(found, "latents", fields.MAX_DICTIONARIES):
            known = isinstance(pair, list) and len(pair) == 2 and all(map(natural, pair))
            if not known or pair[0] >= len(self._dictionaries):
                raise self._broken(f"latents of {brief(pair)}", "[dictionary, selection]")
            dictionary, selections = self._dictionaries[pair[0]], self._selections[pair[0]]
            if pair[1] >= len(selections):
                raise self._broken(f"selection {pair[1]}", f"fewer than {len(selections)}")
            indices = selections[pair[1]]
            self._named += len(indices)
            if self._named > fields.MAX_NAMED:
                most = f"at most {fields.MAX_NAMED:,} in all steps together"
                raise self._broken(f"{self._named:,} latents", most)
            if not seen.isdisjoint((pair[0], i) for i in indices):
                raise self._broken(f"a latent of {dictionary.site} twice", "each once")
            seen.update((pair[0], i) for i in indices)
            parts.append((dictionary, indices))
        return Latents(tuple(parts), written)

    def _dictionary(self, number: int, entry: object) -> Dictionary:
        """One entry of ``dictionaries``, and the selections made from it."""
        entry = self._record(entry, f"dictionary {number}")
        selections = [
            self._indices(item)
            for item in self._listed(entry.get("selections"), "selections", 2**16)
        ]
        if len(set(selections)) != len(selections):
            raise self._broken(f"a selection of dictionary {number} twice", "each once")
        self._selections.append(selections)
        kind, name = entry.get("kind"), self._text(entry.get("name"), "name")
        known = ENTRIES.get(kind, entry) if isinstance(kind, str) else entry
        only(entry, (*EVERY, *known), self.function, f"dictionary {number}")
        site = self._site(entry.get("site"))
        if kind == "neurons":
            width = self._size(entry.get("width"), "width")
            found: Dictionary = self._build(Neurons, {"site": site, "width": width}, "neurons")
        elif kind == "direction":
            rows = self._tensor(f"dictionaries.{number}.rows", finite=True)
            if not rows.is_floating_point() or rows.ndim != 2:
                raise self._broken(f"rows of {rows.dtype} {list(rows.shape)}", "[k, d] floats")
            given = {"rows": rows, "site": site, "name": name}
            found = self._build(Direction.orthonormal, given, "direction")
        elif kind == "excerpt":
            return self._excerpt(number, entry, selections, site, name)
        else:
            wanted = "excerpt, direction or neurons"
            raise self._broken(f"a dictionary of kind {brief(kind)}", wanted)
        for indices in selections:
            self._build(found.latents, {"indices": indices}, f"dictionary {number}")
        return found

    def _excerpt(
        self, number: int, entry: dict, selections: list[tuple[int, ...]], site: Site, name: str
    ) -> Dictionary:
        """A dictionary of which only some columns are here."""
        plain = {k: entry[k] for k in PLAIN if k in entry}
        centered = plain.get("centered", False)
        if plain.get("activation") != "error":  # there the encoder has it folded in
            plain.pop("centered", None)
        named = self._build(shapes, {"columns": plain}, f"dictionary {number}")
        columns = {}
        for n, indices in enumerate(selections):
            columns[indices] = dict(plain)
            for key, shape in named.items():
                shared = plain["activation"] in WHOLE and "k" not in shape
                path = f"dictionaries.{number}" + (f".{key}" if shared else f".{n}.{key}")
                tensor = self._tensor(path, finite=key != "threshold")
                if tensor.dtype not in (torch.float32, torch.float64):
                    raise self._broken(f"{path} of {tensor.dtype}", "float32 or float64")
                columns[indices][key] = tensor
        origin, excluded = entry.get("origin"), entry.get("excluded")
        if isinstance(excluded, list) and all(map(natural, excluded)):
            excluded = tuple(excluded)
        elif isinstance(excluded, dict) and set(excluded) == {"tokens"}:
            excluded = Tokens(self._rule(excluded["tokens"]))
        elif excluded != "special":
            wanted = '"special", token ids or a token rule'
            raise self._broken(f"excluded {brief(excluded)}", wanted)
        given = {
            "selections": columns,
            "site": site,
            "write_site": self._site(entry.get("write_site")),
            "name": name,
            "excluded": excluded,
            "origin": None if origin is None else self._text(origin, "origin"),
            "fingerprint": self._text(entry.get("fingerprint"), "fingerprint"),
        }
        if type(centered) is not bool:
            raise self._broken(f"centered {brief(centered)}", "true or false")
        given["centered"] = centered
        sizes = {k: self._size(entry.get(k), k) for k in ("d_in", "d_out", "d_sae")}
        return self._build(Excerpt, given | sizes, f"dictionary {number}")

    def _site(self, name: object) -> Site:
        return self._build(Site.parse, {"name": self._text(name, "site", fields.MAX_SITE)}, "site")

    def _indices(self, found: object) -> tuple[int, ...]:
        found = self._record(found, "a selection")
        only(found, ("latents",), self.function, "a selection")
        indices = self._listed(found.get("latents"), "a selection", fields.MAX_LATENTS)
        if not indices or not all(natural(i) and i < fields.MAX_WIDTH for i in indices):
            raise self._broken(f"latents {brief(indices)}", "whole numbers, at least one")
        return tuple(indices)

    def _tensor(self, name: object, finite: bool = False) -> Tensor:
        """A tensor of the file by name, without NaN."""
        if not isinstance(name, str) or name not in self._tensors:
            raise self._broken(f"no tensor {brief(name)}", "every tensor that is named")
        self._used.add(name)
        tensor = self._tensors[name]
        bad = ~tensor.isfinite() if finite else tensor.isnan()
        if bool(bad.any()):
            raise self._broken(f"NaN or infinity in {brief(name)}", "finite values")
        return tensor

    def _build(self, make: Callable[..., Any], given: dict[str, Any], what: str) -> Any:
        """A constructor's call; what it refuses is this file's fault."""
        try:
            return make(**given)
        except (SaefeatError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            if isinstance(error, FileError):
                raise
            raise self._broken(
                f"{what} that cannot be ({str(error)[:400]})", "what code could make"
            ) from error

    def _record(self, value: object, what: str) -> dict[str, Any]:
        """A JSON object."""
        if isinstance(value, dict):
            return value
        raise self._broken(f"{what} that is {brief(value)}", "a JSON object")

    def _listed(self, value: object, what: str, most: int) -> list[Any]:
        """A JSON list of bounded length."""
        if isinstance(value, list) and len(value) <= most:
            return value
        got = f"{len(value):,} of them" if isinstance(value, list) else brief(value)
        raise self._broken(f"{what}: {got}", f"a list of at most {most:,}")

    def _text(self, value: object, what: str, most: int = fields.MAX_TEXT) -> str:
        """A JSON string of bounded length."""
        if isinstance(value, str) and len(value) <= most:
            return value
        raise self._broken(f"{what} {brief(value)}", f"at most {most} characters")

    def _size(self, value: object, what: str) -> int:
        """A width."""
        if natural(value) and 1 <= value <= fields.MAX_WIDTH:
            return value
        raise self._broken(f"{what} {brief(value)}", f"a whole number in 1..{fields.MAX_WIDTH}")

    def _broken(self, got: str, wanted: str) -> FileError:
        return broken(self.function, got, wanted)
