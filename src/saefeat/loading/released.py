"""A dictionary of a release: its site is known at once, its files are read when asked for.

They come from the Hugging Face cache where they are there, else from the hub. A cached file is
used without asking whether its repository has changed since, so that a filled cache needs no
network and gives the same dictionaries every time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

from torch import Tensor

from ..dictionaries.cross_layer import CrossLayer
from ..dictionaries.exclusion import Excluded
from ..dictionaries.latents import Dictionary
from ..dictionaries.sae import SAE
from ..errors import DictionaryError
from ..model.sites import Site
from . import clt, gemma_scope, llama_scope, native, transcoders
from .declaration import Declared, Origin, Source
from .directory import CLT, Entry, Release
from .layouts import Layout, read, whole
from .native import from_object
from .whole import Whole

_READ: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "sae_lens": (native, ("/cfg.json", "/sae_weights.safetensors")),
    "gemma_2": (gemma_scope, ("/params.npz",)),
    "gemma_2_transcoder": (gemma_scope, ("/params.npz",)),
    "gemma_3": (gemma_scope, ("/params.safetensors",)),
    "llama_scope": (llama_scope, ("/hyperparams.json", "/checkpoints/final.safetensors")),
    "llama_scope_r1_distill": (llama_scope, ("/config.json", "/sae_weights.safetensors")),
    "mwhanna_transcoder": (transcoders, ("",)),
}
"""sae-lens conversion → the layout read here, and what follows the path in its files' names."""

_THROUGH = {
    "dictionary_learning_1": ("/config.json", "/ae.pt"),
    "temporal": ("/conf.yaml", "/latest_ckpt.safetensors"),
}
"""Pickles and temporal SAEs go through sae-lens; the others are one file, at the path itself."""


@final
class Released(Dictionary):
    """A dictionary whose files are fetched and read on first use, and checked then.

    Safetensors and uncompressed npz files are read a slice at a time. Releases that are pickles
    (dictionary_learning, Qwen Scope, Goodfire, DeepSeek-R1, hook_z-kk) or temporal SAEs are
    converted by sae-lens, which is imported then, and stay in memory.
    """

    def __init__(self, release: Release, entry: Entry) -> None:
        self.site = Site.parse(entry.hook or "")
        self.write_site = Site.parse(entry.hook_out) if entry.hook_out else self.site
        self.name = f"{release.name}/{entry.id}"
        self._release, self._entry = release, entry

    @cached_property
    def sae(self) -> SAE | Whole | CrossLayer:
        """The dictionary itself."""
        release, entry = self._release, self._entry
        found = _open(release, entry, self.name)
        file: Declared = found.declared
        found.declared = Declared(  # what the release says, and its file where that is silent
            model=release.model or file.model,
            width=entry.width or file.width,
            l0=entry.l0 if entry.l0 is not None else file.l0,
            explained=entry.explained,
            prepend_bos=file.prepend_bos,
        )
        if found.site == self.site and found.write_site == self.write_site:
            return found
        raise DictionaryError(
            f"load_saes: `source` is {self.name}, at {self.site} by its name and at {found.site} by"
            " its file, wanted a name and a file that agree. Likely cause: a file under another"
            f' SAE\'s name. Try: load_saes(release, ids={{"{found.site}": {entry.id!r}}})'
            " once you know which is right"
        )

    @property
    def excluded(self) -> Excluded:  # type: ignore[override]
        return self.sae.excluded

    @excluded.setter
    def excluded(self, excluded: Excluded) -> None:  # type: ignore[override]
        self.sae.excluded = excluded

    @property
    def declared(self) -> Declared:  # type: ignore[override]
        return self.sae.declared

    @property
    def prefix(self) -> bool:  # type: ignore[override]
        return self.sae.prefix

    @property
    def origin(self) -> Any:  # type: ignore[override]
        return self.sae.origin

    @property
    def read_sites(self) -> tuple[Site, ...]:
        return self.sae.read_sites if self._release.conversion == CLT else (self.site,)

    @property
    def write_sites(self) -> tuple[Site, ...]:
        return self.sae.write_sites if self._release.conversion == CLT else (self.write_site,)

    def columns(self, indices: Tensor) -> dict[str, Any]:
        return self.sae.columns(indices)

    def writes(self, indices: Iterable[int] | Tensor | None = None) -> dict[Site, Tensor]:
        return self.sae.writes(indices)

    def content(self, indices: Tensor) -> object:
        return self.sae.content(indices)

    def fingerprint(self, indices: Iterable[int] | Tensor | None = None) -> str:
        return self.sae.fingerprint(indices)

    def __getattr__(self, name: str) -> Any:
        """Widths, ``reconstruct`` and whatever else the SAE has."""
        if name.startswith("_") or name == "sae":
            raise AttributeError(name)
        return getattr(self.sae, name)

    def __repr__(self) -> str:
        if "sae" in vars(self):
            return repr(self.sae)
        at = f"{self.site}" if self.site == self.write_site else f"{self.site} → {self.write_site}"
        width = f"{self._entry.width:,} latents" if self._entry.width else "width unknown"
        l0 = f", L0 {self._entry.l0:g}" if self._entry.l0 is not None else ""
        return f"SAE({self.name!r}, {at}, {width}{l0}, not read yet)"


