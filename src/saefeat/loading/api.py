"""``load_sae`` for one folder, ``load_saes`` for many folders or a release."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..arguments import checked
from ..dictionaries.by_site import Dictionaries
from ..dictionaries.sae import SAE
from ..errors import DictionaryError, SaefeatError
from ..files.paths import expanded
from ..model.sites import Site
from . import clt, directory, native
from .declaration import Origin, Source, refuse
from .directory import Entry, choose
from .layouts import detect, folders, read, whole
from .native import from_object
from .own import load_own
from .released import Released
from .whole import Whole


@checked(own=("layout",))
def load_sae(
    folder: str | Path | Any,
    *,
    site: Site | str | None = None,
    write_site: Site | str | None = None,
    layout: Any = None,
    fold_norms: bool = False,
) -> SAE | Whole:
    """An SAE or transcoder from a folder, or from a sae-lens object.

    Tensors of a folder are read when selected; those of an object are shared, its state is never
    used.

    The layout is recognized by its files: sae-lens (``cfg.json``, ``sae_weights.safetensors``),
    Gemma Scope (``params.npz``, or ``params.safetensors`` for the second), Llama Scope
    (``hyperparams.json``, ``checkpoints/final.safetensors``), dictionary_learning
    (``config.json``, ``ae.safetensors``) and sparsify (``cfg.json``, ``sae.safetensors``).
    Matching-pursuit and temporal SAEs, of sae-lens alone, are read and encoded by sae-lens.

    Args:
        folder: holds the files of one SAE; or a ``sae_lens.SAE``, also one just trained.
        site: overrides the hook name the files declare; needed where they declare none.
        write_site: overrides the output hook a transcoder declares.
        layout: for a layout of your own, two functions of the folder: the first gives arguments
            of ``SAE`` (``site``, ``architecture``, ``subtract_bias`` and whatever else), the second
            the tensors under the names that ``SAE`` documents.
        fold_norms: scale latents so that every direction has length 1. Activations and whatever
            is set or added are then in other units; see ``SAE.fold_norms``.

    Raises:
        DictionaryError: for a missing, truncated or inconsistent file, a pickle, or what cannot
            be computed from selected latents.
        SiteError: for a hook name this version has no place for.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> sae = sf.load_sae(tiny.saes_folder("chat") / "resid_post_1")
        >>> sae.site.hook, sae.d_sae
        ('blocks.1.hook_resid_post', 512)
    """
    found = _loaded(folder, site, write_site, layout)
    if not fold_norms:
        return found
    if isinstance(found, SAE):
        return found.fold_norms()
    cause = "a matching-pursuit or temporal SAE, which sae-lens encodes"
    got, wanted = "whose latents cannot be scaled", "an SAE of another architecture"
    raise refuse(folder, got, wanted, cause, "load_sae(folder), without fold_norms")


def _loaded(
    folder: Any, site: Site | str | None, write_site: Site | str | None, layout: Any
) -> SAE | Whole:
    if not isinstance(folder, str | os.PathLike):
        return from_object(folder, site=site, write_site=write_site)
    folder = expanded(folder, "load_sae", "folder", DictionaryError)
    if layout is not None:
        return load_own(folder, layout, site, write_site)
    if folder.is_dir() and clt.found(folder):
        got, cause = "a cross-layer transcoder, a dictionary a layer", "the whole of it"
        call = "load_saes(folder)[3]"
        raise refuse(folder, f"which is {got}", "the folder of one SAE", cause, call)
    name = folder.name
    if name.startswith("average_l0"):  # one of many of that name: with its parents
        name = "/".join(folder.absolute().parts[-3:])
    return _read(folder, folder.name, name, site, write_site)


@checked
def load_saes(
    source: str | Path,
    *,
    sites: str | Site | Iterable[Site | str] | None = None,
    width: int | str | None = None,
    l0: float | None = None,
    ids: str | Mapping[Site | str, str] | Iterable[str] | None = None,
) -> Dictionaries:
    """One dictionary a site, from a folder of folders or from a release sae-lens lists.

    A folder of a cross-layer transcoder (circuit-tracer's, or Gemma Scope 2's) gives one a layer.

    A release is planned from sae-lens's directory alone: nothing is imported, fetched or read
    until a dictionary is used. Files come from the Hugging Face cache where they are there.

    Args:
        source: a folder of one SAE, or whose subfolders hold SAEs, a release's name, or with
            ``ids`` any Hugging Face repository of sae-lens native folders.
        sites: keep only these sites, or only this kind of site (``"resid_post"``).
        width: keep only dictionaries of this many latents: a number, or a label (``"65k"``).
        l0: at each site, the dictionary whose known L0 is nearest (the sparser of two).
        ids: keep only these ids, or ids like these (``"*_big"``); a mapping says which site each
            id is read at, and wins over what the files say.

    Raises:
        DictionaryError: if nothing fits, with near misses; for a file that is missing or not
            whole.
        SiteError: if several fit one site; ``width``, ``l0`` or ``ids`` choose.

    Examples:
        >>> from saefeat.studies.refusal import tiny
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> {site.kind for site in saes}
        {'resid_post'}
        >>> scope = sf.load_saes("gemma-scope-2b-pt-res", sites="resid_post", width="65k", l0=100)
        >>> scope[15].name
        'gemma-scope-2b-pt-res/layer_15/width_65k/average_l0_127'
    """
    if (folder := expanded(source, "load_saes", "source", DictionaryError)).is_dir():
        if clt.found(folder):
            listed = whole(lambda at: clt.entries(at.folder), Source(folder))
            chosen = choose(listed, folder, sites=sites, width=width, l0=l0, ids=ids)
            return Dictionaries(
                whole(lambda at, entry=entry: clt.read(at.folder, entry), Source(folder))
                for entry in chosen
            )
        entries = [_entry(path, folder) for path in folders(folder)]
        if not entries:
            raise _no_sae(folder)
        chosen = choose(entries, folder, sites=sites, width=width, l0=l0, ids=ids)
        return Dictionaries(_read(Path(e.path), e.id, e.id, e.hook) for e in chosen)
    name = str(source)
    if name not in directory.names() and ids and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        given = [ids] if isinstance(ids, str) else ids.values() if isinstance(ids, Mapping) else ids
        release = directory.repository(name, list(given))
    else:
        release = directory.release(name)
    chosen = choose(release.entries, source, sites=sites, width=width, l0=l0, ids=ids)
    return Dictionaries(Released(release, entry) for entry in chosen)


def _entry(path: Path, parent: Path) -> Entry:
    """What a folder's configuration declares, or why it cannot be read."""
    name = path.name if path == parent else path.relative_to(parent).as_posix()
    layout = detect(path)
    assert layout is not None
    try:
        facts = whole(layout.facts, Source(path))
    except SaefeatError as error:
        return Entry(name, str(path), hook=None, problem=str(error))
    return Entry(name, str(path), facts.hook, facts.hook_out, facts.width, facts.l0)


