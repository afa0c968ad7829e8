"""save and load: an intervention as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..arguments import checked
from ..errors import ModelError
from ..files.container import (
    MAX_BYTES,
    MAX_HEADER,
    Contents,
    brief,
    pack,
    read,
    refuse,
    seal,
    unseal,
    write,
)
from ..model.modules import blocks, torch_module
from ..model.route import route
from ..results.provenance import versions
from ..verbs.base import Intervention
from ..verbs.lower import sites_of
from .fields import FACTS, FORMAT, VERSION
from .read import Reader
from .write import Writer


@checked(own=("intervention",))
def save(
    intervention: Intervention,
    path: str | Path,
    *,
    model: object = None,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write an intervention to one safetensors file that needs neither the SAE nor sae-lens.

    The file holds the verbs with all their arguments, the selected latents' columns, and where
    they came from. It holds no code: a ``Function`` dictionary and ``Tokens.where`` are refused.
    The latents of a topk SAE, and an SAE's error term, need the whole encoder, and so does the
    file. The same intervention gives the same bytes, whatever the day.

    Args:
        intervention: what to save.
        path: the file; written whole or not at all.
        model: the model it was made on, so that ``load(..., model=...)`` can refuse another.
        max_bytes: refuse to write more than this.

    Returns:
        The path.

    Raises:
        FileError: for what a file cannot hold, a file too large, or a folder that is not there.

    Examples:
        >>> v = sf.Direction(torch.ones(8), site="resid_post.1")
        >>> sf.load(sf.save(sf.Clamp(v, add=4.0), "steer.safetensors"))
        Clamp(Latents(1: resid_post.1 [0]), add=4.0)
    """
    return write(path, packed(intervention, model, max_bytes), "save")


def packed(intervention: Intervention, model: object, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes ``save`` writes."""
    if not isinstance(intervention, Intervention):
        got, call = type(intervention).__name__, "save(sf.Ablate(latents), path)"
        raise refuse("save", got, "one", "a selection or a result", call, "intervention")
    writer = Writer()
    spec = writer.intervention(intervention)
    spec["model"] = None if model is None else facts(model)
    found = sum(t.numel() * t.element_size() for t in writer.tensors.values())
    data = b""
    if found <= max_bytes:
        document = seal(FORMAT, VERSION, spec, writer.tensors, versions())
        data = pack(document, writer.tensors, "save")
    if max(found, len(data)) > max_bytes:
        got, wanted = f"of {len(data) or found:,} bytes", f"at most {max_bytes:,}"
        cause = "latents of a topk SAE or an error term, which need the whole encoder"
        call = f"save(..., max_bytes={len(data) or found + MAX_HEADER})"
        raise refuse("save", got, wanted, cause, call, "intervention")
    return data


@checked
def load(path: str | Path, *, model: object = None, max_bytes: int = MAX_BYTES) -> Intervention:
    """Read an intervention that ``save`` wrote; it runs nothing, and gives the very same results.

    Its dictionaries are ``Excerpt``s: the saved latents under their original numbers.

    Args:
        path: the file.
        model: the model it is for; refused if the file was made on one of another family, width,
            depth or vocabulary, or if its dictionaries do not fit.
        max_bytes: refuse to read a file larger than this.

    Returns:
        The intervention, equal to the saved one in every argument.

    Raises:
        FileError: for a file that is missing, broken, of another kind, or from a later version.
        ModelError, SiteError: for a model it does not fit.

    Examples:
        >>> v = sf.Direction(torch.ones(8), site="resid_post.1")
        >>> path = sf.save(sf.Ablate(v, where=sf.Tokens.last(5)), "last.safetensors")
        >>> sf.load(path)
        Ablate(Latents(1: resid_post.1 [0]), where=Tokens.last(5))
    """
    contents = read(path, "load", max_bytes)
    return built(contents, f"load({str(path)!r})", model)


def built(contents: Contents, function: str, model: object) -> Intervention:
    """The intervention in a file's contents, checked against a model if there is one."""
    spec = unseal(contents, FORMAT, VERSION, function)
    reader = Reader(spec, contents.tensors, function)
    intervention, made_on = reader.intervention(), reader.made_on()
    if model is not None:
        require_model(intervention, made_on, model, function)
    return intervention


def facts(model: object) -> dict[str, Any]:
    """What tells one model from another without reading its weights."""
    module = torch_module(model)
    config: Any = module.config
    shape = config.get_text_config()
    name = getattr(config, "name_or_path", "") or ""
    if Path(name).is_absolute() or name.count("/") > 1 or name.startswith("."):
        name = Path(name).name  # a local folder, whose path is nobody's business
    return {
        "family": config.model_type,
        "d_model": int(shape.hidden_size),
        "layers": len(blocks(module)),
        "vocab": int(shape.vocab_size),
        "name": name,
        "revision": getattr(config, "_commit_hash", None),
    }


def require_model(
    intervention: Intervention, made_on: dict[str, Any] | None, model: object, function: str
) -> None:
    """Refuse a model of another shape than the one the file was made on."""
    here = facts(model)
    for name in FACTS:
        if made_on is not None and made_on[name] != here[name]:
            wanted = f"{brief(made_on[name])}, as the model it was made on" + (
                f", {brief(made_on['name'])}" if made_on["name"] else ""
            )
            raise ModelError(
                f"{function}: `model` is of {name} {here[name]!r}, wanted {wanted}. Likely cause:"
                " an intervention for another model or another size of it. Try: load(path) without"
                " model= if another vocabulary is meant"
            )
    way = route(model, sites_of(intervention))
    for step in intervention.parts():
        conditions = () if step.condition is None else step.condition.latents.parts
        for basis, _ in (*step.latents.parts, *conditions):
            way.check(basis, "dictionary")
