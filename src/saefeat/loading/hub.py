"""Files of Hugging Face repositories: from the cache where they are there, else downloaded.

A cached file is used without asking whether its repository has changed since, so that a filled
cache needs no network and gives the same dictionaries every time.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import DictionaryError


def fetch(repo: str, file: str) -> Path:
    """The local path of a repository's file.

    Raises:
        DictionaryError: naming the file, if it is neither cached nor within reach.
    """
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


def revision(path: Path) -> str | None:
    """The commit a cached file belongs to: the folder below ``snapshots``."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None
