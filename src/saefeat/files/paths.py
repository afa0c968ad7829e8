"""Paths as people write them: wherever a path is given to this library, it is expanded here."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import SaefeatError


def expanded(
    path: str | os.PathLike[str],
    function: str,
    parameter: str = "path",
    error: type[SaefeatError] = SaefeatError,
) -> Path:
    """A path with ``~`` as the home folder, as a shell would have it.

    Without it, ``"~/saes"`` is a folder of that name where the process runs.

    Raises:
        SaefeatError: or ``error``, for a home folder that nobody has.

    Examples:
        >>> from saefeat.files.paths import expanded
        >>> expanded("~/saes", "load_saes").is_absolute()
        True
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as failure:
        raise error(
            f"{function}: `{parameter}` is {str(path)!r}, whose home folder is not known, wanted a"
            " path, or ~ for your own home folder. Likely cause: a user name behind ~ that is not"
            " there. Try: the whole path"
        ) from failure