def _read(
    folder: Path,
    id: str,
    name: str,
    site: Site | str | None,
    write_site: Site | str | None = None,
) -> SAE | Whole:
    layout = detect(folder)
    if layout is None:
        raise _no_sae(folder)
    source = Source(folder)
    facts = whole(layout.facts, source)
    origin = Origin(facts.layout, str(folder), id)
    return read(layout, source, facts, origin, name=name, site=site, write_site=write_site)


def _no_sae(folder: Path) -> DictionaryError:
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in inside if name.endswith((".pt", ".pth"))]
    state = [name for name in inside if _TRAINING.match(name)]
    holds = f"holds {', '.join(inside[:6])}" if inside else "is empty or not there"
    cause = "a wrong path, or an unknown layout"
    if folder.is_file():
        holds, cause = "is a file", "the weights alone; what they are stands in the files beside"
    if state:
        cause = f"a training checkpoint: {state[0]} is the state of a training, and no SAE"
    elif pickles:
        cause = f"{pickles[0]} is a pickle, which is not read"
    return DictionaryError(
        f"load_sae: `folder` is {folder}, which {holds}, wanted a folder of one SAE"
        f" ({native.CONFIG} and {native.WEIGHTS}, params.npz, ...), or for load_saes a folder of"
        f" such folders. Likely cause: {cause}. Try: load_sae(folder) for one, load_saes(parent)"
        " for many; sae.save_inference_model(folder) in sae-lens writes the native layout"
    )


_TRAINING = re.compile(
    r"(optimizer|lr_scheduler|scheduler|trainer_state|training_args|state|rng_state|ae_\d+)"
    r"\w*\.(pt|pth|bin|json|safetensors)$"
)
"""Names of the files that trainers keep beside a model to go on from."""
