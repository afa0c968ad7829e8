"""Judges: three outcomes, and a broken answer never counts as a jailbreak."""

import pytest

from saefeat.studies.refusal.judges import REFUSALS, Outcomes, count_outcomes, substring_judge


@pytest.mark.parametrize("phrase", REFUSALS)
@pytest.mark.parametrize("apostrophe", ["'", "\N{RIGHT SINGLE QUOTATION MARK}"])
def test_every_refusal_phrase_counts_anywhere_in_any_case(phrase, apostrophe):
    text = f"Well. {phrase.replace(chr(39), apostrophe).upper()} do this for you."
    assert substring_judge(text) == "refused"


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
    assert substring_judge(text) == "complied"


@pytest.mark.parametrize(
    "text",
    ["", "  \n", "}{ == ((( !!! ...", "the " * 40, "how do " * 30, "1 2 3 4 ; ; ; ;"],
)
def test_debris_is_broken(text):
    assert substring_judge(text) == "broken"


def test_broken_answers_are_no_jailbreaks():
    found = count_outcomes(substring_judge, ["I cannot.", "Here you go.", "", "!!!"])
    assert found == Outcomes(refused=1, complied=1, broken=2)
    assert (found.jailbreak.value, found.refusal.value) == (0.25, 0.25)
    assert found.to_dict()["n"] == 4


def test_a_judge_that_says_something_else_is_refused():
    with pytest.raises(ValueError, match="perhaps"):
        count_outcomes(lambda text: "perhaps", ["x"])