def files(release: Release, entry: Entry) -> list[str]:
    """The files of the repository that an SAE is made of."""
    if release.conversion == CLT:
        tensors = [f"{kind}_{entry.path}.safetensors" for kind in ("W_enc", "W_dec")]
        return [clt.CONFIG, *tensors]
    if release.conversion == "connor_rob_hook_z":
        return [entry.path.split(".pt")[0] + "_cfg.json", entry.path]
    endings = _READ[release.conversion][1] if release.conversion in _READ else ("",)
    return [entry.path + ending for ending in _THROUGH.get(release.conversion, endings)]


def _open(release: Release, entry: Entry, name: str) -> SAE | Whole | CrossLayer:
    paths = [_fetched(release.repo, file) for file in files(release, entry)]
    parts = paths[0].parts  # a cached file lies below snapshots/<commit>
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None
    layout = _READ[release.conversion][0] if release.conversion in _READ else None
    origin = Origin(
        layout=release.conversion,
        file=str(paths[-1]),
        id=entry.id,
        release=release.name,
        repo=release.repo,
        revision=commit,
    )
    if release.conversion == CLT:
        return _cross_layer(paths[0].parent, entry, origin, name)
    if layout is None:
        return _converted(release, entry, origin, name)
    path = f"{release.repo}/{entry.path}"
    source = Source(paths[0].parent, path, release.overrides, entry.scale)
    facts = whole(layout.facts, source)
    site = entry.hook if entry.given else facts.hook or entry.hook
    return read(layout, source, facts, origin, name=name, site=site, write_site=entry.hook_out)


def _cross_layer(folder: Path, entry: Entry, origin: Origin, name: str) -> CrossLayer:
    """One layer of a cross-layer transcoder, at the site that its configuration declares."""

    def read_layer(source: Source) -> CrossLayer:
        told = next(one for one in clt.entries(source.folder) if one.id == entry.id)
        hook = entry.hook if entry.given else told.hook
        return clt.read(source.folder, replace(entry, hook=hook), origin)

    found = whole(read_layer, Source(folder))
    found.name = name
    return found


def _converted(release: Release, entry: Entry, origin: Origin, name: str) -> SAE | Whole:
    """A pickle or a temporal SAE, converted by sae-lens and kept in memory."""
    from sae_lens import SAE as SaeLens

    try:
        loaded = SaeLens.from_pretrained(release.name, entry.id, device="cpu")
    except Exception as error:
        raise DictionaryError(
            f"load_saes: `source` is {name}, which sae-lens cannot convert ({type(error).__name__}:"
            f" {error}), wanted a file its converter reads. Likely cause: a class or a file its"
            " converter was not written for. Try: another SAE of the release, or the weights in"
            " sae-lens's native layout"
        ) from error
    sae = from_object(loaded, site=entry.hook if entry.given else None)
    sae.name = name
    sae.origin = origin
    return sae


def _fetched(repo: str, file: str) -> Path:
    """The local path of a repository's file."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    cached = try_to_load_from_cache(repo, file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(repo, file))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DictionaryError(
            f"load_saes: `source` is missing {file} of {repo}, wanted that file in the Hugging Face"
            " cache, or a network to fetch it. Likely cause: it was never downloaded here, and the"
            f" hub is out of reach ({type(error).__name__}). Try: where there is a network: hf"
            f" download {repo} {file}"
        ) from error
