"""Checks of arguments that many functions share: one for each kind.

Each names the function and the parameter as the user wrote them, says what came and what was
wanted, and raises the error class it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import SaefeatError


def one_of(
    function: str,
    parameter: str,
    given: object,
    choices: Sequence[object],
    *,
    error: type[SaefeatError] = SaefeatError,
) -> None:
    """Refuse anything but one of a few values.

    Raises:
        SaefeatError: or ``error``, listing the choices.
    """
    if any(type(given) is type(choice) and given == choice for choice in choices):
        return
    wanted = " or ".join(f'"{c}"' if isinstance(c, str) else repr(c) for c in choices)
    raise error(
        f"{function}: `{parameter}` is {given!r}, wanted {wanted}. Try:"
        f" {function}(..., {parameter}={choices[0]!r})"
    )


def whole(
    function: str,
    parameter: str,
    given: Any,
    least: int = 1,
    *,
    error: type[SaefeatError] = SaefeatError,
) -> None:
    """Refuse anything but a whole number from ``least`` on; True and 3.0 are not whole numbers.

    Raises:
        SaefeatError: or ``error``, naming the parameter.
    """
    if type(given) is int and given >= least:
        return
    raise error(
        f"{function}: `{parameter}` is {given!r}, wanted an integer from {least}. Try:"
        f" {function}(..., {parameter}={max(least, 8)})"
    )
