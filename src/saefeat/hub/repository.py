"""push and pull: saved interventions on the Hugging Face Hub."""

from __future__ import annotations

from typing import Any, NoReturn

from ..errors import FileError
from ..files.container import MAX_BYTES, read, refuse, unpack
from ..verbs.base import Intervention
from .card import FILE, card
from .files import built, packed

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
    readme = card(unpack(data, "push"), repo, file).encode()
    files = [CommitOperationAdd(file, data), CommitOperationAdd("README.md", readme)]
    try:
        validate_repo_id(repo)
        api = HfApi(endpoint=endpoint, token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        commit: Any = api.create_commit(repo, files, commit_message=message)
    except Exception as error:
        _explain(error, "push", repo, f"sf.hub.push(intervention, {repo!r}, token=...)")
    return commit.oid


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
    """Refuse a file that says it is too large, before it is on this machine's disk.

    A hub out of reach says nothing; the file may be in the cache, and is measured there.

    Raises:
        FileError: naming its size.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        url = hf_hub_url(repo, file, revision=revision, endpoint=endpoint)
        size = get_hf_file_metadata(url, token=token, endpoint=endpoint).size or 0
    except HFValidationError:
        raise
    except Exception:  # the download will say it better
        return
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
    """What the hub's client raised, as our own error; what is no fault of the hub passes through.

    Raises:
        FileError: with the likely cause.
    """
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
