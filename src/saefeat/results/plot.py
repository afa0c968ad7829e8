"""Figures of matplotlib, which is an extra."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SaefeatError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(function: str, size: tuple[float, float]) -> Figure:
    """An empty figure, outside pyplot's list of figures, which keeps them for ever.

    Args:
        function: the public function, for the error.
        size: width and height, inches.

    Raises:
        SaefeatError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SaefeatError(
            f"{function}: `matplotlib` is not installed, wanted matplotlib 3.9 or later. Likely"
            " cause: it is an extra. Try: pip install 'saefeat[plots]'"
        ) from error
    return Figure(figsize=size, layout="constrained")
