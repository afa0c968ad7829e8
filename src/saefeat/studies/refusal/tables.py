"""Tables as aligned plain text: a title, what is measured, columns and rows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .stats import Estimate


@dataclass(frozen=True)
class Table:
    """A finished table.

    Attributes:
        title: what it is about.
        caption: what is measured, on how many prompts, and which direction is good.
        columns: headings.
        rows: cells as text.
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def table(
    title: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> Table:
    """A table of cells that are text, numbers or estimates.

    Raises:
        ValueError: for a row with another number of cells than there are columns.
    """
    cells = tuple(tuple(cell(value) for value in row) for row in rows)
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"table {title!r}: {len(row)} cells in a row of {len(columns)}: {row}")
    return Table(title, caption, tuple(columns), cells)


def cell(value: object) -> str:
    """One cell's text: estimates with their interval, numbers with three digits."""
    if isinstance(value, Estimate):
        return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def render(shown: Table, width: int = 100) -> str:
    """The table as text that ends with a newline; the first column is aligned on the left."""
    grid = [shown.columns, *shown.rows]
    widths = [max(len(row[column]) for row in grid) for column in range(len(shown.columns))]
    lines = [shown.title, *textwrap.wrap(shown.caption, width), ""]
    for number, row in enumerate(grid):
        first, *rest = zip(row, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(text.rjust(size) for text, size in rest)]
        lines.append("  ".join(aligned).rstrip())
        if number == 0:
            lines.append("  ".join("-" * size for size in widths))
    return "\n".join(lines) + "\n"
