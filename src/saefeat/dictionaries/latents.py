"""What every dictionary is, and ``Latents``, a selection from one or more.

Attribution, search and set arithmetic return Latents; edits and probes take them. So
attribute → ablate → probe is a loop over one kind of value. A dictionary gives selections and a
selection holds its dictionaries, so they stand in one file.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import eq
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked, got
from ..checks import one_of, whole
from ..errors import DictionaryError, LatentError
from ..files.hashing import digest
from ..kernel.encode import encode
from ..model.requests import in_requests, stay_here
from ..model.sites import Site
from .exclusion import Excluded, untrained
from .finite import guard
from .places import named


@checked(error=LatentError, own=("indices",))
class Dictionary(ABC):
    """A basis for one site's values: d_sae latents, each with an encoder and a direction.

    Subclasses are final and give ``columns``; everything else follows. ``site`` is where latents
    are read, ``write_site`` where their directions are added: the same place except for
    transcoders. Of several (``CrossLayer``) these are the last read site and the first write site.

    Attributes:
        site: where values are read.
        write_site: where edits are written.
        d_in: width of the read site, of several together.
        d_out: width of the write site, of each of several.
        d_sae: number of latents.
        name: a short label for reports.
        excluded: tokens it was not trained on, which edits and readings skip by default: token
            ids, ``"special"`` for all special tokens, or a token rule, such as
            ``sf.Tokens.positions(0, 1)``. It can be set on any dictionary.
        origin: where it was loaded from, for provenance; None for tensors made in memory.
        declared: what its files say of its training, for ``verify``; None for tensors in memory.
        prefix: whether a latent depends on earlier tokens of its sequence.
        joint: whether encoding some latents computes all of them, so that long work should ask
            for them together.

    Examples:
        >>> isinstance(sf.Direction(torch.ones(8), site="resid_post.2"), sf.dictionaries.Dictionary)
        True
    """

    site: Site
    write_site: Site
    d_in: int
    d_out: int
    d_sae: int
    name: str
    excluded: Excluded = ()
    origin: object = None
    declared: Any = None
    prefix: bool = False
    joint: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        guard(cls)
        in_requests(cls, stay_here)

    @abstractmethod
    def columns(self, indices: Tensor) -> dict[str, Any]:
        """The kernel's plain tensors for these latents, float32 (see ``kernel.encode``)."""

    def content(self, indices: Tensor) -> object:
        """All that encoding and directions of these latents are computed from, to be hashed.

        Their columns, unless a subclass has what they are made of: that is the same on every
        machine, where a product may round otherwise.
        """
        return self.columns(indices)

    def fingerprint(self, indices: Iterable[int] | Tensor | None = None) -> str:
        """A short hash of content, sites and excluded tokens; without an argument, of all latents.

        Whatever changes ``encode`` or ``directions`` of the latents changes it, and the same
        dictionary has the same one from a file and from memory. Of some latents it reads no
        others, so it costs as much as an edit of them.
        """
        where = (str(self.site), str(self.write_site), self.excluded, self.prefix)
        others = [str(site) for site in (*self.read_sites[:-1], *self.write_sites[1:])]
        where += (len(self.read_sites), *others) if others else ()
        return digest(where, self.content(self._index(indices)))

    @property
    def read_sites(self) -> tuple[Site, ...]:
        """Where values are read, in the order in which the model reaches them; mostly one."""
        return (self.site,)

    @property
    def write_sites(self) -> tuple[Site, ...]:
        """Where edits are written, in the order in which the model reaches them; mostly one."""
        return (self.write_site,)

    @property
    def source(self) -> str:
        """Where it came from, for provenance: its origin, or else its name."""
        return str(self.origin or self.name)

    def latents(self, indices: Iterable[int] | Tensor | None = None) -> Latents:
        """Select latents by index; without an argument, all of them.

        Raises:
            LatentError: for an index that is negative, out of range or repeated.
        """
        return Latents.of(self, range(self.d_sae) if indices is None else indices)

    def encode(self, x: Tensor, indices: Iterable[int] | Tensor | None = None) -> Tensor:
        """Activations of the chosen latents (default: all).

        Args:
            x: [..., d_in], any float dtype; computed in at least float32. Where ``prefix`` is
                true, [..., tokens, d_in]: whole sequences without padding.
            indices: which latents, k of them.

        Returns:
            [..., k] in the compute dtype.

        Raises:
            DictionaryError: for another width than d_in.
        """
        index = self._index(indices)
        if x.shape[-1:] != (self.d_in,):
            raise DictionaryError(
                f"{type(self).__name__}.encode: `x` is {got(x)}, wanted [..., {self.d_in}]. Likely"
                f" cause: another site's value, or a transposed one. Try: what a run has at"
                f" {self.site}"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        columns = cast(self.columns(index), dtype, x.device)
        return encode(columns, x.to(dtype))[0]

    def directions(self, indices: Iterable[int] | Tensor | None = None) -> Tensor:
        """What one unit of each chosen latent adds to the write site: [k, d_out], float32."""
        return self.columns(self._index(indices))["directions"]

    def writes(self, indices: Iterable[int] | Tensor | None = None) -> dict[Site, Tensor]:
        """The directions at every write site: [k, d_out] each, float32."""
        return {self.write_site: self.directions(indices)}

    def _index(self, indices: Iterable[int] | Tensor | None) -> Tensor:
        """Indices as a tensor, refused as ``latents`` refuses them."""
        parts = self.latents(indices).parts
        return index_tensor(parts[0][1] if parts else ())

    def __repr__(self) -> str:
        read, written = named(self.read_sites), named(self.write_sites)
        at = read if read == written else f"{read} → {written}"
        skips = f", without {untrained(self.excluded)}" if self.excluded else ""
        return f"{type(self).__name__}({self.name!r}, {at}, {self.d_in} x {self.d_sae}{skips})"


def cast(columns: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Columns on a device, floating tensors in a dtype."""
    return {
        key: (value.to(device, dtype) if value.is_floating_point() else value.to(device))
        if isinstance(value, Tensor)
        else value
        for key, value in columns.items()
    }


def index_tensor(indices: Iterable[int]) -> Tensor:
    """Indices as a long tensor [k]."""
    if isinstance(indices, range):
        return torch.arange(indices.start, indices.stop, indices.step, device="cpu")
    return torch.tensor(list(indices), dtype=torch.long, device="cpu")


WRITTEN = ("frozen", "reselect", "span")
"""How an edit of a selection is written; see ``Latents``."""


@checked(error=LatentError, own=("indices",))
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

    parts: tuple[tuple[Dictionary, Sequence[int]], ...]
    written: str = "frozen"

    def __post_init__(self) -> None:
        one_of("Latents", "written", self.written, WRITTEN, error=LatentError)
        parts = []
        for basis, indices in self.parts:
            every = range(basis.d_sae)
            # A whole dictionary is kept as a range: its numbers as objects take 36 bytes each.
            whole = not isinstance(indices, range) and len(indices) == len(every)
            if whole and all(map(eq, indices, every)):
                indices = every
            parts.append((basis, indices))
        object.__setattr__(self, "parts", tuple(parts))

    @classmethod
    def of(cls, dictionary: Dictionary, indices: Iterable[int] | Tensor) -> Latents:
        """Select latents of one dictionary.

        Raises:
            LatentError: for an index that is negative, out of range, repeated or not whole.
        """
        d_sae = dictionary.d_sae
        if isinstance(indices, range) and indices == range(d_sae):
            return cls(((dictionary, indices),))
        tolist = getattr(indices, "tolist", None)  # torch's and numpy's
        given: Any = tolist() if callable(tolist) else indices
        if isinstance(given, str | bytes) or not isinstance(given, Iterable):
            listed, wrong = [], [indices]
        else:  # numpy's and torch's own integers are integers too; True is none
            listed = list(given)
            wrong = [i for i in listed if not hasattr(i, "__index__") or isinstance(i, bool)]
        chosen = () if wrong else tuple(index.__index__() for index in listed)
        wrong = wrong or [index for index in chosen if not 0 <= index < d_sae]
        if not wrong and len(set(chosen)) == len(chosen):
            return cls(((dictionary, chosen),) if chosen else ())
        got, cause = "a list with repeats", "one latent listed twice would be edited twice"
        if wrong:
            got, cause = repr(wrong[0]), _cause(wrong[0], indices)
        raise LatentError(
            f"latents of {dictionary.site}: `indices` is {got}, wanted distinct integers in"
            f" 0..{d_sae - 1}. Likely cause: {cause}. Try: dictionary.latents([0, 1])"
        )

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
        theirs, both = other._table(), self._table()
        for basis, indices in both.items():
            both[basis] = {i: None for i in indices if i in theirs.get(basis, ())}
        return Latents(_rows(both), self._written_with(other))

    def __sub__(self, other: Latents) -> Latents:
        theirs, rest = other._table(), self._table()
        for basis, indices in rest.items():
            rest[basis] = {i: None for i in indices if i not in theirs.get(basis, ())}
        return replace(self, parts=_rows(rest))

    def __repr__(self) -> str:
        shown = []
        for basis, indices in self.parts[:6]:
            head = ", ".join(map(str, indices[:5]))
            more = f", ... {len(indices)} in all" if len(indices) > 5 else ""
            shown.append(f"{basis.site} [{head}{more}]")
        if len(self.parts) > 6:
            shown.append(f"and {len(self.parts) - 6} more sites")
        listed = f": {', '.join(shown)}" if shown else ""
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
        """N latents drawn without replacement: the raw material of a random control.

        Raises:
            LatentError: if fewer than n are selected.
        """
        whole("Latents.sample", "n", n, 0, error=LatentError)
        pairs = [(basis, index) for basis, indices in self.parts for index in indices]
        if n > len(pairs):
            raise LatentError(
                f"Latents.sample: `n` is {n}, wanted at most {len(pairs)}, the latents selected."
                " Likely cause: the control is drawn from too small a set. Try: draw from"
                " dictionary.latents(), all latents"
            )
        drawn = random.Random(seed).sample(pairs, n)
        table: Table = {}
        for basis, index in sorted(drawn, key=lambda pair: (pair[0].site.order, pair[1])):
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
        """How two selections together are written; an empty one has no say."""
        ways = {latents.written for latents in (self, other) if latents.parts}
        if len(ways) < 2:
            return next(iter(ways), "frozen")
        raise LatentError(
            f"Latents: `latents` is {self!r} with {other!r}, wanted selections that are written in"
            " the same way. Likely cause: one verb writes all its latents in one way. Try:"
            " Ablate(a.span()) | Ablate(b), two edits"
        )


in_requests(Latents, stay_here)


Table = dict[Dictionary, dict[int, None]]
"""Dictionary → its indices, in order and once each."""


def _cause(wrong: object, indices: object) -> str:
    """Why an index is none."""
    if wrong is indices:
        return "one number or a word, where a list of numbers belongs"
    if isinstance(wrong, bool):
        return "a mask, where the numbers of the latents belong: mask.nonzero().flatten()"
    if not isinstance(wrong, int):
        return "something that is no whole number, such as an activation in an index's place"
    return "counting from the end" if wrong < 0 else "an index from a dictionary of another width"


def _rows(table: Table) -> tuple[tuple[Dictionary, Sequence[int]], ...]:
    return tuple((basis, tuple(indices)) for basis, indices in table.items() if indices)
