"""HTML from templates in which every value is escaped."""

from __future__ import annotations

from jinja2 import Environment, StrictUndefined


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
