"""Which library's files lie in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..dictionaries.sae import SAE
from ..dictionaries.weights import Weights
from ..errors import SaefeatError
from ..model.sites import Site
from . import dictionary_learning, gemma_scope, llama_scope, native, sparsify, transcoders
from .declaration import Facts, Origin, Source, assemble, refuse
from .whole import ARCHITECTURES, Whole, load

T = TypeVar("T")


class Layout(NamedTuple):
    """How one library stores an SAE: what it declares, and its tensors."""

    facts: Callable[[Source], Facts]
    weights: Callable[[Source], Weights]


NATIVE = Layout(native.facts, native.weights)
GEMMA_SCOPE = Layout(gemma_scope.facts, gemma_scope.weights)
LLAMA_SCOPE = Layout(llama_scope.facts, llama_scope.weights)
DICTIONARY_LEARNING = Layout(dictionary_learning.facts, dictionary_learning.weights)
SPARSIFY = Layout(sparsify.facts, sparsify.weights)
TRANSCODERS = Layout(transcoders.facts, transcoders.weights)

_FOUND: tuple[tuple[Callable[[Path], bool], Layout], ...] = (
    (gemma_scope.found, GEMMA_SCOPE),
    (sparsify.found, SPARSIFY),  # before the native layout, whose configuration has the same name
    (native.found, NATIVE),
    (llama_scope.found, LLAMA_SCOPE),
    (dictionary_learning.found, DICTIONARY_LEARNING),
)


def detect(folder: Path) -> Layout | None:
    """The layout of the files in a folder, or None where there is no SAE."""
    return next((layout for found, layout in _FOUND if found(folder)), None)


def folders(parent: Path) -> Iterator[Path]:
    """The SAEs under a folder: its subfolders, or, where none is an SAE, whatever lies deeper."""
    direct = [path for path in sorted(parent.iterdir()) if path.is_dir() and detect(path)]
    if direct:
        yield from direct
    else:
        deep = sorted(parent.rglob("*"))
        yield from (path for path in deep if path.is_dir() and detect(path))


def whole(read: Callable[[Source], T], source: Source) -> T:
    """What one of a layout's functions reads; whatever it trips over is an error by name.

    Raises:
        DictionaryError: for a configuration or a file that lacks what its layout has, or has
            something else in its place.
    """
    try:
        return read(source)
    except SaefeatError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        lacks = f"lack {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        raise refuse(
            source.folder,
            f"whose files {lacks}",
            "every entry and tensor of its layout",
            "a damaged file, or another layout or version under the same file names",
            "fetch the files again, or convert them to sae-lens's native layout",
        ) from error


def read(
    layout: Layout,
    source: Source,
    origin: Origin,
    *,
    name: str,
    site: Site | str | None = None,
    write_site: Site | str | None = None,
) -> SAE | Whole:
    """The SAE in a folder of a known layout.

    Raises:
        DictionaryError: for files that are missing, not whole, or cannot be computed with.
        SiteError: for a hook this version has no place for.
    """
    facts = whole(layout.facts, source)
    if facts.architecture in ARCHITECTURES:
        return load(source.folder, facts, origin, name=name, site=site)
    tensors = whole(layout.weights, source)
    return assemble(facts, tensors, origin, name=name, site=site, write_site=write_site)
