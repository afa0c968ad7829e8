"""Latents: an immutable selection of latents from one or more dictionaries.

Attribution, search and set arithmetic return Latents; edits and probes take them. So
attribute → ablate → probe is a loop over one kind of value.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import eq
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import one_of
from ..errors import LatentError
from ..hashing import digest
from ..model.requests import in_requests, stay_here
from ..model.sites import Site


class Basis(Protocol):
    """What a selection needs to know of a dictionary."""

    @property
    def site(self) -> Site: ...

    @property
    def d_sae(self) -> int: ...

    def fingerprint(self, indices: Iterable[int] | Tensor | None = None) -> str: ...


WRITTEN = ("frozen", "reselect", "span")
"""How an edit of a selection is written; see ``Latents``."""


@dataclass(frozen=True)
class Latents:
    """Latents of one or more dictionaries, in a fixed order. Prints what it selects.

    Build it with ``dictionary.latents([...])`` or ``saes.latents({site: [...]})``; combine with
    ``|`` (union, keeping order), ``&`` and ``-``. Iterating gives ``(site, index)`` pairs in the
    order in which per-latent values are read.

    A selection also says what an edit of it writes. By default the change of these latents alone,
    with all others as they were (``frozen``); see ``span`` and ``reselect``. Selections that are
    written differently do not combine.

    Examples:
        >>> a = sf.Direction(torch.eye(4)[0], site="resid_post.1").latents()
        >>> b = sf.Direction(torch.eye(4)[1], site="resid_post.2").latents()
        >>> a | b
        Latents(2: resid_post.1 [0], resid_post.2 [0])
        >>> len((a | b) - a)
        1
    """

    parts: tuple[tuple[Basis, Sequence[int]], ...]
    written: str = "frozen"

    def __post_init__(self) -> None:
        one_of("Latents", "written", self.written, WRITTEN, error=LatentError)
        parts = tuple((basis, _compact(basis, indices)) for basis, indices in self.parts)
        object.__setattr__(self, "parts", parts)

    @classmethod
    def of(cls, dictionary: Basis, indices: Iterable[int] | Tensor) -> Latents:
        """Select latents of one dictionary.

        Raises:
            LatentError: for an index that is negative, out of range, repeated or not whole.
        """
        if isinstance(indices, range) and indices == range(dictionary.d_sae):
            return cls(((dictionary, range(dictionary.d_sae)),))
        found = _listed(dictionary, indices)
        _check(dictionary, found)
        return cls(((dictionary, tuple(found)),) if found else ())

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self.parts)

    def __iter__(self) -> Iterator[tuple[Site, int]]:
        return ((basis.site, index) for basis, indices in self.parts for index in indices)

    def __or__(self, other: Latents) -> Latents:
        table = self._table()
        for basis, indices in other._table().items():
            table.setdefault(basis, {}).update(indices)
        return Latents(_rows(table), self._written_with(other))

    def __and__(self, other: Latents) -> Latents:
        theirs = other._table()
        both = {
            b: {i: None for i in ix if i in theirs.get(b, {})} for b, ix in self._table().items()
        }
        return Latents(_rows(both), self._written_with(other))

    def __sub__(self, other: Latents) -> Latents:
        theirs = other._table()
        rest = {
            b: {i: None for i in ix if i not in theirs.get(b, {})}
            for b, ix in self._table().items()
        }
        return replace(self, parts=_rows(rest))

    def __repr__(self) -> str:
        shown = [f"{b.site} [{_brief(ix)}]" for b, ix in self.parts[:6]]
        more = f", and {len(self.parts) - 6} more sites" if len(self.parts) > 6 else ""
        listed = f": {', '.join(shown)}{more}" if shown else ""
        written = "" if self.written == "frozen" else f".{self.written}()"
        return f"Latents({len(self)}{listed}){written}"

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites selected from, in order, once each."""
        return tuple(dict.fromkeys(basis.site for basis, _ in self.parts))

    def fingerprint(self) -> str:
        """A short hash of what these latents are computed from, their numbers, and ``written``."""
        parts = [(basis.fingerprint(indices), list(indices)) for basis, indices in self.parts]
        return digest(parts, self.written)

    def span(self) -> Latents:
        """These latents, written as the span of their directions: for ``Ablate``.

        An edit then takes x's whole part in the span away, at tokens where no latent is active
        too, and of several dictionaries that write at one site together.

        Examples:
            >>> sf.Ablate(sf.Neurons("resid_post.1", 8).latents([2, 3]).span())
            Ablate(Latents(2: resid_post.1 [2, 3]).span())
        """
        return replace(self, written="span")

    def reselect(self) -> Latents:
        """These latents, written before a topk dictionary selects its k largest.

        Others then take the places that become free, and all that changes is written: for
        ``Ablate`` and ``Clamp`` of a topk or abstopk dictionary.
        """
        return replace(self, written="reselect")

    def singles(self) -> tuple[Latents, ...]:
        """Each latent as a selection of its own, in order: to try them one by one."""
        pairs = [(basis, (i,)) for basis, indices in self.parts for i in indices]
        return tuple(replace(self, parts=(pair,)) for pair in pairs)

    def at(self, site: Site | str) -> Latents:
        """Only the latents read at this site; empty if there are none."""
        wanted = Site.parse(site)
        return replace(self, parts=tuple(part for part in self.parts if part[0].site == wanted))

    def sample(self, n: int, *, seed: int) -> Latents:
        """n latents drawn without replacement: the raw material of a random control.

        Raises:
            LatentError: if fewer than n are selected.
        """
        pairs = [(basis, index) for basis, indices in self.parts for index in indices]
        if n > len(pairs):
            raise LatentError(
                f"Latents.sample: `n` is {n}, wanted at most {len(pairs)}, the latents selected."
                " Likely cause: the control is drawn from too small a set. Try: draw from"
                " dictionary.latents(), all latents"
            )
        table: Table = {}
        for basis, index in sorted(
            random.Random(seed).sample(pairs, n), key=lambda pair: (pair[0].site.order, pair[1])
        ):
            table.setdefault(basis, {})[index] = None
        return replace(self, parts=_rows(table))

    def to_dict(self) -> dict[str, list[int]]:
        """Plain data, for a report: site → indices."""
        found: dict[str, list[int]] = {}
        for site, index in self:
            found.setdefault(str(site), []).append(index)
        return found

    def _table(self) -> Table:
        table: Table = {}
        for basis, indices in self.parts:
            table.setdefault(basis, {}).update(dict.fromkeys(indices))
        return table

    def _written_with(self, other: Latents) -> str:
        """How two selections together are written; an empty one has no say.

        Raises:
            LatentError: where they differ.
        """
        ways = {latents.written for latents in (self, other) if latents.parts}
        if len(ways) < 2:
            return next(iter(ways), "frozen")
        raise LatentError(
            f"Latents: `latents` is {self!r} with {other!r}, wanted selections that are written in"
            " the same way. Likely cause: one verb writes all its latents in one way. Try:"
            " Ablate(a.span()) | Ablate(b), two edits"
        )


