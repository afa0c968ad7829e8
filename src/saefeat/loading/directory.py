"""The SAEs that could be loaded, and choosing among them before any is read.

sae-lens's directory of pretrained SAEs is read without importing sae-lens. It is one YAML file of
43,000 lines in the installed package; only the asked release's part of it is parsed, in
milliseconds.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import DictionaryError, SaefeatError, SiteError
from ..model.sites import Site
from . import gemma_scope
from .declaration import l0_in, width_in, width_of

Sites = str | Site | Iterable[Site | str] | None
Ids = str | Mapping[Site | str, str] | Iterable[str] | None


FILE = "pretrained_saes.yaml"
CLT = "mntss_clt_layer_transcoder"
"""sae-lens's conversion of a cross-layer transcoder."""


@dataclass(frozen=True)
class Entry:
    """One SAE that could be loaded.

    Attributes:
        id: within its release or folder.
        path: of its file or folder, within the repository or on disk.
        hook: TransformerLens name of the read site; None where nothing tells.
        hook_out: of the write site, for a transcoder.
        width: latents, where known.
        l0: active latents a token, where known.
        explained: share of variance explained, where a release lists it.
        scale: activation norm factor, where a release lists one.
        problem: why it cannot be loaded, if it cannot.
        given: whether the caller named the site, which then wins over what the file says.
    """

    id: str
    path: str
    hook: str | None
    hook_out: str | None = None
    width: int | None = None
    l0: float | None = None
    explained: float | None = None
    scale: float | None = None
    problem: str | None = None
    given: bool = False

    @property
    def site(self) -> Site | None:
        """Where it reads, or None where no site of this version is meant."""
        return _site(self.hook)

    @property
    def trouble(self) -> str | None:
        """Why it cannot be loaded: its problem, or a hook without a site."""
        if self.problem:
            return self.problem
        hooks = [hook for hook in (self.hook, self.hook_out) if hook or hook is self.hook]
        strange = [hook for hook in hooks if _site(hook) is None]
        return f"there is no site for {strange[0] or 'an unnamed hook'}" if strange else None


@dataclass(frozen=True)
class Release:
    """One release: where its files are, how sae-lens converts them, and its SAEs."""

    name: str
    repo: str
    conversion: str
    overrides: Mapping[str, Any]
    model: str | None
    entries: tuple[Entry, ...]


def names() -> list[str]:
    """All release names."""
    return list(_parts())


@cache
def release(name: str) -> Release:
    """A release by name."""
    if name not in _parts():
        same = [known for known, part in _parts().items() if f"repo_id: {name}\n" in part]
        wanted = "a folder of SAEs, or a release sae-lens lists: "
        wanted += ", ".join(same) or _near(name, _parts(), most=3)
        cause = "a wrong path, or a misspelt release"
        if same:
            cause = "the repository's name in place of a release of it"
        raise DictionaryError(
            f"load_saes: `source` is {name}, which is no folder and no release, wanted {wanted}."
            f' Likely cause: {cause}. Try: load_saes("gpt2-small-res-jb",'
            ' ids=["blocks.5.hook_resid_pre"])'
        )
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: dict[str, Any] = yaml.load(_parts()[name], loader)[name]
    conversion = found.get("conversion_func") or "sae_lens"
    listed = {str(sae["id"]): sae for sae in found["saes"]}  # the last of two wins, as in sae-lens
    entries = (_entry(name, found["repo_id"], conversion, sae) for sae in listed.values())
    overrides = found.get("config_overrides") or {}
    model = found.get("model")
    return Release(name, found["repo_id"], conversion, overrides, model, tuple(entries))


def repository(repo: str, ids: list[str]) -> Release:
    """A Hugging Face repository that is in no directory: sae-lens native folders, by their path."""
    entries = tuple(_entry(repo, repo, "sae_lens", {"id": path, "path": path}) for path in ids)
    return Release(repo, repo, "sae_lens", {}, None, entries)


@cache
def _parts() -> dict[str, str]:
    """Release name → its part of the file: every line without indentation starts one."""
    spec = find_spec("sae_lens")  # finds the package, does not import it
    places = list(spec.submodule_search_locations or ()) if spec else []
    text = (Path(places[0]) / FILE).read_text(encoding="utf-8") if places else ""
    parts = re.split(r"(?m)^(?=[^\s#-])", text)
    return {part.split(":", 1)[0].strip("\"'"): part for part in parts if ":" in part}


