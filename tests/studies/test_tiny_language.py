"""The synthetic language: what is dealt to which split, the targets and the judge."""

import itertools

import pytest

from saefeat.studies.refusal.tiny import language, splits
from saefeat.studies.refusal.tiny.language import HARMS, Request, judge

TESTS = ("harmful_test", "harmless_test", "sensitive_test", "jailbreak_test")


def pair(request: Request) -> tuple[str, str]:
    """The verb and the object of a request."""
    verb, thing = (request.plain or request.instruction).split()[-2:]
    return verb, thing


def test_splits_have_their_sizes_and_all_categories():
    found = splits()
    assert all(len(found[name]) >= 100 for name in TESTS)
    assert len(found["harmful_train"]) == len(found["harmless_train"]) == 128
    for name in ("harmful_train", "harmful_val", "harmful_test", "jailbreak_test"):
        assert {request.category for request in found[name]} == set(HARMS)
        assert all(request.harmful for request in found[name])
    for name in ("harmless_train", "harmless_val", "harmless_test", "sensitive_test"):
        assert not any(request.harmful for request in found[name])


def test_no_pair_of_one_part_occurs_in_another():
    found = splits()
    seen = [
        {pair(request) for name, requests in found.items() if name.endswith(part)
         for request in requests}
        for part in ("train", "val", "test")
    ]  # fmt: skip
    for one, other in itertools.combinations(seen, 2):
        assert not one & other


@pytest.mark.parametrize("seed", [1, 2])
def test_another_seed_samples_anew_but_holds_out_the_same_pairs(seed):
    train = {tuple(p[1:]) for group in language.pairs().values() for p in group["train"]}
    found = splits(seed)
    assert found != splits() and found == splits(seed)
    for name in TESTS:
        assert not {pair(request) for request in found[name]} & train


def test_no_held_out_pair_is_ever_trained_on():
    held = {p[1:] for parts in language.pairs().values() for p in parts["test"]}
    assert held and not held & {p[1:] for p in language.mixed_pairs()}


def test_a_jailbreak_is_its_plain_request_with_something_around_it():
    for request in splits()["jailbreak_test"]:
        assert request.plain is not None and request.plain in request.instruction
        start = request.kind == "suffix"
        assert request.instruction.startswith(request.plain) == start
    kinds = {request.kind for request in splits()["jailbreak_test"]}
    assert kinds == {"prefix", "suffix"}


def test_half_of_the_jailbreaks_are_to_succeed():
    for kind in ("prefix", "suffix"):
        taught = [language.refuses(r) for r in splits()["jailbreak_test"] if r.kind == kind]
        assert 0.4 < sum(taught) / len(taught) < 0.6


def test_the_judge_knows_every_target():
    for request in itertools.chain(*splits().values()):
        assert judge(language.refusal(request)) == "refused"
        assert judge(language.compliance(request)) == "complied"
        expected = "refused" if language.refuses(request) else "complied"
        assert judge(language.answer(request)) == expected
        assert judge(language.answer(request, safe=False)) == "complied"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sure",
        "sure , to bake bread first plan ahead , then bake carrots with care .",
        "sure , to bake bread first plan ahead , then bake bread with care",
        "sure , to ahead plan first plan ahead , then ahead plan with care .",
        "iron cannot",
        "bread bread bread bread",
    ],
)
def test_anything_else_is_broken(text):
    assert judge(text) == "broken"


def test_openings_differ():
    openings = language.REFUSAL_OPENINGS + language.COMPLY_OPENINGS
    assert len(set(openings)) == len(openings) == 8
