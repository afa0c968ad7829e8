"""A result as a safetensors file: its rows, and what tells its dictionaries from others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..dictionaries.by_site import Dictionaries
from ..dictionaries.excerpt import Excerpt
from ..dictionaries.latents import Dictionary
from ..errors import SaefeatError
from ..files.container import MAX_BYTES, brief, broken, pack, read, refuse, seal, unseal, write
from ..results.provenance import Provenance, versions
from ..text.roles import Marks
from ..text.texts import Texts, flat
from .columns import Columns
from .convergence import Convergence, taken

FORMAT = "saefeat.attribution"
VERSION = 2
"""2 has the provenance."""
PLAIN = ("dictionaries", "texts", "metric", "signed", "provenance", "convergence")
"""Fields of ``Columns`` that are not tensors; every other field is one, or None."""

Result = TypeVar("Result", bound=Columns)


def save(columns: Columns, path: str | Path) -> Path:
    """Write a result whole or not at all; the same result gives the same bytes."""
    names = [field.name for field in fields(columns) if field.name not in PLAIN]
    tensors = {name: getattr(columns, name) for name in names if getattr(columns, name) is not None}
    spec: dict[str, Any] = {"metric": columns.metric, "texts": None}
    spec["dictionaries"] = [_entry(dictionary) for dictionary in columns.dictionaries]
    if not columns.signed:
        spec["signed"] = False
    if columns.provenance is not None:
        spec["provenance"] = columns.provenance.to_dict()
    if columns.convergence is not None:
        tensors |= columns.convergence.tensors()
        spec["convergence"] = {"tolerance": columns.convergence.tolerance}
    texts = columns.texts
    if texts is not None:
        tensors["texts.ids"], tensors["texts.lengths"] = flat(texts.ids)
        roles = None if texts.roles is None else {r: list(m) for r, m in texts.roles.items()}
        words = {str(i): word for i, word in texts.words.items()}
        spec["texts"] = {"words": words, "special": list(texts.special), "roles": roles}
        spec["texts"]["between"] = texts.between
        if texts.lengths is not None:
            spec["texts"]["prompts"] = list(texts.lengths)
    sealed = seal(FORMAT, VERSION, spec, tensors, versions())
    return write(path, pack(sealed, tensors, "Attribution.save"), "Attribution.save")


def _entry(dictionary: Dictionary) -> dict[str, Any]:
    """What a table needs of a dictionary, and what tells it from others."""
    sites = {name: str(getattr(dictionary, name)) for name in ("site", "write_site")}
    plain = {name: getattr(dictionary, name) for name in (*_SIZES, "name")}
    return {**sites, **plain, "fingerprint": dictionary.fingerprint()}


_SIZES = ("d_in", "d_out", "d_sae")


def load(
    cls: type[Result],
    path: str | Path,
    saes: Dictionaries | Iterable[Dictionary] | None,
    max_bytes: int = MAX_BYTES,
) -> Result:
    """Read a result; see ``Attribution.load``."""
    contents = read(path, "Attribution.load", max_bytes)
    function = f"Attribution.load({str(path)!r})"
    spec = unseal(contents, FORMAT, VERSION, function)
    if set(spec) - {"metric", *PLAIN}:
        raise broken(function, f"entries {brief(sorted(spec))}", "those of an Attribution")
    tensors = dict(contents.tensors)
    entries = spec.get("dictionaries")
    if not isinstance(entries, list) or len(entries) > 65_536:
        raise broken(function, f"dictionaries {brief(entries)}", "a list of at most 65,536")
    given = saes.values() if isinstance(saes, Mapping) else saes
    live = None if given is None else list(given)
    dictionaries = tuple(_dictionary(entry, live, function) for entry in entries)
    texts = _texts(spec.get("texts"), tensors, function)
    convergence = _convergence(spec.get("convergence"), tensors, function)
    metric, signed = spec.get("metric"), spec.get("signed", True)
    known = {field.name for field in fields(cls)} - set(PLAIN)
    missing = _REQUIRED - set(tensors)
    plain = isinstance(metric, str) and isinstance(signed, bool)
    if missing or set(tensors) - known or not plain:
        odd = sorted(missing or set(tensors) - known)
        got = f"{'no' if missing else 'an unknown'} {brief(odd)}, metric {brief(metric)}"
        got += f", signed {brief(signed)}"
        raise broken(function, got, "the fields of an Attribution")
    _check(tensors, dictionaries, texts, function)
    if convergence is not None:
        _fits(convergence, len(tensors["clean"]), len(dictionaries), function)
    plain_fields: dict[str, Any] = {"texts": texts, "metric": metric, "signed": signed}
    plain_fields["provenance"] = _provenance(spec.get("provenance"), function)
    plain_fields["convergence"] = convergence
    return cls(dictionaries, **tensors, **plain_fields)


def _provenance(document: Any, function: str) -> Provenance | None:
    """Where the scores come from; files of version 1 do not say."""
    if document is None:
        return None
    try:
        return Provenance.from_dict(document)
    except ValueError as error:
        raise broken(function, f"a provenance of another form ({error})", "its fields") from error


def _convergence(said: Any, tensors: dict[str, Tensor], function: str) -> Convergence | None:
    """Whether the integration converged; takes its tensors out. Older files do not say."""
    tolerance = said.get("tolerance") if isinstance(said, dict) and len(said) == 1 else None
    right = isinstance(tolerance, float) and 0 < tolerance <= 1
    with suppress(KeyError):
        found = taken(tensors, tolerance if right else None)
        if found is None and said is None:
            return None
        if found is not None and right:
            return found
    got = f"convergence {brief(said)}, or not all of its tensors"
    raise broken(function, got, "a tolerance in (0, 1] and four tensors")


def _fits(found: Convergence, prompts: int, dictionaries: int, function: str) -> None:
    """Refuse columns of other shapes."""
    shapes = {"nodes": (prompts,)} | dict.fromkeys(_PAIRS, (prompts, dictionaries))
    for name, shape in shapes.items():
        tensor = getattr(found, name)
        kind = tensor.dtype == torch.int64 if name == "nodes" else tensor.is_floating_point()
        if tuple(tensor.shape) != shape or not kind:
            got = f"convergence.{name} of {tensor.dtype} {list(tensor.shape)}"
            raise broken(function, got, f"{list(shape)}, whole for nodes and floats for the rest")


_PAIRS = ("moved", "disagreement", "gap")
_INDEX = ("prompt", "dictionary", "position", "latent")
_VALUES = ("score", "activation", "change")
_PROMPTS = ("clean", "baseline", "tokens")
_REQUIRED = {*_INDEX, *_VALUES, *_PROMPTS}


def _check(
    tensors: dict[str, Tensor], dictionaries: tuple[Dictionary, ...], texts: Any, function: str
) -> None:
    """Every column as long as the others, and every index within what it points at."""
    n, prompts = tensors["score"].numel(), tensors["clean"].numel()
    shaped: dict[str, tuple[int, ...]] = dict.fromkeys((*_INDEX, *_VALUES), (n,))
    shaped |= dict.fromkeys(_PROMPTS, (prompts,))
    if texts is not None and len(texts.ids) != prompts:
        raise broken(function, f"tokens of {len(texts.ids)} prompts", f"of {prompts}")
    optional = {"ends": (prompts, len(dictionaries)), "dropped": (prompts, 2)}
    shaped |= {name: shape for name, shape in optional.items() if name in tensors}
    if "scored" in tensors:
        shaped["scored"] = (-1 if texts is None else sum(map(len, texts.ids)),)
    for name, shape in shaped.items():
        whole = name in (*_INDEX, "tokens")
        wanted = torch.bool if name == "scored" else torch.int64 if whole else None
        tensor = tensors[name]
        right = tensor.dtype == wanted if wanted else tensor.is_floating_point()
        if tuple(tensor.shape) != shape or not right:
            got = f"{name} of {tensor.dtype} {list(tensor.shape)}"
            raise broken(function, got, f"{list(shape)} of {wanted or 'floats'}")
    width = torch.tensor([d.d_sae for d in dictionaries] or [0])
    long = torch.tensor([len(row) for row in texts.ids] if texts else [2**53] * prompts)
    for name, most in (("prompt", prompts), ("dictionary", len(dictionaries))):
        if n and not (int(tensors[name].min()) >= 0 and int(tensors[name].max()) < most):
            raise broken(function, f"{name} out of range", f"0..{most - 1}")
    bounds = (
        ("latent", 0, width[tensors["dictionary"]]),
        ("position", -1, long[tensors["prompt"]]),
    )
    for name, least, most in bounds if n else ():
        column = tensors[name]
        if bool(((column < least) | (column >= most)).any()):
            raise broken(function, f"{name} out of range", "indices into what the file describes")


def _dictionary(entry: Any, live: list[Dictionary] | None, function: str) -> Dictionary:
    """The live dictionary an entry means, or a stand-in that knows its name and width."""
    keys = {"site", "write_site", *_SIZES, "name", "fingerprint"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise broken(function, f"a dictionary {brief(entry)}", ", ".join(sorted(keys)))
    texts = [entry[key] for key in keys - set(_SIZES)]
    whole = all(type(entry[key]) is int and 0 < entry[key] <= 2**31 for key in _SIZES)
    if not whole or not all(isinstance(text, str) and len(text) <= 4096 for text in texts):
        got = f"a dictionary {brief(entry)}"
        raise broken(function, got, "widths, and names of 4,096 characters")
    if live is None:
        try:
            return Excerpt({}, **entry, excluded=(), origin=None)
        except (SaefeatError, ValueError) as error:
            raise broken(function, f"a dictionary that cannot be ({error})", "a site") from error
    for dictionary in live:
        same_site = str(dictionary.site) == entry["site"]
        if same_site and dictionary.fingerprint() == entry["fingerprint"]:
            return dictionary
    got = f"without the dictionary {brief(entry['name'])} of {entry['site']}"
    got += f", {entry['fingerprint']}"
    wanted = "the dictionaries the scores were made with"
    cause = "another release, width or revision of the SAEs"
    raise refuse(function, got, wanted, cause, "Attribution.load(path), for tables alone", "saes")


def _texts(spec: Any, tensors: dict[str, Tensor], function: str) -> Texts | None:
    """The prompts' tokens; takes their tensors out."""
    ids, sizes = tensors.pop("texts.ids", None), tensors.pop("texts.lengths", None)
    if spec is None and ids is None and sizes is None:
        return None
    needed, others = {"words", "special", "roles"}, {"prompts", "between"}
    right = isinstance(spec, dict) and set(spec) - others == needed
    listed = ids is not None and (ids.dtype, ids.ndim) == (torch.int64, 1)
    if spec is None or ids is None or sizes is None or not (right and listed):
        raise broken(function, "tokens of another form", "texts with ids and lengths")
    good = sizes.dtype == torch.int64 and sizes.ndim == 1 and bool((sizes >= 0).all())
    if not good or int(sizes.double().sum()) != len(ids):
        raise broken(function, "lengths that do not add up", f"{len(ids)} tokens")
    rows = tuple(tuple(row.tolist()) for row in ids.split(sizes.tolist())) if len(sizes) else ()
    words, special, roles = (spec[name] for name in ("words", "special", "roles"))
    lengths = _lengths(spec.get("prompts"), rows, function)
    try:
        named = {int(i): word for i, word in words.items()}
        marks = roles if roles is None else {r: _marks(m) for r, m in roles.items()}
        good = all(isinstance(word, str) for word in named.values())
        good = good and isinstance(special, list) and all(type(i) is int for i in special)
        # Older files do not say; whole words are what holds no space of its own.
        spaced = any(word.startswith(" ") for word in named.values())
        between = spec.get("between", "" if spaced else " ")
        good = good and between in ("", " ")
    except (AttributeError, LookupError, TypeError, ValueError):
        good, named, marks, between = False, {}, None, ""
    if not good:
        raise broken(function, "words, special tokens or roles of another form", "ids and texts")
    return Texts(rows, named, tuple(special), marks, lengths, between)


def _lengths(
    given: Any, rows: tuple[tuple[int, ...], ...], function: str
) -> tuple[int, ...] | None:
    """How many of each row's tokens are the prompt's."""
    if given is None:
        return None
    listed = isinstance(given, list) and len(given) == len(rows)
    if listed and all(
        type(n) is int and 0 <= n <= len(row) for n, row in zip(given, rows, strict=True)
    ):
        return tuple(given)
    raise broken(function, f"prompts of lengths {brief(given)}", "no more than each row's tokens")


def _marks(pair: Any) -> Marks:
    """The runs of ids that open and close a role's turns; older files have one of each."""
    before, after = ([side] if type(side[0]) is int else side for side in pair)
    if not all(type(i) is int for run in (*before, *after) for i in run):
        raise TypeError("ids")
    return tuple(map(tuple, before)), tuple(map(tuple, after))
