"""A few latents of a dictionary on their own: what a saved intervention carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from ..errors import DictionaryError, LatentError
from ..kernel.encode import NORMS
from ..model.sites import Site
from .exclusion import Excluded
from .latents import Dictionary, Latents
from .places import require_one_site
from .weights import require_shape

SHAPES: dict[str, dict[str, tuple[str, ...]]] = {
    "identity": {"bias": ("k",)},
    "relu": {"bias": ("k",)},
    "jumprelu": {"bias": ("k",), "threshold": ("k",)},
    "gated": {"bias": ("k",), "gate_bias": ("k",), "gain": ("k",)},
    "topk": {"bias": ("all",)},
    "abstopk": {"bias": ("all",)},
    "error": {"decoder": ("all", "d_out"), "decoder_bias": ("d_out",)},
}
"""Kernel activation → its tensors and their shapes, beside ``encoder`` and ``directions``."""

PLAIN = ("activation", "norm", "inner", "k", "centered")
"""Entries of columns that are no tensors, where they are there."""

_SPARSE = ("topk", "abstopk")
WHOLE = ("topk", "abstopk", "error")
"""Activations that need every encoder column, whichever latents are wanted."""


def shapes(columns: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The tensors that columns of this kind have: name → shape in symbols."""
    kind, inner = columns.get("activation"), columns.get("inner")
    known = [name for name in (kind, inner) if isinstance(name, str) and name in SHAPES]
    if not known or kind != known[0] or (kind == "error" and known[1:] in ([], ["error"])):
        raise _unknown("activation", kind if kind != "error" else inner, ", ".join(SHAPES))
    if columns.get("norm") not in NORMS:
        raise _unknown("norm", columns.get("norm"), ", ".join(NORMS))
    found = dict(SHAPES[known[0]])
    if kind == "error":
        found |= dict.fromkeys(SHAPES[str(inner)], ("all",))
    every = "all" if kind in WHOLE else "k"
    return found | {"encoder": ("d_in", every), "directions": ("k", "d_out")}