in_requests(Latents, stay_here)


Table = dict[Basis, dict[int, None]]
"""Dictionary → its indices, in order and once each."""


def _rows(table: Table) -> tuple[tuple[Basis, Sequence[int]], ...]:
    return tuple((basis, tuple(indices)) for basis, indices in table.items() if indices)


def as_latents(subject: object, function: str) -> Latents:
    """Latents as they are; a dictionary or a mapping of them as all its latents.

    Raises:
        LatentError: for anything else, an empty selection, and one that says how edits write it.
    """
    latents = selection(subject, function)
    if latents.written == "frozen":
        return latents
    raise LatentError(
        f"{function}: `latents` is {latents!r}, wanted {replace(latents, written='frozen')!r}."
        " Likely cause: span() and reselect() say how an edit is written, and this is no edit. Try:"
        f" {function}(latents)"
    )


def selection(subject: object, function: str = "latents") -> Latents:
    """The same, where it may also say how edits write it.

    Raises:
        LatentError: for anything else, and for an empty selection.
    """
    select = None if isinstance(subject, Latents) else getattr(subject, "latents", None)
    latents = select() if callable(select) else subject
    if isinstance(latents, Latents) and len(latents):
        _loaded_once(latents, function)
        return latents
    got = "empty" if isinstance(latents, Latents) else type(subject).__name__
    raise LatentError(
        f"{function}: `latents` is {got}, wanted at least one latent. Likely cause: a search that"
        " found nothing, or indices passed without their dictionary. Try: dictionary.latents([12,"
        " 40]) or saes.latents({site: [12]})"
    )


def _loaded_once(latents: Latents, function: str) -> None:
    """Refuse one file's dictionary under two names: its latents would be edited twice."""
    seen: dict[tuple[object, Site], list[Sequence[int]]] = {}
    for basis, indices in latents.parts:
        origin = getattr(basis, "origin", None)
        if origin is None:
            continue
        held = seen.setdefault((origin, basis.site), [])
        if any(not set(indices).isdisjoint(others) for others in held):
            raise LatentError(
                f"{function}: `latents` is latents of {origin} twice, wanted each latent once."
                " Likely cause: the dictionary was loaded twice, and is two objects. Try: select"
                " from one load_saes(...)"
            )
        held.append(indices)


def index_tensor(indices: Iterable[int]) -> Tensor:
    """Indices as a long tensor [k]."""
    if isinstance(indices, range):
        return torch.arange(indices.start, indices.stop, indices.step)
    return torch.tensor(list(indices), dtype=torch.long)


def _listed(basis: Basis, indices: object) -> list[Any]:
    """Indices as plain integers; numpy's and torch's own integers are integers too."""
    flat = indices.tolist() if hasattr(indices, "tolist") else indices  # type: ignore[union-attr]
    if not isinstance(flat, Iterable) or isinstance(flat, (str, bytes)):
        flat = [repr(indices)]  # refused below, by its own name
    return [i if isinstance(i, bool) else getattr(i, "__index__", lambda i=i: i)() for i in flat]


def _check(basis: Basis, indices: list[int]) -> None:
    bad = [i for i in indices if isinstance(i, bool) or not isinstance(i, int)]
    bad = bad or [i for i in indices if not 0 <= i < basis.d_sae]
    repeated = not bad and len(set(indices)) != len(indices)
    if bad or repeated:
        got = repr(bad[0]) if bad else "a list with repeats"
        cause = (
            "an index from a dictionary of another width"
            if bad
            else "one latent listed twice would be edited twice"
        )
        raise LatentError(
            f"latents of {basis.site}: `indices` is {got}, wanted distinct integers in"
            f" 0..{basis.d_sae - 1}. Likely cause: {cause}. Try: dictionary.latents([0, 1])"
        )


def _compact(basis: Basis, indices: Sequence[int]) -> Sequence[int]:
    """A whole dictionary as a range: its numbers as objects would take 36 bytes each."""
    every = range(basis.d_sae)
    if isinstance(indices, range) or len(indices) != len(every):
        return indices
    return every if all(map(eq, indices, every)) else indices


def _brief(indices: Sequence[int]) -> str:
    head = ", ".join(str(i) for i in indices[:5])
    return head + (f", ... {len(indices)} in all" if len(indices) > 5 else "")
