"""Results as pages, tables and figures. pandas and matplotlib are extras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from ..errors import SaefeatError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


def render(template: str, **values: object) -> str:
    """Fill in a Jinja2 template; text from models, prompts and files is escaped.

    Args:
        template: the template's source.
        values: what it names. A name it uses and is not given raises jinja2's ``UndefinedError``.

    Examples:
        >>> sf.results.render("<b>{{ token }}</b>", token="<s>")
        '<b>&lt;s&gt;</b>'
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(**values)


def frame(columns: Mapping[str, Any] | Sequence[Any], function: str) -> pandas.DataFrame:
    """A pandas table of columns by name, or of rows."""
    try:
        import pandas
    except ImportError as error:
        raise SaefeatError(
            f"{function}: `pandas` is not installed, wanted pandas 2.2 or later. Likely cause: it"
            " is an extra. Try: pip install 'saefeat[pandas]'"
        ) from error
    return pandas.DataFrame(columns)


def new_figure(function: str, size: tuple[float, float]) -> Figure:
    """An empty figure of this width and height, inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SaefeatError(
            f"{function}: `matplotlib` is not installed, wanted matplotlib 3.9 or later. Likely"
            " cause: it is an extra. Try: pip install 'saefeat[plots]'"
        ) from error
    # not pyplot's: its list of figures keeps them for ever
    return Figure(figsize=size, layout="constrained")
