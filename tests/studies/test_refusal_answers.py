"""Every answer is kept whole, with its request, category and outcome; the results show a few."""

import json

from saefeat.studies.refusal.answers import answer_lines, shortened

LONG = "word " * 400


def record(n, outcome="complied"):
    return {"request": f"q{n}", "category": "c", "outcome": outcome, "answer": f"{n} {LONG}"}


DATA = {
    "layers": {"directions": [[0.5]], "rows": [{"layer": 2, "records": [record(0)]}]},
    "suppression": {
        "held-out": {"n": 9, "rows": [{"method": "AS", "records": [record(n) for n in range(9)]}]}
    },
    "side effects": [
        {"method": "base", "loss": [1.0], "outcomes": {"harmless_test": {"records": [record(1)]}}}
    ],
    "induction": {
        "reference": [{"method": "base", "value": None, "records": [record(3)]}],
        "rows": [{"method": "AP", "value": 4.0, "records": [record(4, "refused")]}],
    },
}


def test_each_answer_is_a_line_that_says_what_it_answers():
    lines = [json.loads(line) for line in answer_lines(DATA)]
    assert len(lines) == 13
    assert lines[0] == {"section": "layers", "layer": 2, "number": 0, **record(0)}
    assert [line["number"] for line in lines[1:10]] == list(range(9))
    assert all(line["section"] == "suppression/held-out" for line in lines[1:10])
    assert lines[10]["section"] == "side effects/harmless_test"
    assert lines[10]["method"] == "base"
    assert "value" not in lines[11] and lines[12]["value"] == 4.0
    assert all(line["answer"].endswith(LONG) for line in lines), "never cut"


def test_results_hold_the_first_few_whole():
    found = shortened(DATA, 2)
    row = found["suppression"]["held-out"]["rows"][0]
    assert row == {"method": "AS", "examples": [record(0), record(1)]}
    assert found["layers"]["directions"] == [[0.5]]
    assert "records" not in json.dumps(found)
