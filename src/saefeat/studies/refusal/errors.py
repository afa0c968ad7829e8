"""What a study cannot go on with; the command line shows these without a traceback."""

from __future__ import annotations


class DataError(ValueError):
    """A split is missing, empty, malformed, or too small once filtered; the message says which."""


class UsageError(ValueError):
    """Options, or a judge, that cannot be used; the message says what to give."""