@final
class Excerpt(Dictionary):
    """Some latents of another dictionary under their own numbers, without the rest of it.

    ``load`` gives the latents of a saved intervention as excerpts, so that neither the SAE nor
    the library that read it is needed. Indices are the original's; a latent that is not held
    is refused. Each selection is held as the original dictionary computed it: how a matrix product
    rounds may depend on which columns it is taken over.

    Args:
        selections: indices → the kernel's columns for them (see ``kernel.encode``).
        site: where it reads.
        write_site: where it writes.
        d_in: width of the read site.
        d_out: width of the write site.
        d_sae: latents of the original.
        name: the original's name.
        excluded: tokens that edits and readings skip: ids, ``"special"``, or a token rule.
        origin: where the original came from.
        fingerprint: the original's.
        centered: whether the original reads x − mean(x), which only LayerNorm models allow.

    Raises:
        DictionaryError: for columns of the wrong shape, or of an unknown kind.

    Examples:
        >>> tensors = {"W_enc": torch.randn(8, 32), "b_enc": torch.zeros(32),
        ...            "W_dec": torch.randn(32, 8), "b_dec": torch.zeros(8)}
        >>> sae = sf.SAE.from_tensors(tensors, site="resid_post.1")
        >>> few = sf.dictionaries.excerpt.Excerpt.of(sae, [(3, 20)])
        >>> few.latents(), few.d_sae, few.fingerprint() == sae.fingerprint()
        (Latents(2: resid_post.1 [3, 20]), 32, True)
    """

    def __init__(
        self,
        selections: Mapping[tuple[int, ...], Mapping[str, Any]],
        *,
        site: Site | str,
        write_site: Site | str,
        d_in: int,
        d_out: int,
        d_sae: int,
        name: str,
        excluded: Excluded,
        origin: object,
        fingerprint: str,
        centered: bool = False,
    ) -> None:
        self.site, self.write_site = Site.parse(site), Site.parse(write_site)
        self.d_in, self.d_out, self.d_sae = d_in, d_out, d_sae
        self.name, self.excluded, self.origin = name, excluded, origin
        self._fingerprint, self.centered = fingerprint, centered
        self._selections = {tuple(k): dict(columns) for k, columns in selections.items()}
        for indices, columns in self._selections.items():
            Latents.of(self, indices)
            self._check(len(indices), columns)
            self.joint = columns.get("inner", columns["activation"]) in _SPARSE

    @classmethod
    def of(cls, dictionary: Dictionary, selections: Iterable[tuple[int, ...]]) -> Excerpt:
        """What a dictionary computes for some selections of its latents.

        Raises:
            DictionaryError: for a dictionary that is a Python function.
            SiteError: for one of several sites, of which a file knows one alone.
        """
        chosen = dictionary.latents([i for some in selections for i in some][:1])
        require_one_site("save", "intervention", chosen, reads=True, writes=True)
        found = {}
        for indices in selections:
            columns = dictionary.columns(torch.tensor(indices, dtype=torch.long))
            columns.pop("selected", None)  # the indices themselves
            found[tuple(indices)] = columns
        return cls(
            found,
            site=dictionary.site,
            write_site=dictionary.write_site,
            d_in=dictionary.d_in,
            d_out=dictionary.d_out,
            d_sae=dictionary.d_sae,
            name=dictionary.name,
            excluded=dictionary.excluded,
            origin=dictionary.origin,
            fingerprint=dictionary.fingerprint(),
            centered=getattr(dictionary, "centered", False),
        )

    @property
    def held(self) -> tuple[int, ...]:
        """The latents there are, in the order in which they were selected."""
        return tuple(dict.fromkeys(i for indices in self._selections for i in indices))

    def latents(self, indices: Iterable[int] | Tensor | None = None) -> Latents:
        """Select latents by their original index; without an argument, all that are held.

        Raises:
            LatentError: for an index that is not held, negative, out of range or repeated.
        """
        chosen = Latents.of(self, self.held if indices is None else indices)
        self._require(index for _, index in chosen)
        return chosen

    def columns(self, indices: Tensor) -> dict[str, Any]:
        wanted = tuple(indices.tolist())
        if wanted in self._selections:
            found = dict(self._selections[wanted])
        else:
            self._require(wanted)
            found = self._gathered(wanted)
        kind = found.get("inner", found["activation"])
        if kind in _SPARSE:
            whole = found["activation"] == "error"
            width = found["encoder"].shape[1]
            found["selected"] = torch.arange(width) if whole else indices.clone()
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()}

    def fingerprint(self, indices: Iterable[int] | Tensor | None = None) -> str:
        """Of some latents, a hash of the columns held; of all, the original's, as it was told."""
        return self._fingerprint if indices is None else super().fingerprint(indices)

    @property
    def source(self) -> str:
        return f"{super().source} {self._fingerprint}"

    def _gathered(self, wanted: tuple[int, ...]) -> dict[str, Any]:
        """Columns for latents held in other selections, one by one."""
        place: dict[int, tuple[dict[str, Any], int]] = {}
        for indices, columns in self._selections.items():
            for at, index in enumerate(indices):
                place.setdefault(index, (columns, at))
        found = dict(next(iter(self._selections.values())))
        for name, shape in shapes(found).items():
            if "k" in shape:
                axis = shape.index("k")
                none = [found[name].narrow(axis, 0, 0)]  # for a selection of nothing
                parts = [place[i][0][name].narrow(axis, place[i][1], 1) for i in wanted]
                found[name] = torch.cat(none + parts, axis)
        return found

    def _require(self, indices: Iterable[int]) -> None:
        """Refuse latents of the original that are not here."""
        missing = sorted(set(indices) - set(self.held))
        if missing or not self._selections:
            got = f"latent {missing[0]}, which is not held" if missing else "all of them"
            head = ", ".join(map(str, self.held[:5])) or "none"
            listed = head + (", ..." if len(self.held) > 5 else "")
            raise LatentError(
                f"{self!r}: `latents` is {got}, wanted some of the {len(self.held)} that are:"
                f" {listed}. Likely cause: an excerpt carries only the latents it was"
                " made for. Try: load the dictionary itself with load_sae or load_saes"
            )

    def _check(self, k: int, columns: Mapping[str, Any]) -> None:
        """Every tensor there, of its shape, and nothing else."""
        wanted = shapes(columns)
        encoder = columns.get("encoder")
        every = encoder.shape[-1] if isinstance(encoder, Tensor) and encoder.ndim else 0
        if columns["activation"] in _SPARSE:
            every = self.d_sae
        size = {"k": k, "d_in": self.d_in, "d_out": self.d_out, "all": every}
        for name, shape in wanted.items():
            value = columns.get(name)
            got = tuple(value.shape) if isinstance(value, Tensor) else ()
            require_shape(name, got, tuple(size[axis] for axis in shape))
        plain = {"activation", "norm"} | ({"inner", "centered"} & set(columns))
        if type(columns.get("centered", False)) is not bool:
            raise _unknown("centered", columns["centered"], "true or false")
        if columns.get("inner", columns["activation"]) in _SPARSE:
            plain.add("k")
            if type(columns.get("k")) is not int or not 1 <= columns["k"] <= every:
                raise _unknown("k", columns.get("k"), f"an integer in 1..{every}")
        extra = sorted(set(columns) - set(wanted) - plain)
        if extra or set(columns) < set(wanted) | plain:
            raise _unknown("columns", extra or sorted(columns), ", ".join([*wanted, *plain]))


def _unknown(parameter: str, got: object, wanted: str) -> DictionaryError:
    shown = getattr(got, "__name__", None) or repr(got)
    shown = shown if len(shown) < 200 else shown[:200] + "..."
    return DictionaryError(
        f"Excerpt: `{parameter}` is {shown}, wanted {wanted}. Likely cause: a dictionary that is a"
        " Python function, or one of a later version. Try: Excerpt.of(sae, [(3, 20)])"
    )
