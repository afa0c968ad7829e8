"""sae-lens's directory of pretrained SAEs, read without importing sae-lens.

It is one YAML file of 43,000 lines in the installed package; only the asked release's part of it
is parsed, in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import DictionaryError
from . import gemma_scope
from .declaration import l0_in, width_in
from .entries import Entry, near

FILE = "pretrained_saes.yaml"
REFUSED = {
    "mntss_clt_layer_transcoder": "a cross-layer transcoder writes at every later layer; "
    "sae-lens sums its decoders, which is no direction of any site",
}
"""sae-lens conversion → why its releases are not loaded."""


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
    """A release by name.

    Raises:
        DictionaryError: for an unknown name, with the nearest ones.
    """
    if name not in _parts():
        same = [known for known, part in _parts().items() if f"repo_id: {name}\n" in part]
        wanted = "a folder of SAEs, or a release sae-lens lists: " + (
            ", ".join(same) or near(name, _parts(), most=3)
        )
        cause = (
            "a wrong path, or a misspelt release"
            if not same
            else "the repository's name in place of a release of it"
        )
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
        problem=REFUSED.get(conversion),
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
    if conversion in ("mwhanna_transcoder", "mntss_clt_layer_transcoder"):
        layer = re.search(r"\d+", sae_id)
        block = f"blocks.{layer[0]}." if layer else ""
        return block + "mlp.hook_in", block + "hook_mlp_out"
    found = re.search(r"blocks\.\d+\.(?:\w+\.)?hook_[a-z]+(?:_[a-z]+)*", sae_id)
    hook = found[0] if found else None
    if hook and conversion == "connor_rob_hook_z":
        hook = hook.replace(".hook_z", ".attn.hook_z")
    return hook, None
