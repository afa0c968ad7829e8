"""Which library's files lie in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from ..dictionaries.sae import SAE
from ..dictionaries.weights import Weights
from ..errors import SaefeatError
from ..model.sites import Site
from . import dictionary_learning, gemma_scope, llama_scope, native, sparsify
from .declaration import Facts, Origin, Source, assemble, refuse
from .whole import ARCHITECTURES, Whole, load

T = TypeVar("T")


class Layout(Protocol):
    """How one library stores an SAE: each layout is a module with these three functions."""

    def found(self, folder: Path) -> bool:
        """Whether a folder holds the layout's files, by their names."""
        ...

    def facts(self, source: Source) -> Facts:
        """What the files declare, without reading a tensor; what cannot be computed is refused."""
        ...

    def weights(self, source: Source) -> Weights:
        """The tensors under sae-lens's names, read when selected."""
        ...


# The first that is found counts: sparsify's configuration has the name of sae-lens's.
LAYOUTS: tuple[Layout, ...] = (gemma_scope, sparsify, native, llama_scope, dictionary_learning)


def detect(folder: Path) -> Layout | None:
    """The layout of the files in a folder, or None where there is no SAE."""
    return next((layout for layout in LAYOUTS if layout.found(folder)), None)


def folders(parent: Path) -> Iterator[Path]:
    """The SAEs under a folder: its subfolders, or where none is an SAE the folder itself, or
    whatever lies deeper.
    """
    direct = [path for path in sorted(parent.iterdir()) if path.is_dir() and detect(path)]
    if direct or detect(parent):
        yield from direct or [parent]
    else:
        deep = sorted(parent.rglob("*"))
        yield from (path for path in deep if path.is_dir() and detect(path))


def whole(read: Callable[[Source], T], source: Source) -> T:
    """What one of a layout's functions reads; whatever it trips over is an error by name."""
    try:
        return read(source)
    except SaefeatError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        # A file is whatever somebody wrote, so a layout's functions trip over any of these.
        lacks = f"lack {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        wanted = "every entry and tensor of its layout"
        cause = "a damaged file, or another layout or version under the same file names"
        call = "fetch the files again, or convert them to sae-lens's native layout"
        raise refuse(source.folder, f"whose files {lacks}", wanted, cause, call) from error


def read(
    layout: Layout,
    source: Source,
    facts: Facts,
    origin: Origin,
    *,
    name: str,
    site: Site | str | None = None,
    write_site: Site | str | None = None,
) -> SAE | Whole:
    """The SAE in a folder of a known layout, which declares these facts."""
    if facts.architecture in ARCHITECTURES:
        return load(source.folder, facts, origin, name=name, site=site)
    tensors = whole(layout.weights, source)
    return assemble(facts, tensors, origin, name=name, site=site, write_site=write_site)
