"""Identity: code, judge, weights and tokenizer; whatever differs is never taken for the same."""

import functools
import re
from dataclasses import dataclass

import pytest
import torch

from saefeat.studies.refusal import identity, tiny
from saefeat.studies.refusal.identity import (
    code,
    judge_identity,
    model_identity,
    weights_fingerprint,
)
from saefeat.studies.refusal.judges import AnswerOnly, substring_judge
from saefeat.studies.refusal.setup import TINY, tiny_lab


def strict(request, answer):
    return "refused"


def loose(request, answer):
    return "complied"


@dataclass(frozen=True)
class Phrases:
    words: tuple

    def __call__(self, request, answer):
        return "refused" if any(word in answer for word in self.words) else "complied"


class Classifier:
    """Holds what has no source."""

    def __init__(self, weight):
        self.head = torch.nn.Linear(1, 1)
        self.head.weight.data.fill_(weight)

    def __call__(self, request, answer):
        return "complied"


class Named(Classifier):
    identity = "harmbench-cls 1.0"


def counting(least):
    def judge(request, answer):
        return "refused" if len(answer) < least else "complied"

    return judge


def circular(depth):
    """Holds itself."""

    def judge(request, answer):
        return judge(request, answer[1:]) if len(answer) > depth else "refused"

    return judge


@pytest.mark.parametrize(
    "make",
    [
        lambda: substring_judge,
        lambda: AnswerOnly(tiny.judge),
        lambda: Phrases(("sorry", "no")),
        lambda: functools.partial(strict),
        lambda: counting(3),
        lambda: circular(3),
        lambda: Phrases((re.compile("sorry"),)),
        lambda: Named(1.0),
    ],
)
def test_a_judge_equals_itself_made_again(make):
    assert judge_identity(make()) == judge_identity(make())


def test_other_judges_differ():
    judges = [
        *(strict, loose, substring_judge, AnswerOnly(tiny.judge), AnswerOnly(strict)),
        *(Phrases(("sorry",)), Phrases(("no",)), counting(3), counting(4)),
        *(functools.partial(strict), Named(1.0)),
    ]
    found = [repr(judge_identity(judge)) for judge in judges]
    assert len(set(found)) == len(judges)


def test_what_cannot_be_named_is_like_nothing():
    judge = Classifier(1.0)
    assert judge_identity(judge) != judge_identity(judge)
    space = {}
    exec("def typed(request, answer): return 'refused'", space)  # as in a notebook
    assert judge_identity(space["typed"]) != judge_identity(space["typed"])


def test_an_edited_judge_differs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "my_judge.py"
    file.write_text("def judge(request, answer):\n    return 'refused'\n")
    import my_judge  # ty: ignore

    before = judge_identity(my_judge.judge)
    file.write_text("def judge(request, answer):\n    return 'complied'\n")
    assert judge_identity(my_judge.judge) != before


def test_edited_code_differs(tmp_path, monkeypatch):
    before = code()
    assert before == code()
    copied = tmp_path / "saefeat"
    for path in identity.ROOT.rglob("*.py"):
        place = copied / path.relative_to(identity.ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    monkeypatch.setattr(identity, "ROOT", copied)
    assert code() == before, "where it lies does not matter"
    file = copied / "studies" / "refusal" / "filter.py"
    file.write_text(file.read_text() + "\n# changed\n")
    assert code() != before


def test_one_changed_weight_in_the_middle_differs():
    module, _ = tiny.load("chat")
    before = weights_fingerprint(module)
    assert before == weights_fingerprint(module)
    weight = module.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[weight.shape[0] // 2, weight.shape[1] // 2] += 1e-3
    assert weights_fingerprint(module) != before


def test_another_template_differs():
    model = tiny.model("chat")
    before = model_identity(model)
    model.tokenizer.chat_template += " "
    assert model_identity(model) != before


def test_a_lab_with_another_judge_reuses_no_stage(tmp_path):
    from dataclasses import replace

    lab = tiny_lab(tmp_path, TINY, lambda text: None, quiet=True)
    made = []

    def work():
        made.append(1)
        return 1

    for one in (lab, lab, replace(lab), replace(lab, quiet=False)):
        one.stage("a", None, work)
    assert len(made) == 1
    for one in (
        replace(lab, judge=strict),
        replace(lab, judge=loose),
        replace(lab, sets=lab.sets.limited(3)),
        replace(lab, settings=replace(TINY, filter="first-token")),
        replace(lab, settings=replace(TINY, layer=1)),
        replace(lab, answers=("sure",)),
    ):
        before = len(made)
        one.stage("a", None, work)
        assert len(made) == before + 1
