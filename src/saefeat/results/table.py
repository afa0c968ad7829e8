"""Tables for pandas, which is an extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import SaefeatError

if TYPE_CHECKING:
    import pandas


def frame(columns: Mapping[str, Any] | Sequence[Any], function: str) -> pandas.DataFrame:
    """A pandas table of columns by name, or of rows.

    Raises:
        SaefeatError: without pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise SaefeatError(
            f"{function}: `pandas` is not installed, wanted pandas 2.2 or later. Likely cause: it"
            " is an extra. Try: pip install 'saefeat[pandas]'"
        ) from error
    return pandas.DataFrame(columns)