def _entry(name: str, repo: str, conversion: str, sae: dict[str, Any]) -> Entry:
    path = str(sae["path"])
    hook, hook_out = _hooks(conversion, repo, path, str(sae["id"]))
    # The names of R1-Distill tell how many tokens of mathematics, not how many latents.
    told = "" if conversion == "llama_scope_r1_distill" else f"{path} {sae['id']} {name} {repo} "
    return Entry(
        id=str(sae["id"]),
        path=path,
        hook=hook,
        hook_out=hook_out,
        width=width_in(told),
        l0=float(sae["l0"]) if sae.get("l0") else l0_in(path),
        explained=sae.get("variance_explained"),
        scale=sae.get("norm_scaling_factor"),
    )


_LLAMA = {"r": "hook_resid_post", "m": "hook_mlp_out", "a": "hook_attn_out"}
_LAYER = {
    "qwen_scope": r"layer(\d+)\.sae",
    "goodfire": r"-l(\d+)\.",
    "deepseek_r1": r"-l(\d+)\.",
    "dictionary_learning_1": r"resid_post_layer_(\d+)",
    "temporal": r"layer_(\d+)",
}
"""sae-lens conversion → where its paths of residual SAEs name the layer."""


def _hooks(conversion: str, repo: str, path: str, sae_id: str) -> tuple[str | None, str | None]:
    """Read and write hook, as sae-lens's conversion has them."""
    if conversion.startswith("gemma_"):
        return gemma_scope.hooks(f"{repo}/{path}")
    if conversion.startswith("llama_scope"):
        found = re.match(r"l(\d+)([rma])_", sae_id)
        return (f"blocks.{found[1]}.{_LLAMA[found[2]]}" if found else None), None
    if conversion in _LAYER:
        found = re.search(_LAYER[conversion], path)
        return (f"blocks.{found[1]}.hook_resid_post" if found else None), None
    if conversion in ("mwhanna_transcoder", CLT):
        layer = re.search(r"\d+", sae_id)
        block = f"blocks.{layer[0]}." if layer else ""
        # circuit-tracer's default; the release's config.yaml is held to it when it is read
        return block + ("hook_resid_mid" if conversion == CLT else "mlp.hook_in"), (
            block + "hook_mlp_out"
        )
    found = re.search(r"blocks\.\d+\.(?:\w+\.)?hook_[a-z]+(?:_[a-z]+)*", sae_id)
    hook = found[0] if found else None
    if hook and conversion == "connor_rob_hook_z":
        hook = hook.replace(".hook_z", ".attn.hook_z")
    return hook, None


def choose(
    entries: Sequence[Entry],
    source: object,
    *,
    sites: Sites = None,
    width: int | str | None = None,
    l0: float | None = None,
    ids: Ids = None,
) -> list[Entry]:
    """One entry a site; what is not there is refused with near misses, as is an open choice."""
    _require_some(sites, ids, l0)
    kept = _by_ids(entries, ids, source)
    kept = _by_sites(kept, sites, source)
    if width is not None:
        wanted = width_of(width)
        known = sorted({entry.width for entry in kept if entry.width})
        kept = [entry for entry in kept if entry.width == wanted]
        if not kept:
            there = ", ".join(f"{n:,}" for n in known) or "no width that its names tell; use ids="
            raise _refused("width", f"{width!r} ({wanted:,} latents), which {source} lacks", there)
    bad = [entry for entry in kept if entry.trouble]
    if bad:
        raise DictionaryError(
            f"load_saes: `source` is {source}, of which {len(bad)} of {len(kept)} chosen cannot be"
            f" loaded ({bad[0].id}: {bad[0].trouble}), wanted dictionaries that this version can"
            " compute with. Likely cause: a kind of site, layout or architecture it does not have."
            ' Try: load_saes(source, sites="resid_post") for those that lie in the residual'
            ' stream, or ids={"resid_post.3": id} where the site is known to you'
        )
    by_site: dict[Site, list[Entry]] = {}
    for entry in kept:
        if entry.site is not None:
            by_site.setdefault(entry.site, []).append(entry)
    return [_one(found, site, l0, source) for site, found in by_site.items()]


def _require_some(sites: Sites, ids: Ids, l0: float | None) -> None:
    """Refuse a choice among nothing, and an L0 that none can be near to."""
    for parameter, given in (("sites", sites), ("ids", ids)):
        if isinstance(given, Sized) and not len(given):
            raise _refused(parameter, f"{given!r}, which keeps nothing", "None, which keeps all")
    if l0 is not None and not 0 <= l0 < math.inf:
        raise _refused("l0", f"{l0}", "a number from 0, such as 100")


