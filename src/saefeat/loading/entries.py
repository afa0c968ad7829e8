"""Choosing among the SAEs of a release or a folder, by what is known before any is read."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import DictionaryError, SiteError
from ..model.sites import Site
from .declaration import width_of

Sites = str | Site | Iterable[Site | str] | None
Ids = str | Mapping[Site | str, str] | Iterable[str] | None


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


def choose(
    entries: Sequence[Entry],
    source: object,
    *,
    sites: Sites = None,
    width: int | str | None = None,
    l0: float | None = None,
    ids: Ids = None,
) -> list[Entry]:
    """One entry a site.

    Raises:
        DictionaryError: for names that are not there, with near misses; for entries that cannot
            be loaded.
        SiteError: where several are left for one site.
    """
    kept = _by_ids(entries, ids, source)
    kept = _by_sites(kept, sites, source)
    kept = _by_width(kept, width, source)
    _all_loadable(kept, source)
    by_site: dict[Site, list[Entry]] = {}
    for entry in kept:
        if entry.site is not None:
            by_site.setdefault(entry.site, []).append(entry)
    return [_one(found, site, l0, source) for site, found in by_site.items()]


def near(name: str, names: Iterable[str], *, most: int = 8) -> str:
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
    raise _error(
        "ids", f"{pattern!r}, which {source} lacks", near(pattern, [e.id for e in entries])
    )


def _by_sites(entries: list[Entry], sites: Sites, source: object) -> list[Entry]:
    if sites is None:
        return entries
    there = {entry.site for entry in entries if entry.site}
    kinds = sorted({site.kind for site in there})
    if isinstance(sites, str) and "." not in sites:
        kept = [entry for entry in entries if entry.site and entry.site.kind == sites]
        if not kept:
            unread = _unreadable(entries) if not there else near(sites, kinds)
            raise _error("sites", f"{sites!r}, of which {source} has none", unread)
        return kept
    wanted = [Site.parse(s) for s in ([sites] if isinstance(sites, str | Site) else sites)]
    missing = [site for site in wanted if site not in there]
    if missing:
        names = [str(site) for site in sorted(there, key=lambda site: site.order)]
        raise _error("sites", f"{missing[0]}, which {source} lacks", near(str(missing[0]), names))
    return [entry for entry in entries if entry.site in set(wanted)]


def _by_width(entries: list[Entry], width: int | str | None, source: object) -> list[Entry]:
    if width is None:
        return entries
    wanted = width_of(width)
    kept = [entry for entry in entries if entry.width == wanted]
    if kept:
        return kept
    known = sorted({entry.width for entry in entries if entry.width})
    told = ", ".join(f"{n:,}" for n in known) or "no width that its names tell; use ids="
    raise _error("width", f"{width!r} ({wanted:,} latents), which {source} lacks", told)


def _all_loadable(entries: list[Entry], source: object) -> None:
    bad = [entry for entry in entries if entry.trouble]
    if not bad:
        return
    raise DictionaryError(
        f"load_saes: `source` is {source}, of which {len(bad)} of {len(entries)} chosen cannot be"
        f" loaded ({bad[0].id}: {bad[0].trouble}), wanted dictionaries that this version can"
        " compute with. Likely cause: a kind of site, layout or architecture it does not have. Try:"
        ' load_saes(source, sites="resid_post") for those that lie in the residual stream, or'
        ' ids={"resid_post.3": id} where the site is known to you'
    )


def _one(found: list[Entry], site: Site, l0: float | None, source: object) -> Entry:
    """The entry nearest in L0, the sparser of two as near; the only one where none is asked."""
    if l0 is not None:
        known = [entry for entry in found if entry.l0 is not None]
        if not known:
            raise _error("l0", f"{l0}, but {source} tells no L0 at {site}", "ids=")
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
        asked, there = (
            "ids",
            ", ".join(e.id for e in found[:6]) + ' (patterns such as "*_big" work)',
        )
    got = f"not narrow enough: {source} has {len(found)} SAEs at {site}"
    raise SiteError(_said(asked, got, there))


def _unreadable(entries: list[Entry]) -> str:
    troubles = list(dict.fromkeys(entry.trouble or "" for entry in entries))
    return "a source with sites of this version; " + "; ".join(troubles[:2])


def _site(hook: str | None) -> Site | None:
    try:
        return Site.parse(hook) if hook else None
    except SiteError:
        return None


def _error(parameter: str, got: str, there: str) -> DictionaryError:
    return DictionaryError(_said(parameter, got, there))


def _said(parameter: str, got: str, there: str) -> str:
    return (
        f"load_saes: `{parameter}` is {got}, wanted one that is there: {there}. Likely cause: a"
        ' misspelt name, or a choice that is left open. Try: load_saes("gemma-scope-2b-pt-res",'
        ' sites="resid_post", width="65k", l0=100)'
    )
