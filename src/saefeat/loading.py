"""Loading dictionaries: sae-lens native folders, sae-lens releases, sae-lens objects.

A native folder is ``cfg.json`` beside ``sae_weights.safetensors`` and is read with safetensors
alone. Only releases need sae-lens itself, which takes seconds and hundreds of megabytes to
import, so it is imported where it is used and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .dictionaries.base import Dictionaries
from .dictionaries.sae import SAE
from .dictionaries.weights import InMemory, OnDisk, Weights
from .errors import DictionaryError, explain
from .sites import Site

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def load_sae(
    folder: str | Path, *, site: Site | str | None = None, write_site: Site | str | None = None
) -> SAE:
    """An SAE or transcoder from a sae-lens native folder; tensors are read when selected.

    Args:
        folder: holds ``cfg.json`` and ``sae_weights.safetensors``.
        site: overrides the hook name the file declares.
        write_site: overrides the output hook a transcoder declares.

    Raises:
        DictionaryError: for a missing, truncated or inconsistent file.
        SiteError: for a hook name this version has no place for.

    Example:
        >>> from saefeat.studies.refusal import tiny
        >>> sae = sf.load_sae(tiny.saes_folder("chat") / "resid_post_1")
        >>> sae.site.hook, sae.d_sae
        ('blocks.1.hook_resid_post', 512)
    """
    folder = Path(folder)
    config = _config(folder)
    return _build(config, OnDisk(_existing(folder, WEIGHTS)), folder.name, site, write_site)


def load_saes(
    source: str | Path,
    *,
    sites: str | Iterable[Site | str] | None = None,
    ids: Mapping[Site | str, str] | Iterable[str] | None = None,
) -> Dictionaries:
    """Every dictionary of a local folder of native folders, or chosen ones of a release.

    Args:
        source: a folder whose subfolders are sae-lens native, or a sae-lens release name.
        sites: keep only these sites, or only this kind of site (``"resid_post"``).
        ids: for a release, the sae-lens ids to load.

    Raises:
        DictionaryError: if nothing is there, or a file is not whole.
        SiteError: if two dictionaries read one site; choose with ``sites``.

    Example:
        >>> from saefeat.studies.refusal import tiny
        >>> saes = sf.load_saes(tiny.saes_folder("chat"), sites="resid_post")
        >>> {site.kind for site in saes}
        {'resid_post'}
    """
    folder = Path(source)
    if folder.is_dir():
        found = [load_sae(path.parent) for path in sorted(folder.glob(f"*/{CONFIG}"))]
    else:
        found = [_from_release(str(source), sae_id) for sae_id in _ids(source, ids)]
    kept = [sae for sae in found if _wanted(sae.site, sites)]
    if kept:
        return Dictionaries(kept)
    raise DictionaryError(
        explain(
            "load_saes",
            "source",
            got=f"{source}, where {len(found)} dictionaries were found and none was kept",
            wanted=f"subfolders with {CONFIG} and {WEIGHTS}",
            cause="the parent or a single SAE's folder was given" if not found else "`sites`",
            call="load_sae(folder) for one, load_saes(parent) for many",
        )
    )


def from_sae_lens(
    sae: Any, *, site: Site | str | None = None, write_site: Site | str | None = None
) -> SAE:
    """A dictionary from a sae-lens object; its tensors are shared, its state is never used.

    Args:
        sae: a ``sae_lens.SAE``.
        site: overrides the hook name it declares.
        write_site: overrides the output hook a transcoder declares.

    Raises:
        DictionaryError: for an architecture that cannot be computed from selected columns.

    Example:
        >>> sf.from_sae_lens.__name__
        'from_sae_lens'
    """
    state = sae.state_dict()
    sae.process_state_dict_for_saving(state)
    return _build(sae.cfg.to_dict(), InMemory(state), sae.get_name(), site, write_site)


def _from_release(release: str, sae_id: str) -> SAE:
    from sae_lens import SAE as SaeLens

    sae = from_sae_lens(SaeLens.from_pretrained(release, sae_id, device="cpu"))
    sae.name = f"{release}/{sae_id}"
    return sae


def _ids(source: str | Path, ids: Mapping[Site | str, str] | Iterable[str] | None) -> list[str]:
    if ids is not None:
        return list(ids.values()) if isinstance(ids, Mapping) else list(ids)
    raise DictionaryError(
        explain(
            "load_saes",
            "source",
            got=f"{source}, which is no folder",
            wanted="a folder of SAEs, or a sae-lens release with ids=",
            cause="a wrong path, or a release named without the SAEs to load from it",
            call='load_saes("gpt2-small-res-jb", ids=["blocks.5.hook_resid_pre"])',
        )
    )


def _wanted(site: Site, sites: str | Iterable[Site | str] | None) -> bool:
    if sites is None:
        return True
    if isinstance(sites, str):
        return site == Site.parse(sites) if "." in sites else site.kind == sites
    return site in {Site.parse(wanted) for wanted in sites}


def _config(folder: Path) -> dict[str, Any]:
    path = _existing(folder, CONFIG)
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DictionaryError(
            explain(
                "load_sae",
                "folder",
                got=f"{path}, which is not JSON ({error})",
                wanted="sae-lens's cfg.json",
                cause="an interrupted copy",
                call="fetch the file again",
            )
        ) from error
    return config


def _existing(folder: Path, name: str) -> Path:
    if (folder / name).is_file():
        return folder / name
    raise DictionaryError(
        explain(
            "load_sae",
            "folder",
            got=f"{folder}, which has no {name}",
            wanted=f"a sae-lens native folder: {CONFIG} and {WEIGHTS}",
            cause="a wrong path, or a release in another layout",
            call="sae.save_inference_model(folder) in sae-lens writes this layout",
        )
    )


def _build(
    config: dict[str, Any],
    weights: Weights,
    name: str,
    site: Site | str | None,
    write_site: Site | str | None,
) -> SAE:
    """Read the declared facts out of a configuration, old (flat) or new (with metadata)."""
    meta = {**config, **(config.get("metadata") or {})}
    architecture = config.get("architecture", "standard")
    hook = site if site is not None else meta.get("hook_name")
    if hook is None:
        raise DictionaryError(
            explain(
                "load_sae",
                "site",
                got="not declared by the file",
                wanted="metadata.hook_name, or site=",
                cause="an SAE trained on tensors without a hook name",
                call='load_sae(folder, site="resid_post.3")',
            )
        )
    output = write_site if write_site is not None else meta.get("hook_name_out")
    transcoder = "transcoder" in architecture
    pretrained = meta.get("model_from_pretrained_kwargs") or {}
    return SAE(
        weights,
        architecture=architecture,
        site=hook,
        write_site=output if transcoder else None,
        norm=_norm(config),
        subtract_bias=not transcoder and bool(config.get("apply_b_dec_to_input", True)),
        centered=bool(pretrained.get("center_writing_weights", False)),
        k=config.get("k"),
        rescale=bool(config.get("rescale_acts_by_decoder_norm", False)),
        excluded=_excluded(meta.get("exclude_special_tokens")),
        name=name,
    )


def _norm(config: dict[str, Any]) -> str:
    """Expected-average scaling is folded into the weights when sae-lens saves for inference."""
    norm = config.get("normalize_activations") or "none"
    return "none" if norm == "expected_average_only_in" else norm


def _excluded(declared: object) -> tuple[int, ...] | str:
    if isinstance(declared, (list, tuple)):
        return tuple(int(token) for token in declared)
    return "special" if declared else ()
