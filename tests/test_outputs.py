"""The comparison of shown outputs: another processor's digits pass, a wrong result does not."""

from __future__ import annotations

import doctest

import pytest

from outputs import COUNTED, Checker, difference

SAME = {
    "equal": ("loss 0.123", "loss 0.123"),
    "another processor's digits": (
        "tensor([-1.5211e+01, -4.4258e-03])",
        "tensor([-1.5211e+01, -4.4256e-03])",
    ),
    "one unit": ("P = 0.0007, largest 11.2", "P = 0.0006, largest 11.1"),
    "a unit of a rounded half": ("rank 0.97 [0.96, 1.00]", "rank 0.98 [.97, .99]"),
    "a digit wider": ("resid_post.2   9.98  ok", "resid_post.2  10.02  ok"),
    "at the start of a line": ("\n 9.99\n10.00", "10.00\n10.00"),
    "left aligned": ("9.99  of the change", "10.02 of the change"),
    "zero's sign": ("[0.0, -0.0]", "[-0.0, 0.0]"),
    "no longer negative": ("tensor([ 0.0000, 1.0000])", "tensor([-0.0001, 1.0000])"),
    "another notation": ("x 1e-05, -0.0044", "x 1.0e-05, -4.4e-03"),
    "torch's whole floats": ("tensor([2.0001, 3.])", "tensor([2., 3.])"),
    "a minus sign": ("−4.4258e-03 of it", "−4.4256e-03 of it"),
    "per cent": ("36% [22%, 56%], 0.1 %", "37% [21%, 56%], 0.2 %"),
    "sizes": ("6 kB, 1,603 kB, 40.8 MB", "5 kB, 1,601 kB, 40.7 MB"),
    "a count beside a threshold": ("183 activations changed", "182 activations changed"),
    "a large count": ("Attribution(26240 scores, at", "Attribution(26237 scores, at"),
    "anything": ("a b c\nd 0.11", "a ...\nd 0.1..."),
    "anything between numbers": ("in 34.02 s, 5 of 6: 1.001", "in ... s, 5 of 6: 1.000"),
    "blanks at line ends": ("a  \nb", "a\nb \n"),
    "a range": ("0..14 generated, 24 prompt", "0..14 generated, 24 prompt"),
    "a sum": ("1.501-2.502", "1.5-2.5"),
}
OTHER = {
    "a wrong number": ("score 0.31", "score 0.27"),
    "two units of a small one": ("P 0.0009", "P 0.0006"),
    "two percent": ("metric -6.377", "metric -6.505"),
    "a sign": ("+0.272", "-0.272"),
    "a sign that is missing": ("gap 9.36", "gap -9.36"),
    "ten times": ("[1e-04]", "[1e-05]"),
    "not a number": ("tensor([nan, 1.0])", "tensor([0.0, 1.0])"),
    "infinite": ("tensor([inf])", "tensor([1.0])"),
    "an index": ("Latents(2: resid_post.2 [42, 374])", "Latents(2: resid_post.2 [42, 373])"),
    "an index without brackets": ("resid_post.2 373: +0.162", "resid_post.2 372: +0.162"),
    "a layer": ("resid_post.3 0.5", "resid_post.2 0.5"),
    "a count of prompts": ("scores, 33 prompts", "scores, 32 prompts"),
    "a count of answers": ("{'refused': 41}", "{'refused': 42}"),
    "a count before another word": ("183 tokens changed", "182 tokens changed"),
    "counts far apart": ("185 activations changed", "182 activations changed"),
    "large counts far apart": ("Attribution(26400 scores", "Attribution(26237 scores"),
    "a count of none": ("0 activations", "2 activations"),
    "bytes": ("1,041 bytes", "1,040 bytes"),
    "a version": ("nnsight 0.8.2", "nnsight 0.8.1"),
    "a date": ("2026-11-29", "2026-11-28"),
    "a hash": ("sha 3f9a02", "sha 3f9a01"),
    "a hash of digits": ("sha 12345679", "sha 12345678"),
    "a model's name": ("71B 40.7 MB", "70B 40.7 MB"),
    "a range's end": ("0..15 generated", "0..14 generated"),
    "two percent points": ("34% of", "36% of"),
    "a word": ("resid_post.2 0.5 held", "resid_post.2 0.5 kept"),
    "a letter more": ("0.5s", "0.5"),
    "a swapped order": (
        "resid_post.2 42: +0.272, resid_post.3 29: +0.11",
        "resid_post.3 29: +0.11, resid_post.2 42: +0.272",
    ),
    "lines in another order": ("AtP 0.98\nIG 0.87", "IG 0.87\nAtP 0.98"),
    "a line that is missing": ("a 0.1\nc 0.3", "a 0.1\nb 0.2\nc 0.3"),
    "a line too many": ("a 0.1\nb 0.2", "a 0.1"),
    "an empty line": ("a 0.1\n\nb 0.2", "a 0.1\nb 0.2"),
    "a number that is missing": ("[1.0, 2.0]", "[1.0, 2.0, 3.0]"),
    "a number too many": ("[1.0, 2.0, 3.0]", "[1.0, 2.0]"),
    "two numbers in one": ("[12.0]", "[1 2.0]"),
    "nothing": ("", "0.1"),
    "indented": ("  top 0.1", "top 0.1"),
    "what stands beside anything": ("... 0.3", "a ... 0.1"),
    "torch's whole floats": ("tensor([3.])", "tensor([2.])"),
}


@pytest.mark.parametrize("case", SAME)
def test_a_rounding_is_no_difference(case):
    assert difference(*SAME[case]) is None


@pytest.mark.parametrize("case", OTHER)
def test_anything_else_is_one(case):
    printed, shown = OTHER[case]
    assert difference(printed, shown)
    assert difference(f"first 1.0\n{printed}\nlast 2", f"first 1.0\n{shown}\nlast 2")


def test_what_differs_is_named():
    shown = "a 0.10\nb 0.20\nc 3"
    assert "0.31 was printed where 0.20 is shown" in str(difference("a 0.1\nb 0.31\nc 3", shown))
    assert "'c 4' was printed where 'c 3' is shown" in str(difference("a 0.1\nb 0.2\nc 4", shown))
    assert "2 lines were printed where 3" in str(difference("a 0.1\nb 0.2", shown))


def test_only_two_words_make_a_count_loose():
    """Whoever adds one should say why: a count is exact for every reader."""
    assert COUNTED == ("activations", "scores")


def test_docstrings_are_compared_by_the_same_rules():
    def failures(example: str) -> int:
        test = doctest.DocTestParser().get_doctest(example, {}, "x", None, 0)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        silent = lambda _: None  # noqa: E731
        return doctest.DocTestRunner(Checker(), optionflags=flags).run(test, out=silent).failed

    assert failures(">>> print('tensor([ 0.6931, -1.0000])')\ntensor([0.6932, -1.0000])\n") == 0
    assert failures(">>> print('a\\n\\n1.001')\na\n<BLANKLINE>\n1.000\n") == 0
    assert failures(">>> 0.5\n0.7\n") == 1
    assert failures(">>> print('[1, 2]')\n[1, 3]\n") == 1
    assert failures(">>> print('1.0')\n") == 1
    assert failures(">>> 1 / 0\nTraceback (most recent call last):\nZeroDivisionError: ...\n") == 0
    assert failures(">>> 1 / 0\nTraceback (most recent call last):\nValueError: ...\n") == 1
