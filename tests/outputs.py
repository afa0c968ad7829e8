"""How an output shown in a document is compared with what its code prints, on any processor.

Another processor adds in another order, so the last digits of a printed float differ from machine
to machine. What a page, a docstring or a README shows is therefore compared as follows:

* Text is equal, blanks around a number and at line ends aside: a number may be a digit wider.
  ``...`` stands for anything.
* A number with a point or an exponent may be off by one unit of the last digit shown, or by
  ``RELATIVE`` of itself, whichever is more. So may a whole number before ``%``, ``kB``, ``MB`` or
  ``GB``: it is a rounded measure. ``2.``, as torch prints a whole float, has no such unit.
* A whole number is equal: an index, a token, a count of prompts or of answers. Two kinds of count
  are of values beside a threshold, which a rounding can tip over: those before the words in
  ``COUNTED`` may be off by one, or by ``COUNTS`` of themselves.
* The order is as shown. An example in which a rounding decides the order is to be rewritten.

A number stands by itself: what touches a letter, an underscore or a second point (``resid_post.2``,
``70B``, ``0.8.1``, a hash) is text.
"""

from __future__ import annotations

import doctest
import re
from itertools import pairwise

RELATIVE = 1e-2
"""Of a float: far above float32 rounding, also of differences, and far below a wrong result."""
COUNTS = 5e-3
"""Of a count of activations or scores; 1 of 182, 131 of 26237."""
COUNTED = ("activations", "scores")

WHOLE, FLOAT, MEASURE, COUNT = "whole", "float", "measure", "count"
NUMBER = r"(?<![\w.])[+\-−]?(?:\d+\.(?=[\],)])|(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?)(?!\w|\.\d)"
NUMBERS = re.compile(
    rf"(?P<number>{NUMBER})(?=(?P<measure> ?(?:%|kB\b|MB\b|GB\b))?"
    rf"(?P<count> +(?:{'|'.join(COUNTED)})\b)?)"
)
DOTS = "..."


def value(text: str) -> float:
    return float(text.replace("−", "-"))


def kind(found: re.Match[str]) -> str:
    if re.search(r"[.e]", found["number"]):
        return FLOAT
    return MEASURE if found["measure"] else COUNT if found["count"] else WHOLE


def unit(text: str) -> float:
    """What one more in the last digit shown would add."""
    digits, _, exponent = text.partition("e")
    _, point, decimals = digits.partition(".")
    if point and not decimals:  # torch's `2.`
        return 0.0
    return 10.0 ** (int(exponent or 0) - len(decimals))


def near(printed: str, shown: str, what: str) -> bool:
    if printed == shown:
        return True
    wanted = value(shown)
    allowed = (
        max(1.0, COUNTS * abs(wanted))
        if what == COUNT
        else max(unit(shown), RELATIVE * abs(wanted))
    )
    return abs(value(printed) - wanted) <= allowed * (1 + 1e-9)


def literal(text: str, after: bool, before: bool) -> str:
    """A pattern for text between two numbers: blanks beside a number count as one or none."""
    if after:
        text = text.lstrip(" ")
    if before:
        text = text.rstrip(" ")
    return (" *+" if after else "") + re.escape(text) + (" *+" if before else "")


def pattern(shown: str) -> tuple[re.Pattern[str], list[tuple[str, str]]]:
    """What the printed text looks like, with a group for every number that need not be equal."""
    loose: list[tuple[str, str]] = []
    parts: list[str] = []
    for index, piece in enumerate(shown.split(DOTS)):
        if index:
            parts.append(".*?")
        found = list(NUMBERS.finditer(piece))
        ends = [0, *(at for one in found for at in one.span("number")), len(piece)]
        for place, (start, end) in enumerate(pairwise(ends)):
            if place % 2 == 0:  # text before, between and after the numbers
                parts.append(literal(piece[start:end], place > 0, place // 2 < len(found)))
            elif (what := kind(found[place // 2])) == WHOLE:
                parts.append(rf"(?<![\w.]){re.escape(piece[start:end])}(?!\w|\.\d)")
            else:
                loose.append((piece[start:end], what))
                parts.append(f"((?>{NUMBER}))")  # atomic: a number is matched one way alone
    return re.compile("".join(parts), re.DOTALL), loose


def plain(text: str) -> str:
    """Without blanks at line ends and empty lines around."""
    return "\n".join(map(str.rstrip, text.splitlines())).strip("\n")


def difference(printed: str, shown: str) -> str | None:
    """Why what was printed is not what is shown; None where it is."""
    printed, shown = plain(printed), plain(shown)
    if exactly(printed, shown):
        return None
    lines = printed.split("\n"), shown.split("\n")
    # a line at a time where that will do: a pattern of a whole page backtracks for minutes
    if len(lines[0]) == len(lines[1]) > 1:
        found = (difference(*pair) for pair in zip(*lines, strict=True))
        first = next((one for one in found if one is not None), None)
        if first is None or DOTS not in shown:
            return first
    form, loose = pattern(shown)
    match = form.fullmatch(printed)
    if match is None:
        return of_text(printed, shown)
    for got, (wanted, what) in zip(match.groups(), loose, strict=True):
        if not near(got, wanted, what):
            return f"{got} was printed where {wanted} is shown: more than a rounding"
    return None


def exactly(printed: str, shown: str) -> bool:
    return doctest.OutputChecker().check_output(shown + "\n", printed + "\n", doctest.ELLIPSIS)


def of_text(printed: str, shown: str) -> str:
    """The first line that differs, if the lines go together one by one."""
    got, wanted = printed.split("\n"), shown.split("\n")
    if len(got) == len(wanted) > 1:
        for one, other in zip(got, wanted, strict=True):
            if (why := difference(one, other)) is not None:
                return why
    if len(got) == len(wanted) == 1:
        return f"{printed!r} was printed where {shown!r} is shown"
    return f"{len(got)} lines were printed where {len(wanted)} are shown, or their text differs"


class Checker(doctest.OutputChecker):
    """doctest's comparison of an example, and after it the one above.

    Examples in docstrings do not count blanks (NORMALIZE_WHITESPACE), as before.
    """

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if super().check_output(want, got, optionflags):
            return True
        want = want.replace(doctest.BLANKLINE_MARKER, "")
        return difference(" ".join(got.split()), " ".join(want.split())) is None