def _near(name: str, names: Iterable[str], *, most: int = 8) -> str:
    """Names close to a misspelt one, else the first few, as text for an error."""
    known = list(dict.fromkeys(names))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    shown = close or known[:most]
    more = f", ... ({len(known)} in all)" if len(known) > len(shown) else ""
    return ("perhaps " if close else "") + ", ".join(shown) + more


def _by_ids(entries: Sequence[Entry], ids: Ids, source: object) -> list[Entry]:
    if ids is None:
        return list(entries)
    if isinstance(ids, Mapping):
        pairs = [(Site.parse(site), pattern) for site, pattern in ids.items()]
        return [
            replace(entry, hook=site.hook, given=True)
            for site, pattern in pairs
            for entry in _matching(entries, pattern, source)
        ]
    patterns = [ids] if isinstance(ids, str) else list(ids)
    found = [entry for pattern in patterns for entry in _matching(entries, pattern, source)]
    return list(dict.fromkeys(found))


def _matching(entries: Sequence[Entry], pattern: str, source: object) -> list[Entry]:
    """Entries of this id, or of a pattern with ``*``."""
    found = [e for e in entries if e.id == pattern or fnmatch.fnmatchcase(e.id, pattern)]
    if found:
        return found
    there = _near(pattern, [entry.id for entry in entries])
    raise _refused("ids", f"{pattern!r}, which {source} lacks", there)


def _by_sites(entries: list[Entry], sites: Sites, source: object) -> list[Entry]:
    if sites is None:
        return entries
    there = {entry.site for entry in entries if entry.site}
    kinds = sorted({site.kind for site in there})
    if isinstance(sites, str) and "." not in sites:
        kept = [entry for entry in entries if entry.site and entry.site.kind == sites]
        if not kept:
            troubles = list(dict.fromkeys(entry.trouble or "" for entry in entries))
            near = "a source with sites of this version; " + "; ".join(troubles[:2])
            near = _near(sites, kinds) if there else near
            raise _refused("sites", f"{sites!r}, of which {source} has none", near)
        return kept
    wanted = [Site.parse(s) for s in ([sites] if isinstance(sites, str | Site) else sites)]
    missing = [site for site in wanted if site not in there]
    if missing:
        names = [str(site) for site in sorted(there, key=lambda site: site.order)]
        near = _near(str(missing[0]), names)
        raise _refused("sites", f"{missing[0]}, which {source} lacks", near)
    return [entry for entry in entries if entry.site in set(wanted)]


def _one(found: list[Entry], site: Site, l0: float | None, source: object) -> Entry:
    """The entry nearest in L0, the sparser of two as near; the only one where none is asked."""
    if l0 is not None:
        known = [entry for entry in found if entry.l0 is not None]
        if not known:
            raise _refused("l0", f"{l0}, but {source} tells no L0 at {site}", "ids=")
        best = min(known, key=lambda e: (abs((e.l0 or 0) - l0), e.l0 or 0))
        found = [entry for entry in known if entry.l0 == best.l0]
    if len(found) == 1:
        return found[0]
    widths = sorted({entry.width for entry in found if entry.width})
    values = sorted({entry.l0 for entry in found if entry.l0 is not None})
    if len(widths) > 1:
        asked, there = "width", ", ".join(f"{n:,}" for n in widths)
    elif l0 is None and len(values) > 1:
        asked, there = "l0", ", ".join(f"{n:g}" for n in values)
    else:
        asked = "ids"
        there = ", ".join(e.id for e in found[:6]) + ' (patterns such as "*_big" work)'
    got = f"not narrow enough: {source} has {len(found)} SAEs at {site}"
    raise _refused(asked, got, there, SiteError)


def _site(hook: str | None) -> Site | None:
    try:
        return Site.parse(hook) if hook else None
    except SiteError:
        return None


def _refused(
    parameter: str, got: str, there: str, error: type[SaefeatError] = DictionaryError
) -> SaefeatError:
    return error(
        f"load_saes: `{parameter}` is {got}, wanted one that is there: {there}. Likely cause: a"
        ' misspelt name, or a choice that is left open. Try: load_saes("gemma-scope-2b-pt-res",'
        ' sites="resid_post", width="65k", l0=100)'
    )
