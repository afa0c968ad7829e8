"""push and pull: saved interventions on the Hugging Face Hub, and the card beside them."""

from __future__ import annotations

from typing import Any, NoReturn

from ..arguments import checked
from ..errors import FileError
from ..files.container import MAX_BYTES, Contents, read, refuse, unpack
from ..verbs.base import Intervention
from .files import built, packed

FILE = "intervention.safetensors"
"""The file of a repository that ``pull`` takes unless told otherwise."""

_CAUSES = {
    "RepositoryNotFoundError": "no such repository, or a private one and no token for it",
    "GatedRepoError": "a gated repository whose conditions were not accepted",
    "RevisionNotFoundError": "no such branch, tag or commit",
    "RemoteEntryNotFoundError": "the repository has no such file",
    "LocalTokenNotFoundError": "nobody is logged in on this machine",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "LocalEntryNotFoundError": "the hub is out of reach, and the file is not in the cache",
    "TransportError": "the hub is out of reach",  # httpx: refused, timed out, broken off
    "HFValidationError": "not the name of a repository",
}


@checked(own=("intervention",))
def push(
    intervention: Intervention,
    repo: str,
    *,
    model: object = None,
    file: str = FILE,
    private: bool = True,
    message: str = "Save an intervention",
    token: str | None = None,
    endpoint: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> str:
    """Save an intervention in a repository of the Hugging Face Hub, with a model card.

    The repository is made if it is not there. File and card come in one commit; the card says what
    the file's own header says, and replaces a card that is there.

    Args:
        intervention: what to save, as for ``save``.
        repo: ``"user/name"``.
        model: the model it was made on, as for ``save``.
        file: the file's name in the repository.
        private: whether a new repository is private.
        message: the commit's message.
        token: an access token; the one of ``hf auth login`` by default.
        endpoint: another hub than huggingface.co.
        max_bytes: refuse to push more than this.

    Returns:
        The commit, for ``pull(repo, revision=...)``.

    Raises:
        FileError: for what a file cannot hold, and when the hub refuses or is out of reach.

    Examples:
        >>> try:
        ...     sf.hub.push(sf.Ablate(sf.Neurons("resid_post.1", 8)), "no name")
        ... except sf.errors.FileError as error:
        ...     "not the name of a repository" in str(error)
        True
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import validate_repo_id

    _require_name(file, "push")
    data = packed(intervention, model, max_bytes)
    readme = _card(unpack(data, "push"), repo, file).encode()
    files = [CommitOperationAdd(file, data), CommitOperationAdd("README.md", readme)]
    try:
        validate_repo_id(repo)
        api = HfApi(endpoint=endpoint, token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        commit: Any = api.create_commit(repo, files, commit_message=message)
    except Exception as error:
        _explain(error, "push", repo, f"sf.hub.push(intervention, {repo!r}, token=...)")
    return commit.oid


@checked
def pull(
    repo: str,
    *,
    revision: str | None = None,
    model: object = None,
    file: str = FILE,
    token: str | None = None,
    endpoint: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Intervention:
    """Load an intervention from a repository of the Hugging Face Hub.

    What comes from a stranger runs nothing when it is loaded; what it does to a model is another
    matter, so look at it before you use it, and name the commit you looked at.

    Args:
        repo: ``"user/name"``.
        revision: a commit, tag or branch; the newest by default.
        model: refuse an intervention made on another model, as in ``load``.
        file: the file's name in the repository.
        token: an access token; the one of ``hf auth login`` by default.
        endpoint: another hub than huggingface.co.
        max_bytes: refuse to read a file larger than this.

    Returns:
        The intervention.

    Raises:
        FileError: for a repository or file that is not there or out of reach, and as in ``load``.
        ModelError, SiteError: for a model it does not fit.

    Examples:
        >>> try:
        ...     sf.hub.pull("no name")
        ... except sf.errors.FileError as error:
        ...     "not the name of a repository" in str(error)
        True
    """
    from huggingface_hub import hf_hub_download

    _require_name(file, "pull")
    try:
        _require_small(repo, file, revision, token, endpoint, max_bytes)
        path = hf_hub_download(repo, file, revision=revision, token=token, endpoint=endpoint)
    except Exception as error:
        _explain(error, "pull", repo, f"sf.hub.pull({repo!r}, file=..., token=...)")
    function = f"pull({repo!r})"
    return built(read(path, function, max_bytes), function, model)


def _require_small(
    repo: str, file: str, revision: str | None, token: str | None, endpoint: str | None, most: int
) -> None:
    """Refuse a file that says it is too large, before it is on this machine's disk."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        url = hf_hub_url(repo, file, revision=revision, endpoint=endpoint)
        size = get_hf_file_metadata(url, token=token, endpoint=endpoint).size or 0
    except HFValidationError:
        raise
    except Exception:
        return  # the download says it better; a file in the cache is measured when it is read
    if size > most:
        cause = "a file with whole dictionaries, or not one of this library's"
        call, got = f"pull(..., max_bytes={size}) if it is meant", f"{file!r}, of {size:,} bytes"
        raise refuse("pull", got, f"at most {most:,} bytes", cause, call, "file")


def _require_name(file: str, function: str) -> None:
    """A safetensors file's plain name or path within the repository."""
    parts = file.replace("\\", "/").split("/")
    if not file.endswith(".safetensors") or any(part in ("", ".", "..") for part in parts):
        wanted, cause = "a path in the repository that ends in .safetensors", "a local path"
        raise refuse(function, repr(file), wanted, cause, f'file="{FILE}"', "file")


def _explain(error: Exception, function: str, repo: str, call: str) -> NoReturn:
    """What the hub's client raised, as our own error; what is no fault of the hub passes."""
    from huggingface_hub.errors import EntryNotFoundError

    if isinstance(error, FileError):
        raise error
    names = [cls.__name__ for cls in type(error).__mro__]
    known = next((_CAUSES[name] for name in names if name in _CAUSES), None)
    if known is None and not isinstance(error, (OSError, ValueError, EntryNotFoundError)):
        raise error
    first = str(error).strip().splitlines()[:1]
    cause = known or f"{type(error).__name__}: {''.join(first)[:300]}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) and function == "push":
        cause = "no token, or one that may not write there"
    wanted = "a repository and a file within reach"
    raise refuse(function, repr(repo), wanted, cause, call, "repo") from error


_README = """---
library_name: saefeat
tags:
- saefeat
- steering
- sparse-autoencoder
{base}---

# {title}

An intervention on a language model, saved by [saefeat](https://pypi.org/project/saefeat/).

    {shown}

## Use it

```python
import saefeat as sf

intervention = {call}
with sf.hooked(model, intervention):
    model.generate(...)
```

It needs neither the sparse autoencoder nor sae-lens. The file holds no code.

## Made on

{model}

## What it reads and writes

| dictionary | reads | writes | latents | origin | fingerprint |
|---|---|---|---|---|---|
{rows}

Format version {version}; written with {written}; SHA-256 of the contents `{sha}`.
"""


def _card(contents: Contents, repo: str, file: str) -> str:
    """The README, made from the file's own document, so that it cannot say anything else."""
    document = contents.document
    spec, made_on = document["spec"], document["spec"].get("model")
    name = made_on["name"] if made_on else ""
    made = "The file does not say; it fits any model with these sites and widths."
    if made_on:
        shape = "family {family}, {layers} layers, d_model {d_model}, vocabulary {vocab}"
        made = f"{_code(name or 'a model without a name')}: {shape.format(**made_on)}"
        made += f"; revision {_code(made_on['revision'])}" if made_on["revision"] else ""
    shown = repr(built(contents, "card", None)).replace(" | ", "\n    | ")
    return _README.format(
        base=f"base_model: {name}\n" if _is_repository(name) else "",
        title=repo.split("/")[-1],
        shown="\n    ".join(line.strip() for line in shown.splitlines()),
        call=f"sf.hub.pull({repo!r})" if file == FILE else f"sf.hub.pull({repo!r}, file={file!r})",
        model=made,
        rows="\n".join(map(_row, spec["dictionaries"])),
        version=document["version"],
        written=", ".join(f"{k} {v}" for k, v in sorted(document["written"].items())),
        sha=document["sha256"],
    )


def _is_repository(name: str) -> bool:
    """Whether a model's name is one that the hub could link to."""
    owner, _, model = name.partition("/")
    return all(
        part and part.replace("-", "").replace(".", "").replace("_", "").isalnum()
        for part in (owner, model)
    )


def _code(text: object) -> str:
    """Text from a file as code on one line; it cannot end the span, the cell or the line."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return "`" + plain.replace("`", "'").replace("|", "¦") + "`"


def _row(entry: dict[str, Any]) -> str:
    count = len({i for selection in entry["selections"] for i in selection["latents"]})
    cells = (
        _code(entry["name"]),
        entry["site"],
        entry.get("write_site", entry["site"]),
        f"{count} of {entry['d_sae']:,}" if "d_sae" in entry else str(count),
        _code(entry["origin"]) if entry.get("origin") else "",
        _code(entry["fingerprint"]) if entry.get("fingerprint") else "",
    )
    return "| " + " | ".join(cells) + " |"
