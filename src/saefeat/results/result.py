"""What all results share: a page in notebooks, and what ``.save`` means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nnsight

from ..errors import FileError
from .formats import render

PAGE = '<div class="saefeat-result"><pre style="white-space:pre-wrap">{{ text }}</pre></div>'


class Result:
    """A result: in a notebook it shows as it prints, and ``save`` is nnsight's or refused.

    nnsight gives every object a ``save``, which marks it as what a trace returns. So a call that
    is meant to write a file would get an error about traces.
    """

    def _repr_html_(self) -> str:
        return render(PAGE, text=repr(self))

    def save(self, path: str | Path | None = None) -> Any:
        """Inside a trace, without a path: keep this value, as ``nnsight.save`` does.

        Args:
            path: nothing; this kind of result has no file.

        Returns:
            The result itself.

        Raises:
            FileError: for a path, or outside a trace.
        """
        if path is None:
            return kept(self, "its columns, as to_pandas() or its fields have them")
        name = type(self).__name__
        raise FileError(
            f"{name}.save: `path` is {str(path)!r}, wanted none: there is no file of a {name}."
            " Likely cause: it was taken for Attribution.save. Try: run(..., checkpoint=folder),"
            " which resumes, to_pandas() where there is one, or the tensors in its fields"
        )


def kept(result: Any, instead: str) -> Any:
    """Mark a value as what the trace around returns."""
    name = type(result).__name__
    try:
        return nnsight.save(result)
    except ValueError as error:
        raise FileError(
            f"{name}.save: `path` is not given and there is no trace around the call, wanted one of"
            f" the two. Likely cause: `.save()` is nnsight's, for values made inside a trace. Try:"
            f" {instead}"
        ) from error
