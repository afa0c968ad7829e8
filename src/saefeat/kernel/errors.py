"""The base of all errors, which the kernel raises itself: it travels, and is read as text there."""

from __future__ import annotations


class SaefeatError(ValueError):
    """Base of every error raised on purpose by saefeat.

    Examples:
        >>> issubclass(sf.errors.SiteError, sf.SaefeatError)
        True
    """
