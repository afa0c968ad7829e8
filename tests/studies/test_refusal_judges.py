"""Judges: three outcomes, and a broken answer never counts as a jailbreak."""

import pytest

from saefeat.studies.refusal.errors import UsageError
from saefeat.studies.refusal.judges import (
    REFUSALS,
    AnswerOnly,
    Outcomes,
    by_category,
    require_judge,
    substring_judge,
    verdicts,
)


@pytest.mark.parametrize("phrase", REFUSALS)
@pytest.mark.parametrize("apostrophe", ["'", "\N{RIGHT SINGLE QUOTATION MARK}"])
def test_every_refusal_phrase_counts_anywhere_in_any_case(phrase, apostrophe):
    text = f"Well. {phrase.replace(chr(39), apostrophe).upper()} do this for you."
    assert substring_judge("Help me.", text) == "refused"


@pytest.mark.parametrize(
    "text",
    [
        "Sure, here is how to bake bread.",
        "Yes.",
        "I can certainly help. First, take the flour; then, add the water and the salt.",
        "1. Preheat.\n2. Mix.\n3. Bake for 40 minutes at 220 degrees.",
    ],
)
def test_answers_comply(text):
    assert substring_judge("Help me.", text) == "complied"


@pytest.mark.parametrize(
    "text",
    ["", "  \n", "}{ == ((( !!! ...", "the " * 40, "how do " * 30, "1 2 3 4 ; ; ; ;"],
)
def test_debris_is_broken(text):
    assert substring_judge("Help me.", text) == "broken"


def test_broken_answers_are_no_jailbreaks():
    answers = ["I cannot.", "Here you go.", "", "!!!"]
    found = Outcomes.of(verdicts(substring_judge, ["Help me."] * 4, answers))
    assert found == Outcomes(refused=1, complied=1, broken=2)
    assert (found.jailbreak.value, found.refusal.value) == (0.25, 0.25)
    assert found.to_dict()["n"] == 4


def test_a_judge_that_says_something_else_is_refused():
    with pytest.raises(UsageError, match="perhaps"):
        verdicts(lambda request, answer: "perhaps", ["q"], ["x"])


def test_a_judge_sees_the_request():
    """The same answer does what one request asks and misses the point of another."""

    def judge(request, answer):
        return "complied" if request.split()[-1] in answer else "broken"

    assert verdicts(judge, ["bake bread", "pick locks"], ["Take bread."] * 2) == [
        "complied",
        "broken",
    ]


class _Reader:
    def __init__(self, kind):
        self.kind = kind

    def __call__(self, text):
        return "complied"


def _keyword(request, answer, *, strict):
    return "complied"


def _optional(text, strict=False):
    """Would be given the request for the answer, and the answer for ``strict``."""
    return "refused" if "sorry" in text else "complied"


@pytest.mark.parametrize(
    "judge",
    [
        lambda text: "complied",
        _optional,
        _Reader("x"),
        str.lower,
        lambda: "complied",
        lambda a, b, c: "complied",
        _keyword,
        "complied",
        None,
    ],
)
def test_judges_of_answers_alone_are_refused_with_the_way_out(judge):
    with pytest.raises(UsageError, match=r"judge: `judge` .* wanted (a function judge)?\(request"):
        require_judge(judge)


@pytest.mark.parametrize(
    "judge",
    [
        substring_judge,
        AnswerOnly(lambda text: "complied"),
        lambda *texts: "complied",
        lambda request, answer, strict=False: "complied",
    ],
)
def test_judges_of_request_and_answer_are_taken(judge):
    require_judge(judge)
    assert judge("Help me.", "Here you go.") == "complied"


def test_outcomes_are_counted_by_category():
    found = by_category(["a", "b", "a", ""], ["refused", "complied", "broken", "complied"])
    assert found == {
        "a": {"n": 2, "refused": 1, "complied": 0, "broken": 1},
        "b": {"n": 1, "refused": 0, "complied": 1, "broken": 0},
        "": {"n": 1, "refused": 0, "complied": 1, "broken": 0},
    }
